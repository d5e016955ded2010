import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill.cache.codecs import Codec, Full, HeadSamples, Sampled, TopK
from metal_ops import SparseTeacher
from tests.hf_distill.cache.codecs.teachers import (
    CODECS,
    SPARSE,
    encode,
    exact,
    num_bytes,
    same,
    tail_of,
    zipf_logits,
)

WIDTHS = [65535, 65536, 65537, 131072, 131073, 151936, 262144]


def decode(codec: Codec, logits: Tensor, lengths: list[int], **arguments: int) -> SparseTeacher:
    rows = encode(codec, logits, lengths, **arguments)
    teacher = codec.decode(rows, lengths, logits.shape[1])
    assert isinstance(teacher, SparseTeacher)
    return teacher


def at_ids(log_probs: Tensor, ids: Tensor) -> Tensor:
    return log_probs.gather(-1, ids.clamp_min(0))


def assert_teacher(codec: Codec, teacher: SparseTeacher, logits: Tensor) -> None:
    """What was decoded is the distribution of the logits, to the rounding of what is stored."""
    log_p = exact(logits, codec.temperature)
    known = teacher.ids >= 0
    if known.shape[1]:
        error = (teacher.log_probs - at_ids(log_p, teacher.ids))[known]
        assert float(error.abs().max()) < 0.03
        mass = teacher.log_probs.double().exp().sum(-1) + teacher.log_tail.double().exp()
        assert float((mass - 1).abs().max()) < 1e-6
        assert bool((teacher.log_probs[~known] == -torch.inf).all())
        top = torch.stack([x.topk(1).indices for x in log_p])
        assert teacher.ids[:, :1].tolist() == top.tolist()
    tail = tail_of(log_p, teacher.ids)
    torch.testing.assert_close(
        teacher.log_tail.double(), tail.logsumexp(-1), atol=4e-3, rtol=2**-10
    )
    if teacher.samples is not None:
        drawn = tail.gather(-1, teacher.samples.ids.clamp_min(0))[teacher.samples.ids >= 0]
        error = teacher.samples.log_probs[teacher.samples.ids >= 0] - drawn
        assert float(error.abs().max()) < 0.05  # half of a 255th of the range of the draws
    if teacher.powers is not None:
        sums = torch.stack([(a * tail).logsumexp(-1) for a in teacher.powers.orders], -1)
        torch.testing.assert_close(teacher.powers.log_sums.double(), sums, atol=4e-3, rtol=1e-3)


@pytest.mark.parametrize("vocab", WIDTHS)
def test_sparse_codecs_at_every_width_of_ids(vocab: int) -> None:
    logits = zipf_logits(5, vocab)
    logits[0, vocab - 1] = 5.0  # the last entry is known, and the first of another token
    logits[1, 0] = 5.0
    for codec in SPARSE.values():
        assert_teacher(codec, decode(codec, logits, [2, 3]), logits)


@pytest.mark.parametrize("vocab", [65537, 262144])
@pytest.mark.parametrize(("name", "step"), [("fp16", 2**-10), ("int8", 0.06)])
def test_full_codecs(vocab: int, name: str, step: float) -> None:
    logits = zipf_logits(4, vocab)
    codec = Full(name)
    read = codec.decode(encode(codec, logits, [1, 3]), [1, 3], vocab)
    log_p = exact(logits)
    error = (read - log_p).abs()
    likely = log_p > -12
    assert float(error[likely].max()) < (step if name == "int8" else 12 * step)
    # float32 log_softmax sums a row in 8 lanes or more: each adds V / 8 numbers to at most 1
    torch.testing.assert_close(read.logsumexp(-1), torch.zeros(4), atol=vocab / 8 * 2**-24, rtol=0)
    read = read.double().log_softmax(-1)
    assert float((log_p.exp() * (log_p - read)).sum(-1).abs().max()) < step**2 + 1e-4


@pytest.mark.parametrize("margin", [20.0, 26.0, 40.0, 90.0])
def test_a_tail_that_is_almost_nothing_is_right(margin: float) -> None:
    """A float32 of 1 minus the head's mass has no digit left of a tail below 1e-7."""
    logits = zipf_logits(3, 4000)
    logits[:, 17] = logits.logsumexp(-1) + margin
    for codec in (HeadSamples(), TopK(), TopK(1)):
        teacher = decode(codec, logits, [3])
        tail = tail_of(exact(logits), teacher.ids).logsumexp(-1)
        assert float(tail.max()) < -margin + 0.1
        torch.testing.assert_close(teacher.log_tail.double(), tail, atol=0, rtol=2**-11)
        assert bool(teacher.log_probs.isfinite().all())
        if teacher.samples is not None:
            assert bool((teacher.samples.log_weights.isfinite()).all())
        if teacher.powers is not None:  # the rounding of log_tail is not in them
            tail = tail_of(exact(logits), teacher.ids)
            sums = torch.stack([(a * tail).logsumexp(-1) for a in teacher.powers.orders], -1)
            torch.testing.assert_close(teacher.powers.log_sums.double(), sums, atol=1e-3, rtol=0)


@pytest.mark.parametrize("vocab", [4000, 49152, 151936])
@pytest.mark.parametrize("slope", [(1.1, 1.2), (1.4, 1.6)])
def test_the_tail_at_other_temperatures(vocab: int, slope: tuple[float, float]) -> None:
    logits = zipf_logits(8, vocab, slope=slope)
    for codec in (HeadSamples(), TopK(32, temperature_range=(1.0, 2.0))):
        teacher = decode(codec, logits, [8])
        for temperature in (1.0, 1.2, 1.5, 1.75, 2.0):
            moved = teacher.at(temperature)
            tail = tail_of(exact(logits, temperature), teacher.ids).logsumexp(-1)
            assert float((moved.log_tail.exp() - tail.exp()).abs().max()) < 1e-3
    with pytest.raises(ValueError, match=r"from 1 to 2, got 2\.5"):
        teacher.at(2.5)


def test_a_teacher_written_at_another_temperature() -> None:
    logits = zipf_logits(6, 3000)
    codec = HeadSamples(temperature=2.0, temperature_range=(1.0, 2.0))
    teacher = decode(codec, logits, [6])
    assert teacher.temperature == 2.0
    assert_teacher(codec, teacher, logits)
    cold = teacher.at(1.0)
    tail = tail_of(exact(logits), teacher.ids).logsumexp(-1)
    torch.testing.assert_close(cold.log_tail.exp().double(), tail.exp(), atol=1e-3, rtol=0)


def test_weights_are_those_of_the_draws() -> None:
    """Log of 1 / (n g), g in proportion to p ** 0.5 over the tail, with the exact p."""
    logits = zipf_logits(6, 3000)
    teacher = decode(HeadSamples(), logits, [6])
    tail = tail_of(exact(logits), teacher.ids)
    log_g = (0.5 * tail).log_softmax(-1).gather(-1, teacher.samples.ids)
    expected = -math.log(32) - log_g
    torch.testing.assert_close(teacher.samples.log_weights.double(), expected, atol=0.03, rtol=0)


def test_everything_is_divided_by_the_same_mass() -> None:
    """A head that is stored 3 % too heavy takes as much from the tail, its sums and its draws."""
    codec = HeadSamples(8)
    (row,) = encode(codec, zipf_logits(6, 3000), [6])
    heavy = row | {"head_exact": (row["head_exact"] + np.float16(0.03)).astype(np.float16)}
    before, after = (codec.decode([x], [6], 3000) for x in (row, heavy))
    shift = after.log_tail - before.log_tail
    assert float(shift.max()) < -5e-3
    assert float((after.log_probs.exp().sum(-1) + after.log_tail.exp() - 1).abs().max()) < 1e-6
    close = {"atol": 2e-6, "rtol": 0}  # four float32 logs below 16, each rounded by 2^-21
    moved = after.samples.log_probs - before.samples.log_probs
    torch.testing.assert_close(moved, shift[:, None].expand_as(moved), **close)
    torch.testing.assert_close(after.samples.log_weights, before.samples.log_weights, **close)
    moved = after.powers.log_sums - before.powers.log_sums
    expected = shift[:, None] * torch.tensor(after.powers.orders)
    torch.testing.assert_close(moved, expected, **close)


@pytest.mark.parametrize("name", ["one temperature", "sampled"])
def test_draws_in_proportion_to_p_weigh_exactly_the_mass_of_the_tail(name: str) -> None:
    teacher = decode(CODECS[name], zipf_logits(6, 3000), [6])
    mass = (teacher.samples.log_weights + teacher.samples.log_probs).exp().sum(-1)
    torch.testing.assert_close(mass, teacher.log_tail.exp(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_the_entropy_is_stored(name: str) -> None:
    logits = zipf_logits(6, 3000)
    logits[2, 40:] = -torch.inf
    (row,) = encode(SPARSE[name], logits, [6])
    probs = exact(logits).exp()
    expected = -torch.special.xlogy(probs, probs).sum(-1)
    torch.testing.assert_close(torch.tensor(row["entropy"]).double(), expected, atol=0, rtol=6e-4)


def test_repeated_draws_are_stored_once_with_their_number() -> None:
    logits = torch.tensor([[0.0, -0.5, -2.0, -8.0], [9.0, 0.0, 0.0, 0.0]])
    codec = Sampled(40)
    rows = encode(codec, logits, [2])
    counts = np.split(rows[0]["draw_repeats"], np.cumsum(rows[0]["draw_sizes"])[:-1])
    for count, probs in zip(counts, logits.softmax(-1), strict=True):
        assert count.sum() == 40
        assert abs(count.max() - 40 * float(probs.max())) <= 1
    teacher = codec.decode(rows, [2], 4)
    assert teacher.ids.shape == (2, 0)
    assert teacher.log_tail.tolist() == [0.0, 0.0]
    assert teacher.samples.ids[1].tolist() == [0, -1, -1][: teacher.samples.ids.shape[1]]


@pytest.mark.parametrize("name", SPARSE)
def test_padding_of_the_vocabulary_has_no_part(name: str) -> None:
    logits = zipf_logits(5, 700)
    real = logits[:, :600]
    logits[:, 600:] = 50.0
    teacher = decode(SPARSE[name], logits, [5], real_vocab=600)
    assert_teacher(SPARSE[name], teacher, real)
    if teacher.powers is not None:
        known = (teacher.ids >= 0).sum(-1)
        assert teacher.powers.num_tail.tolist() == (600 - known).tolist()


@pytest.mark.parametrize("name", CODECS)
def test_entries_that_cannot_be(name: str) -> None:
    """Tokens with 1, 3, 10 and all 200 entries: short heads, empty tails, draws of nothing."""
    logits = zipf_logits(4, 200)
    for row, count in enumerate([1, 3, 10]):
        logits[row, count:] = -torch.inf
    codec = CODECS[name]
    read = codec.decode(encode(codec, logits, [4]), [4], 200)
    if isinstance(read, Tensor):
        assert (read == -torch.inf).tolist() == (logits == -torch.inf).tolist()
        return
    assert_teacher(codec, read, logits)
    assert (read.ids < 200).all()
    empty = read.log_tail == -torch.inf
    if read.samples is not None:
        assert bool((read.samples.ids[empty] == -1).all())
        assert bool((read.samples.log_weights[empty] == -torch.inf).all())
        valid = read.samples.ids >= 0
        assert bool((logits.gather(-1, read.samples.ids.clamp_min(0))[valid] > -torch.inf).all())
    if read.powers is not None:
        known = (read.ids >= 0).sum(-1)
        assert read.powers.num_tail.tolist() == (torch.tensor([1, 3, 10, 200]) - known).tolist()


@pytest.mark.parametrize("name", CODECS)
def test_bytes_and_values_of_a_row_do_not_depend_on_its_company(name: str) -> None:
    codec, lengths = CODECS[name], [1, 13, 0, 9, 70]
    logits = zipf_logits(sum(lengths), 1500)
    together = encode(codec, logits, lengths)
    parts = logits.split(lengths)
    keys = [(7, row) for row in range(5)]
    for order in ([4, 2, 0, 3, 1], [1], [0, 1], [3, 4]):
        some = codec.encode(
            torch.cat([parts[i] for i in order]),
            [lengths[i] for i in order],
            [keys[i] for i in order],
            1500,
        )
        assert same(some, [together[i] for i in order])
    read = codec.decode(together, lengths, 1500)
    alone = [codec.decode([row], [n], 1500) for row, n in zip(together, lengths, strict=True)]
    if isinstance(read, Tensor):
        assert torch.equal(read, torch.cat(alone))
        return
    start = 0
    for teacher, length in zip(alone, lengths, strict=True):
        span = slice(start, start + length)
        width, start = teacher.ids.shape[1], start + length
        assert torch.equal(read.ids[span, :width], teacher.ids)
        torch.testing.assert_close(read.log_probs[span, :width], teacher.log_probs)
        assert torch.equal(read.log_tail[span], teacher.log_tail)
        if teacher.samples is not None:
            n = min(read.samples.ids.shape[1], teacher.samples.ids.shape[1])
            for x, y in zip(read.samples, teacher.samples, strict=True):
                torch.testing.assert_close(x[span, :n], y[:, :n])
        if teacher.powers is not None:
            assert torch.equal(read.powers.log_sums[span], teacher.powers.log_sums)


def test_another_seed_or_row_draws_others() -> None:
    logits, codec = zipf_logits(8, 3000), HeadSamples()
    first, again, seed, row = (
        codec.encode(logits, [8], [key], 3000)[0] for key in [(0, 0), (0, 0), (1, 0), (0, 1)]
    )
    assert same([first], [again])
    for other in (seed, row):
        assert not np.array_equal(first["draw_low"], other["draw_low"])
        assert np.array_equal(first["head_low"], other["head_low"])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_their_values(name: str, dtype: torch.dtype) -> None:
    logits = zipf_logits(9, 900).to(dtype)
    assert same(encode(CODECS[name], logits, [9]), encode(CODECS[name], logits.float(), [9]))


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_and_no_tokens(name: str) -> None:
    codec = CODECS[name]
    assert encode(codec, torch.zeros(0, 300), []) == []
    rows = encode(codec, torch.zeros(0, 300), [0])
    for read in (codec.decode(rows, [0], 300), codec.decode([], [], 300)):
        assert len(read if isinstance(read, Tensor) else read.log_tail) == 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("vocab", [600, 151936])
def test_arrays_are_those_that_are_announced(name: str, vocab: int) -> None:
    (row,) = encode(CODECS[name], zipf_logits(2, vocab), [2])
    assert {key: array.dtype for key, array in row.items()} == CODECS[name].arrays(vocab)
    assert all(array.ndim == 1 for array in row.values())


def test_the_default_takes_at_most_195_bytes_a_token() -> None:
    """With what a container adds: positions, and per row its offsets, hash and number."""
    logits, tokens = zipf_logits(4, 151936), 200
    rows = encode(HeadSamples(), logits.repeat(tokens // 4, 1)[:8], [8])
    per_token = num_bytes([{k: v for k, v in rows[0].items() if k != "num_entries"}]) / 8
    per_row = 4 + 8 * (len(rows[0]) + 1) + 8 + 8
    assert per_token + 4 + per_row / tokens <= 195
