"""Decoding what the sparse codecs store, with every number checked.

Shapes: N tokens of all rows, K entries of the head, n draws, m orders.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, from_numpy

from hf_distill.cache.codecs import packing
from hf_distill.cache.codecs.packing import Rows
from hf_distill.cache.codecs.selection import Plan
from metal_ops import PowerSums, SparseTeacher, TailSamples

MASS_TOLERANCE = 0.1  # nats; the 8-bit codes of a long head can be off by 0.06
RAREST = 20.0  # nats; a draw less probable than e^-20 counts as one of that probability


def read(plan: Plan, rows: Rows, lengths: Sequence[int], vocab: int) -> SparseTeacher:
    """Return the teacher of the rows' tokens; see `SparseCodec.decode`."""
    if len(rows) != len(lengths):
        raise ValueError(f"there must be one length per row, {len(rows)}, got {len(lengths)}")
    ids, log_probs, sizes = _head(plan, rows, lengths, vocab)
    stored_tail = np.zeros(sum(lengths), packing.F16)
    if plan.top_k:
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
    log_sums = _log_sums(plan, rows, lengths, log_tail.numpy(), num_tail)
    shift = torch.zeros(1)
    if plan.top_k:
        shift = log_probs.exp().sum(-1).add_(log_tail.exp()).log_()
        _require(
            not len(shift) or float(shift.abs().max()) <= MASS_TOLERANCE,
            f"the log of the mass of head and tail must be within {MASS_TOLERANCE} of 0",
        )
        log_tail.sub_(shift)
        log_probs.sub_(shift[:, None])
        for i, order in enumerate(plan.orders):
            log_sums[:, i].sub_(shift, alpha=order)
    samples = powers = None
    if plan.num_samples:
        samples = _draws(plan, rows, lengths, vocab, shift, log_tail, log_sums)
    if plan.orders:
        count = from_numpy(num_tail).float()
        powers = PowerSums(plan.orders, log_sums, count, plan.temperature_range)
    return SparseTeacher(ids, log_probs, log_tail, plan.temperature, samples, powers)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{rule}; the stored arrays hold another value")


def _at_most_0(values: Tensor) -> bool:
    """Return whether no value is above 0 or NaN: a maximum hands NaN on."""
    return not len(values) or float(values.max()) <= 0


def _num_entries(rows: Rows, lengths: Sequence[int], vocab: int) -> np.ndarray:
    """Return [N] int64: how many entries have any probability."""
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
    return np.repeat(values, np.repeat(np.asarray(times, np.int64), sizes))


def _head(
    plan: Plan, rows: Rows, lengths: Sequence[int], vocab: int
) -> tuple[Tensor, Tensor, np.ndarray | int]:
    """Return ids [N, K], log-probabilities [N, K] and how many count: [N], or one for all."""
    num_tokens, most = sum(lengths), plan.top_k
    if not most:
        return torch.empty(num_tokens, 0, dtype=torch.int64), torch.empty(num_tokens, 0), 0
    counts = packing.unpack_counts(rows, "head_sizes", lengths, most)
    ids = packing.unpack_ids("head", rows, packing.totals(counts, lengths, most), vocab)
    exact_most = min(most, plan.num_exact + 1)
    num_exact = None if counts is None else np.minimum(counts, plan.num_exact + 1)
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
        exact, coarse = exact.view(-1, exact_most), coarse.view(num_tokens, most - exact_most)
        log_probs = _even_head(exact, coarse, plan.num_exact)
        return ids.view(num_tokens, most), log_probs, most
    width = int(counts.max(initial=1))
    log_probs = _uneven_head(exact, coarse, counts, width, plan.num_exact)
    places = from_numpy(np.arange(width) < counts[:, None])
    return _padded(ids, places, -1), log_probs, counts


def _even_head(exact: Tensor, coarse: Tensor, num_exact: int) -> Tensor:
    """Return [N, K] log-probabilities if all heads have K; exact [N, E], coarse [N, K - E]."""
    if exact.shape[1] <= num_exact:
        return exact
    log_probs = exact.new_empty(len(exact), num_exact + coarse.shape[1] + 1)
    log_probs[:, :num_exact] = exact[:, :num_exact]
    log_probs[:, -1:] = exact[:, num_exact:]
    top, last = exact[:, num_exact - 1 : num_exact], exact[:, num_exact:]
    middle = log_probs[:, num_exact:-1]
    torch.mul(coarse.float(), packing.steps(top, last), out=middle).add_(top)
    return log_probs


def _uneven_head(
    exact: Tensor, coarse: Tensor, counts: np.ndarray, width: int, num_exact: int
) -> Tensor:
    """Return [N, K] log-probabilities, -inf beyond each token's count."""
    is_exact, is_coarse = map(from_numpy, packing.head_masks(width, counts, num_exact))
    log_probs = torch.full(is_exact.shape, -torch.inf)
    log_probs[is_exact] = exact
    if is_coarse.any():
        top = log_probs[:, num_exact - 1 : num_exact]
        last = log_probs.gather(1, from_numpy(counts)[:, None] - 1)
        step = packing.steps(top, last)
        rows = is_coarse.nonzero()[:, 0]
        log_probs[is_coarse] = top[rows, 0] + step[rows, 0] * coarse
    return log_probs


def _log_sums(
    plan: Plan,
    rows: Rows,
    lengths: Sequence[int],
    log_tail: np.ndarray,
    num_tail: np.ndarray,
) -> Tensor:
    """Return [N, m] logs of the tail's power sums."""
    num_orders = len(plan.orders)
    if not num_orders:
        return torch.empty(len(log_tail), 0)
    sizes = [num_orders * length for length in lengths]
    stored = packing.join(rows, "log_sums", packing.U16, sizes).reshape(-1, num_orders)
    return from_numpy(packing.unpack_sums(stored, plan.orders, log_tail, num_tail)).T.contiguous()


def _draws(
    plan: Plan,
    rows: Rows,
    lengths: Sequence[int],
    vocab: int,
    shift: Tensor,
    log_tail: Tensor,
    log_sums: Tensor,
) -> TailSamples:
    """Return the draws with their weights, [N, n]."""
    most, counts = plan.num_samples, None
    if plan.merges_draws:
        counts = packing.unpack_counts(rows, "draw_sizes", lengths, most)
    sizes = packing.totals(counts, lengths, most)
    ids = packing.unpack_ids("draw", rows, sizes, vocab)
    codes = from_numpy(packing.join(rows, "draw_codes", packing.U8, sizes))
    ends = packing.whole(
        packing.join(rows, "draw_ends", packing.F16, [2 * length for length in lengths])
    ).view(-1, 2)
    _require(
        _at_most_0(ends) and (not len(ends) or float(ends.min()) > -math.inf),
        "draw_ends must be finite and at most 0",
    )
    repeats = None
    if plan.merges_draws:
        repeats = from_numpy(packing.join(rows, "draw_repeats", packing.U8, sizes))
        _require(not len(repeats) or int(repeats.min()) >= 1, "draw_repeats must be at least 1")
    drawn = None
    if counts is None:
        ids, codes = ids.view(-1, most), codes.view(-1, most)
        repeats = None if repeats is None else repeats.view(-1, most)
    else:
        drawn = from_numpy(np.arange(int(counts.max(initial=1))) < counts[:, None])
        ids, codes = _padded(ids, drawn, -1), _padded(codes, drawn, 0)
        repeats = None if repeats is None else _padded(repeats, drawn, 1)
    top, last = ends[:, :1], ends[:, 1:]
    log_probs = codes.float().mul_(packing.steps(top, last)).add_(top - shift[:, None])
    log_weights = _log_weights(plan, log_probs, log_tail, log_sums)
    if repeats is not None:
        log_weights += repeats.float().log()
    if len(log_tail) and float(log_tail.min()) == -math.inf:
        filled = (log_tail > -torch.inf)[:, None]
        drawn = filled if drawn is None else drawn & filled
    if drawn is not None:
        ids = ids.masked_fill(~drawn, -1)
        log_weights = log_weights.masked_fill(~drawn, -torch.inf)
    return TailSamples(ids, log_probs, log_weights)


def _padded(values: Tensor, places: Tensor, fill: int) -> Tensor:
    """Put values that follow each other at the places of a [N, n] mask, `fill` elsewhere."""
    return torch.full(places.shape, fill, dtype=values.dtype).masked_scatter_(places, values)


def _log_weights(plan: Plan, log_probs: Tensor, log_tail: Tensor, log_sums: Tensor) -> Tensor:
    """Return [N, n] log(1 / (n g)) of single draws; what is no draw may get any number."""
    order = plan.proposal
    log_sum = log_tail if order == 1.0 else log_sums[:, plan.orders.index(order)]
    log_n = math.log(plan.num_samples)
    log_weights = torch.sub((log_sum - log_n)[:, None], log_probs, alpha=order)
    return log_weights.clamp_max_(RAREST - log_n)
