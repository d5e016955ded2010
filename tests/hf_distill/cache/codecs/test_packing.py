from itertools import accumulate

import numpy as np
import pytest
import torch

from hf_distill.cache.codecs import packing

WIDTHS = [2, 65535, 65536, 65537, 131072, 131073, 151936, 262144, 262145, 2**24 + 1, 2**31]


@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("sizes", [[8, 16], [3, 0, 5, 1], [0], []])  # whole bytes, parts, nothing
def test_ids_come_back(vocab: int, sizes: list[int]) -> None:
    ids = np.random.default_rng(vocab).integers(0, vocab, sum(sizes))
    ids[: min(2, len(ids))] = [vocab - 1, 0][: min(2, len(ids))]
    rows = packing.pack_ids("x", ids, list(accumulate(sizes)), vocab)
    for row in rows:
        assert {name: array.dtype for name, array in row.items()} == packing.id_arrays("x", vocab)
    read = packing.unpack_ids("x", rows, sizes, vocab)
    assert read.dtype == torch.int64
    assert read.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("vocab", "bits"),
    [(65536, 0), (65537, 1), (131072, 1), (131073, 2), (262144, 2), (262145, 4), (2**31, 16)],
)
def test_an_id_has_as_many_bits_as_its_vocabulary_needs(vocab: int, bits: int) -> None:
    ids = np.full(16, vocab - 1)
    (row,) = packing.pack_ids("x", ids, [16], vocab)
    assert sum(array.nbytes for array in row.values()) == 2 * (16 + bits)


def test_the_bytes_of_ids() -> None:
    ids = np.array([0x0_0102, 0x1_FFFF, 0x2_0000, 0x3_8001, 0x1_0003])
    first, second = packing.pack_ids("x", ids, [4, 5], 262144)
    assert first["x_low"].tobytes() == bytes.fromhex("0201 ffff 0000 0180")
    assert first["x_high"].tobytes() == bytes([0b11_10_01_00])
    assert second["x_high"].tobytes() == bytes([1])


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    rows = packing.pack_ids("x", np.array([151935, 151936]), [2], 151937)
    with pytest.raises(ValueError, match="x ids must be below 151936, got 151936"):
        packing.unpack_ids("x", rows, [2], 151936)


@pytest.mark.parametrize("order", [0.25, 0.5, 0.9, 1.5])
def test_power_sums_come_back(order: float) -> None:
    sizes = np.array([1, 2, 50_000])
    tails = [-16.0 - np.arange(n) * slope for n, slope in zip(sizes, [0, 3.0, 1e-4], strict=True)]
    log_tail = np.array([np.logaddexp.reduce(x) for x in tails], np.float32)
    log_sums = np.array([[np.logaddexp.reduce(order * x)] for x in tails], np.float32)
    stored = packing.pack_sums(log_sums, [order], log_tail, sizes)
    read = packing.unpack_sums(stored, [order], log_tail, sizes)
    np.testing.assert_allclose(read.T, log_sums, rtol=0, atol=1.1e-4)


def test_any_stored_power_sum_is_a_possible_one() -> None:
    stored = np.array([[0], [65535]], np.uint16)
    read = packing.unpack_sums(stored, [0.5], np.full(2, -4.0, np.float32), np.full(2, 10_000))
    # all entries alike: 10^4 sqrt(e^-4 / 10^4); one entry has all: sqrt(e^-4)
    np.testing.assert_allclose(read[0], [np.log(100) - 2, -2], atol=1e-5)


def test_the_values_of_a_head() -> None:
    values = np.array([[-0.5, -1.0, -2.0, -2.25, -3.0]], np.float32)
    exact, num_exact, codes, num_codes = packing.pack_head(values, np.array([5]), 2)
    assert exact.tolist() == [-0.5, -1.0, -3.0]
    assert codes.tolist() == [round(255 * 1 / 2), round(255 * 1.25 / 2)]
    assert (num_exact.tolist(), num_codes.tolist()) == ([3], [2])


def test_what_lies_far_below_does_not_blur_the_rest_of_a_head() -> None:
    values = np.array([[-0.7, -0.8, -5.0, -30_000.0]], np.float32)
    exact, _, codes, _ = packing.pack_head(values, np.array([4]), 1)
    assert exact[1] == pytest.approx(-0.7 - packing.DEEPEST, abs=0.02)
    step = packing.DEEPEST / 255
    assert -0.7 - codes * step == pytest.approx([-0.8, -5.0], abs=0.55 * step)


def test_the_values_of_draws() -> None:
    values = np.array([[-9.0, -5.0, -7.5], [-np.inf, -np.inf, -np.inf]], np.float32)
    ends, codes = packing.pack_draws(values)
    assert ends[0].tolist() == [-5.0, -9.0]
    assert codes[0].tolist() == [255, 0, 159]
    assert np.isfinite(ends).all()
