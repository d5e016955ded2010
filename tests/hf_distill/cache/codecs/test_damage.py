"""Arrays that no encoder wrote: refused with a ValueError, or read as something harmless."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill.cache.codecs import Codec, HeadSamples, Sampled
from metal_ops import SparseTeacher
from tests.hf_distill.cache.codecs.teachers import CODECS, encode, zipf_logits

VOCAB, LENGTHS = 70_000, [3, 5]
Row = dict[str, np.ndarray]


def assert_harmless(read: SparseTeacher | Tensor) -> None:
    """Can be indexed with and computed with."""
    if isinstance(read, Tensor):
        assert not read.isnan().any()
        assert float(read.max()) <= 0
        return
    assert bool(((read.ids >= -1) & (read.ids < VOCAB)).all())
    assert not read.log_probs.isnan().any()
    assert not read.log_tail.isnan().any()
    assert bool((read.log_probs <= 1e-6).all())
    assert bool((read.log_tail <= 1e-6).all())
    if read.samples is not None:
        ids, log_probs, log_weights = read.samples
        assert -1 <= int(ids.min()) <= int(ids.max()) < VOCAB
        assert not log_probs[ids >= 0].isnan().any()
        assert bool((log_weights < 20).all())
        assert bool((log_weights[ids < 0] == -torch.inf).all())
    if read.powers is not None:
        assert not read.powers.log_sums.isnan().any()
        assert bool((read.powers.num_tail >= 0).all())
        if read.powers.temperature_range[1] == 2.0:
            assert not read.at(2.0).log_tail.isnan().any()


def mutated(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """One array of one row changed in one of many ways."""
    rows = [dict(row) for row in rows]
    row = rows[rng.integers(len(rows))]
    name = rng.choice(list(row))
    array = row[name]
    data = bytearray(array.tobytes())
    kind = rng.integers(6)
    if kind == 0 and data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        row[name] = np.frombuffer(bytes(data), array.dtype)
    elif kind == 1 and data:
        data[:] = rng.bytes(len(data))
        row[name] = np.frombuffer(bytes(data), array.dtype)
    elif kind == 2:
        row[name] = array[: rng.integers(len(array) + 1)]
    elif kind == 3:
        row[name] = np.concatenate([array, array[:1], np.zeros(rng.integers(3), array.dtype)])
    elif kind == 4:
        row[name] = [array.astype(np.float64), array.reshape(1, -1)][rng.integers(2)]
    else:
        other = rows[rng.integers(len(rows))]
        swap = rng.choice(list(other))
        row[name], other[swap] = other[swap], row[name]
    return rows


@pytest.mark.parametrize("name", CODECS)
def test_random_damage_is_refused_or_harmless(name: str) -> None:
    codec, rng = CODECS[name], np.random.default_rng(5)
    count = 40 if name in ("fp16", "int8") else 300
    logits = zipf_logits(sum(LENGTHS), VOCAB)
    logits[2, 5:] = -torch.inf
    rows, refused = encode(codec, logits, LENGTHS), 0
    for _ in range(count):
        try:
            assert_harmless(codec.decode(mutated(rows, rng), LENGTHS, VOCAB))
        except ValueError:
            refused += 1
    assert refused > count / 4


def stored(codec: Codec) -> Row:
    (row,) = encode(codec, zipf_logits(4, VOCAB), [4])
    return row


def changed(row: Row, name: str, value: float, place: int = 0) -> Row:
    array = row[name].copy()
    array[place] = value
    return {**row, name: array}


@pytest.mark.parametrize(
    ("codec", "name", "value", "message"),
    [
        (HeadSamples(), "head_exact", 0.5, "head_exact must be finite and at most 0"),
        (HeadSamples(), "head_exact", -np.inf, "head_exact must be finite"),
        (HeadSamples(), "head_exact", np.nan, "head_exact must be finite"),
        (HeadSamples(), "head_exact", -30.0, "mass of head and tail must be within 0.1 of 0"),
        (HeadSamples(), "log_tail", 0.25, "log_tail must be at most 0"),
        (HeadSamples(), "log_tail", np.nan, "log_tail must be at most 0"),
        (HeadSamples(), "log_tail", -0.01, "mass of head and tail"),
        (HeadSamples(), "draw_ends", 1.0, "draw_ends must be finite and at most 0"),
        (HeadSamples(), "draw_ends", -np.inf, "draw_ends must be finite"),
        (HeadSamples(), "num_entries", 0, r"num_entries must be in \[1, 70000\], got 0"),
        (HeadSamples(), "num_entries", VOCAB + 1, "num_entries must be in .* got 70001 to 70001"),
        (HeadSamples(), "num_entries", 16, "num_entries must be above the head's"),
        (HeadSamples(), "entropy", -1.0, "entropy must be at least 0"),
        (HeadSamples(top_p=0.5), "head_sizes", 0, r"head_sizes must be in \[1, 16\], got 0"),
        (HeadSamples(top_p=0.5), "head_sizes", 17, r"head_sizes must be in \[1, 16\], got .* 17"),
        (Sampled(), "draw_repeats", 0, "draw_repeats must be at least 1"),
        (Sampled(), "draw_sizes", 0, r"draw_sizes must be in \[1, 50\], got 0"),
        (CODECS["fp16"], "full_fp16", 0.5, "full_fp16 must be at most 0"),
        (CODECS["fp16"], "full_fp16", np.nan, "full_fp16 must be at most 0"),
        (CODECS["int8"], "full_scale", np.inf, "full_scale must be finite and at most 0"),
        (CODECS["int8"], "full_scale", 0.5, "full_scale must be finite and at most 0"),
    ],
)
def test_values_that_no_teacher_has(codec: Codec, name: str, value: float, message: str) -> None:
    row = stored(codec)
    codec.decode([row], [4], VOCAB)
    with pytest.raises(ValueError, match=message):
        codec.decode([changed(row, name, value)], [4], VOCAB)


def test_an_id_beyond_the_vocabulary() -> None:
    row = stored(HeadSamples())
    for part in ("head", "draw"):
        high = np.full_like(row[f"{part}_high"], 255)
        low = np.full_like(row[f"{part}_low"], 65535)
        with pytest.raises(ValueError, match=f"{part} ids must be below 70000, got 131071"):
            HeadSamples().decode([{**row, f"{part}_high": high, f"{part}_low": low}], [4], VOCAB)


def test_arrays_that_do_not_fit() -> None:
    row, codec = stored(HeadSamples()), HeadSamples()
    with pytest.raises(ValueError, match="row 0 has no array 'log_tail'"):
        codec.decode([{k: v for k, v in row.items() if k != "log_tail"}], [4], VOCAB)
    with pytest.raises(ValueError, match=r"head_low of row 1 must be uint16 \[80\], got .* \[64\]"):
        codec.decode([row, row], [4, 5], VOCAB)
    with pytest.raises(ValueError, match=r"log_tail of row 0 must be float16 \[4\], got float32"):
        codec.decode([{**row, "log_tail": row["log_tail"].astype(np.float32)}], [4], VOCAB)
    with pytest.raises(ValueError, match="one length per row, 1, got 2"):
        codec.decode([row], [4, 4], VOCAB)


def test_a_draw_that_is_all_but_impossible_has_a_bounded_weight() -> None:
    row = changed(stored(HeadSamples()), "draw_ends", -60_000.0, place=1)
    samples = HeadSamples().decode([row], [4], VOCAB).samples
    assert 15 < float(samples.log_weights.max()) < 20
