"""Decoding what the sparse codecs store, with every number checked.

Shapes: N tokens of all rows, K entries of the head, n draws, m orders.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, from_numpy

from hf_distill.offline.codecs import packing
from hf_distill.offline.codecs.packing import Rows
from metal_ops import PowerSums, SparseTeacher, TailSamples

MASS_TOLERANCE = 0.1  # nats; the 8-bit codes of a long head can be off by 0.06
RAREST = 20.0  # nats; a draw less probable than e^-20 counts as one of that probability


class SparseLayout(Protocol):
    """What decides which numbers are stored; the fields of `SparseCodec`."""

    top_k: int
    num_exact: int
    num_samples: int
    merges_draws: bool
    temperature: float
    temperature_range: tuple[float, float]
    proposal: float
    orders: tuple[float, ...]


def read(layout: SparseLayout, rows: Rows, lengths: Sequence[int], vocab: int) -> SparseTeacher:
    """The teacher of some rows' tokens; see `SparseCodec.decode`."""
    if len(rows) != len(lengths):
        raise ValueError(f"there must be one length per row, {len(rows)}, got {len(lengths)}")
    ids, log_probs, sizes = _head(layout, rows, lengths, vocab)
    stored_tail = np.zeros(sum(lengths), packing.F16)
    if layout.top_k:
        stored_tail = packing.join(rows, "log_tail", packing.F16, lengths)
    log_tail = packing.whole(stored_tail)
    _require(_at_most_0(log_tail), "log_tail must be at most 0, and not NaN")
    num_tail = _num_entries(rows, lengths, vocab) - sizes
    _require(
        bool(((num_tail > 0) | ((num_tail == 0) & (log_tail.numpy() == -np.inf))).all()),
        "num_entries must be above the head's, or equal to them where log_tail is -inf",
    )
    entropy = packing.join(rows, "entropy", packing.F16, lengths)
    _require(bool((entropy >= 0).all()), "entropy must be at least 0, and not NaN")
    log_sums = _log_sums(layout, rows, lengths, log_tail.numpy(), num_tail)
    shift = torch.zeros(1)
    if layout.top_k:
        shift = log_probs.exp().sum(-1).add_(log_tail.exp()).log_()
        _require(
            not len(shift) or float(shift.abs().max()) <= MASS_TOLERANCE,
            f"the log of the mass of head and tail must be within {MASS_TOLERANCE} of 0",
        )
        log_tail.sub_(shift)
        log_probs.sub_(shift[:, None])
        for i, order in enumerate(layout.orders):
            log_sums[:, i].sub_(shift, alpha=order)
    samples = powers = None
    if layout.num_samples:
        samples = _draws(layout, rows, lengths, vocab, shift, log_tail, log_sums)
    if layout.orders:
        count = from_numpy(num_tail).float()
        powers = PowerSums(layout.orders, log_sums, count, layout.temperature_range)
    return SparseTeacher(ids, log_probs, log_tail, layout.temperature, samples, powers)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{rule}; the stored arrays hold another value")


def _at_most_0(values: Tensor) -> bool:
    """Also False for NaN, which a maximum hands on."""
    return not len(values) or float(values.max()) <= 0


def _num_entries(rows: Rows, lengths: Sequence[int], vocab: int) -> np.ndarray:
    """[N] int64 entries with any probability."""
    name = "num_entries"
    sizes = [
        length if np.size(row.get(name, ())) == length else min(length, 1)
        for row, length in zip(rows, lengths, strict=True)
    ]
    values = packing.join(rows, name, packing.U32, sizes).astype(np.int64)
    if values.size and not 1 <= values.min() <= values.max() <= vocab:
        raise ValueError(
            f"{name} must be in [1, {vocab}], got {int(values.min())} to {int(values.max())}"
        )
    times = [length // max(size, 1) for size, length in zip(sizes, lengths, strict=True)]
    each = np.repeat(np.array(times, np.int64), np.array(sizes, np.int64))
    return np.repeat(values, each)


def _head(
    layout: SparseLayout, rows: Rows, lengths: Sequence[int], vocab: int
) -> tuple[Tensor, Tensor, np.ndarray | int]:
    """Ids [N, K], log-probabilities [N, K] and how many count, [N] or for all tokens."""
    num_tokens, most = sum(lengths), layout.top_k
    if not most:
        return torch.empty(num_tokens, 0, dtype=torch.int64), torch.empty(num_tokens, 0), 0
    counts = packing.unpack_counts(rows, "head_sizes", lengths, most)
    ids = packing.unpack_ids("head", rows, packing.totals(counts, lengths, most), vocab)
    exact_most = min(most, layout.num_exact + 1)
    num_exact = None if counts is None else np.minimum(counts, layout.num_exact + 1)
    num_coarse = None if counts is None else counts - num_exact
    sizes = packing.totals(num_exact, lengths, exact_most)
    exact = packing.whole(packing.join(rows, "head_exact", packing.F16, sizes))
    sizes = packing.totals(num_coarse, lengths, most - exact_most)
    coarse = from_numpy(packing.join(rows, "head_coarse", packing.U8, sizes))
    _require(
        _at_most_0(exact) and (not len(exact) or float(exact.min()) > -math.inf),
        "head_exact must be finite and at most 0",
    )
    if counts is None:
        log_probs = _even_head(exact.view(num_tokens, exact_most), coarse, layout.num_exact)
        return ids.view(num_tokens, most), log_probs, most
    width = int(counts.max(initial=1))
    log_probs = _uneven_head(exact, coarse, counts, width, layout.num_exact)
    padded = torch.full((num_tokens, width), -1)
    padded[from_numpy(np.arange(width) < counts[:, None])] = ids
    return padded, log_probs, counts


def _even_head(exact: Tensor, coarse: Tensor, num_exact: int) -> Tensor:
    """[N, K] log-probabilities of heads that all have K entries."""
    if exact.shape[1] <= num_exact:
        return exact
    coarse = coarse.view(len(exact), len(coarse) // max(len(exact), 1))
    log_probs = exact.new_empty(len(exact), num_exact + coarse.shape[1] + 1)
    log_probs[:, :num_exact] = exact[:, :num_exact]
    log_probs[:, -1:] = exact[:, num_exact:]
    top, last = exact[:, num_exact - 1 : num_exact], exact[:, num_exact:]
    step = (last - top) / packing.LEVELS
    torch.addcmul(top, coarse.float(), step, out=log_probs[:, num_exact:-1])
    return log_probs


def _uneven_head(
    exact: Tensor, coarse: Tensor, counts: np.ndarray, width: int, num_exact: int
) -> Tensor:
    """[N, K] log-probabilities, -inf beyond each token's count."""
    is_exact, is_coarse = map(from_numpy, packing.head_masks(width, counts, num_exact))
    log_probs = torch.full(is_exact.shape, -torch.inf)
    log_probs[is_exact] = exact
    if is_coarse.any():
        top = log_probs[:, num_exact - 1 : num_exact]
        last = log_probs.gather(1, from_numpy(counts)[:, None] - 1)
        step = (last - top) / packing.LEVELS
        rows = is_coarse.nonzero()[:, 0]
        log_probs[is_coarse] = top[rows, 0] + step[rows, 0] * coarse
    return log_probs


def _log_sums(
    layout: SparseLayout,
    rows: Rows,
    lengths: Sequence[int],
    log_tail: np.ndarray,
    num_tail: np.ndarray,
) -> Tensor:
    """[N, m] logs of the tail's power sums."""
    num_orders = len(layout.orders)
    if not num_orders:
        return torch.empty(len(log_tail), 0)
    sizes = [num_orders * length for length in lengths]
    stored = packing.join(rows, "log_sums", packing.U16, sizes).reshape(-1, num_orders)
    return from_numpy(packing.unpack_sums(stored, layout.orders, log_tail, num_tail))


def _draws(
    layout: SparseLayout,
    rows: Rows,
    lengths: Sequence[int],
    vocab: int,
    shift: Tensor,
    log_tail: Tensor,
    log_sums: Tensor,
) -> TailSamples:
    """The draws with their weights, [N, n]."""
    most, counts = layout.num_samples, None
    if layout.merges_draws:
        counts = packing.unpack_counts(rows, "draw_sizes", lengths, most)
    sizes = packing.totals(counts, lengths, most)
    ids = packing.unpack_ids("draw", rows, sizes, vocab)
    log_probs = packing.whole(packing.join(rows, "draw_log_probs", packing.F16, sizes))
    _require(_at_most_0(log_probs), "draw_log_probs must be at most 0, and not NaN")
    parts = [ids, log_probs]
    if layout.merges_draws:
        repeats = packing.join(rows, "draw_repeats", packing.U8, sizes)
        _require(bool((repeats >= 1).all()), "draw_repeats must be at least 1")
        parts.append(from_numpy(repeats).float().log())
    if counts is None:
        ids, log_probs, *log_repeats = (part.view(sum(lengths), most) for part in parts)
    else:
        ids, log_probs, *log_repeats = _padded(counts, *parts)
    log_probs.sub_(shift[:, None])
    log_weights = _log_weights(layout, log_probs, log_tail, log_sums)
    for tensor in log_repeats:
        log_weights.add_(tensor)
    if len(log_tail) and float(torch.minimum(log_probs.min(), log_tail.min())) == -math.inf:
        missing = (log_probs == -torch.inf) | (log_tail == -torch.inf)[:, None]
        ids = ids.masked_fill(missing, -1)
        log_weights = log_weights.masked_fill(missing, -torch.inf)
    return TailSamples(ids, log_probs, log_weights)


def _padded(counts: np.ndarray, ids: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """[N, n] of values that follow each other: -1 for ids and -inf for others fill the rest."""
    taken = from_numpy(np.arange(int(counts.max(initial=1))) < counts[:, None])
    results = []
    for tensor, fill in [(ids, -1), *((value, -torch.inf) for value in values)]:
        result = torch.full(taken.shape, fill, dtype=tensor.dtype)
        result[taken] = tensor
        results.append(result)
    return tuple(results)


def _log_weights(
    layout: SparseLayout, log_probs: Tensor, log_tail: Tensor, log_sums: Tensor
) -> Tensor:
    """[N, n] log(1 / (n g)) of single draws; what is no draw may get any number."""
    order = layout.proposal
    log_sum = log_tail if order == 1.0 else log_sums[:, layout.orders.index(order)]
    log_n = math.log(layout.num_samples)
    log_weights = torch.sub((log_sum - log_n)[:, None], log_probs, alpha=order)
    return log_weights.clamp_max_(RAREST - log_n)
