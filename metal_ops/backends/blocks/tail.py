"""Adds to a sparse teacher's tail what draws from it know; see `reference.bregman`.

With p_t, q_t both sides' mass of the tail, a draw s is seen through the log of the ratio of its
shares, l = log(q_s / q_t) - log(p_s / p_t), and through c = log(q_t / p_t): its term over p_s is a
function b(l, c) with b = 0 and d b = 0 at l = 0. The gradient for the logits is one number a row on
the softmax, one on the softmax of the tail, and one a draw.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.sizes import RowBlocks, may_ask
from metal_ops.spec import DivergenceSpec

LEAST = -60.0  # a smaller l counts as this one where terms would be 0 * inf: exp(-60) = 1e-26


class TailDraws(NamedTuple):
    """Holds n draws of each of N tokens: [N, n], but for the teacher's tail mass, [N]."""

    ids: Tensor
    log_probs: Tensor
    log_weights: Tensor
    log_tail: Tensor

    def of(self, at: slice | Tensor) -> "TailDraws":
        """Take the draws of some tokens."""
        return TailDraws(*(x[at] for x in self))


class Term(NamedTuple):
    """Holds b(l, c) and its two derivatives, each [rows, n]."""

    value: Tensor
    by_l: Tensor
    by_c: Tensor

    def plus(self, other: "Term", mine: float, theirs: float) -> "Term":
        """Return mine * self + theirs * other."""
        return Term(*(mine * x + theirs * y for x, y in zip(self, other, strict=True)))


def _bregman_log(u: Tensor) -> Tensor:
    """Compute exp(u) - 1 - u."""
    return torch.expm1(u) - u


def _forward_kl(ratio: Tensor, c: Tensor, _: float) -> Term:
    return Term(_bregman_log(ratio), torch.expm1(ratio), torch.zeros_like(ratio))


def _reverse_kl(ratio: Tensor, c: Tensor, _: float) -> Term:
    ratio = ratio.clamp_min(LEAST)
    odds, by_l = c.exp(), ratio * (c + ratio).exp()
    value = by_l - odds * torch.expm1(ratio)
    return Term(value, by_l, value)


def _skew_kl(ratio: Tensor, c: Tensor, a: float) -> Term:
    """Compute KL(p || m), m = a p + (1 - a) q."""
    ratio = ratio.clamp_min(LEAST)
    rest, own = math.log1p(-a), math.log(a) + torch.zeros_like(ratio)
    log_m, log_m_tail = torch.logaddexp(own, rest + c + ratio), torch.logaddexp(own, rest + c)
    u = log_m - log_m_tail
    share, share_tail = (rest + c + ratio - log_m).exp(), (rest + c - log_m_tail).exp()
    slope = torch.expm1(u)
    return Term(_bregman_log(u), slope * share, slope * (share - share_tail))


def _skew_reverse_kl(ratio: Tensor, c: Tensor, a: float) -> Term:
    """Compute KL(q || m), m = (1 - a) p + a q."""
    ratio = ratio.clamp_min(LEAST)
    rest, own = math.log1p(-a), math.log(a) + torch.zeros_like(ratio)
    log_m, log_m_tail = torch.logaddexp(own, rest - c - ratio), torch.logaddexp(own, rest - c)
    u, odds = log_m - log_m_tail, (c + ratio).exp()
    share, share_tail = (rest - c - ratio - log_m).exp(), (rest - c - log_m_tail).exp()
    value, slope = odds * _bregman_log(u), odds * torch.expm1(u)
    return Term(value, value - slope * share, value + slope * (share_tail - share))


def _jsd(ratio: Tensor, c: Tensor, beta: float) -> Term:
    reverse = _skew_reverse_kl(ratio, c, 1 - beta)
    return _skew_kl(ratio, c, beta).plus(reverse, beta, 1 - beta)


def _mixed_kl(ratio: Tensor, c: Tensor, beta: float) -> Term:
    return _forward_kl(ratio, c, beta).plus(_reverse_kl(ratio, c, beta), beta, 1 - beta)


def _alpha(ratio: Tensor, c: Tensor, beta: float) -> Term:
    ratio = ratio.clamp_min(LEAST)
    b = 1 - beta
    odds, own, other = (b * c).exp() / beta, torch.expm1(ratio), torch.expm1(b * ratio)
    value = odds * (own - other / b)
    return Term(value, odds * (own - other), b * value)


def _tvd(ratio: Tensor, c: Tensor, _: float) -> Term:
    odds, side = (c + ratio).exp(), -c.sign()
    value = 0.5 * ((odds - 1).abs() + side * (odds - 1))
    by_odds = 0.5 * odds * ((odds - 1).sign() + side)
    return Term(value, by_odds, by_odds)


TERMS: dict[str, Callable[[Tensor, Tensor, float], Term]] = {
    "forward_kl": _forward_kl,
    "soft_ce": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "mixed_kl": _mixed_kl,
    "alpha": _alpha,
}


def _term(ratio: Tensor, c: Tensor, spec: DivergenceSpec, max_ratio: float) -> Term:
    """Return b(l, c) with slopes bounded where the student's share is over max_ratio teacher's.

    The value stays as it is: that of the estimate, which the bound would make smaller.
    """
    free = TERMS[spec.kind](ratio, c, spec.beta)
    if max_ratio == math.inf:
        return free
    if spec.kind in ("forward_kl", "soft_ce"):
        return free._replace(by_l=free.by_l.clamp_max(max_ratio - 1))
    kept = ratio <= math.log(max_ratio)
    return free._replace(by_l=free.by_l.where(kept, 0.0), by_c=free.by_c.where(kept, 0.0))


class _Row(NamedTuple):
    """Holds what the gradient of a block's correction is made of: a factor each."""

    value: Tensor  # [rows]
    softmax: Tensor  # [rows, 1]
    tail: Tensor  # [rows, 1]
    draws: Tensor  # [rows, n]


def _correction(
    draws: TailDraws, log_q: Tensor, log_q_tail: Tensor, spec: DivergenceSpec, max_ratio: float
) -> _Row:
    """Compute it from log q at the draws [rows, n] less the tail's, and the tail's [rows, 1]."""
    # a few numbers a token: in float64, whose range products of odds need, where there is one
    dtype = torch.float32 if log_q.device.type == "mps" else torch.float64
    log_share, c = log_q.to(dtype), log_q_tail.to(dtype)
    log_p, log_p_tail = draws.log_probs.to(dtype), draws.log_tail.to(dtype)[:, None]
    weight = (draws.log_weights.to(dtype) + log_p).exp()
    weight = weight.where(draws.ids >= 0, 0.0)
    used = (weight > 0) & (c > -math.inf)
    log_pi = log_p - log_p_tail
    ratio = (log_share - log_pi).where(used, 0.0)
    term = _term(ratio, (c - log_p_tail).where(used, 0.0), spec, max_ratio)
    value, by_l, by_c = ((weight * x).where(used, 0.0) for x in term)
    if spec.kind == "soft_ce":  # and the entropy within the teacher's tail
        value = value - (weight * log_pi).where(used, 0.0)
    all_c = by_c.sum(-1, keepdim=True)
    return _Row(value.sum(-1), -all_c, all_c - by_l.sum(-1, keepdim=True), by_l)


def _without_kept(z: Tensor, ids: Tensor) -> Tensor:
    """Set the entries of z [rows, V] at ids [rows, K] to -inf in place; ids < 0 are padding."""
    if ids.shape[-1] == 0:
        return z
    first = z[:, :1].clone()
    largest = ids.amax(-1, keepdim=True)  # stands in for padding, or 0 where all is padding
    index = torch.where(ids < 0, largest, ids).clamp_min(0)
    z.scatter_(-1, index, -math.inf)
    z[:, :1] = torch.where(largest < 0, first, z[:, :1])
    return z


def add_tail_correction(
    student: Tensor,
    kept: Tensor,
    draws: TailDraws,
    weights: Tensor,
    spec: DivergenceSpec,
    max_ratio: float,
    loss: Tensor,
    grad: Tensor | None,
) -> None:
    """Add the correction by draws, scaled as the spec says, in place.

    Args:
        student: logits [N, V].
        kept: [N, K] int64, the entries outside the tail; those below 0 are padding.
        draws: from the tail.
        weights: [N]; they weigh the gradient, and a row of weight 0 is left out: skipped on a CPU,
            and computed in vain elsewhere, where the host does not know which rows these are.
        spec: resolved; its clip is not applied.
        max_ratio: >= 1, inf for no bound.
        loss: [N], added to unweighted.
        grad: [N, V] in the dtype of `student`, or None.
    """
    vocab, dtype = student.shape[-1], loss.dtype
    skips = may_ask(weights)
    blocks = RowBlocks(student, weights if skips else None, vocab)
    buffer = student.new_empty(min(blocks.step, blocks.num_rows), vocab, dtype=dtype)
    for at in blocks:
        rows = student[at]
        z = buffer[: len(rows)].copy_(rows).mul_(1 / spec.temperature)
        ids, mine, absent = kept[at], draws.of(at), (weights[at] == 0)[:, None]
        if not skips:
            z.masked_fill_(absent, 0.0)  # it may be infinite
        inside = z.gather(-1, ids.clamp_min(0)).masked_fill_(ids < 0, -math.inf)
        drawn = z.gather(-1, mine.ids.clamp_min(0))
        largest = _without_kept(z, ids).amax(-1, keepdim=True)
        largest.masked_fill_(largest == -math.inf, 0.0)
        mass = z.sub_(largest).exp_().sum(-1, keepdim=True)
        tail = mass.log().add_(largest)
        total = torch.cat([inside, tail], dim=-1).logsumexp(-1, keepdim=True)
        row = _correction(mine, drawn - tail, tail - total, spec, max_ratio)
        loss[at] += (spec.scale * row.value).masked_fill(absent[:, 0], 0.0).to(dtype)
        if grad is None:
            continue
        factor = weights[at].to(row.value.dtype)[:, None] * (spec.scale / spec.temperature)
        softmax, on_tail, on_draws = (factor * x for x in row[1:])
        on_tail = on_tail + softmax * (tail - total).exp()
        z.mul_(torch.where(mass > 0, on_tail / mass, 0.0).to(dtype))
        z.scatter_add_(-1, mine.ids.clamp_min(0), on_draws.to(dtype))
        q = (inside - total).exp() * softmax
        z.scatter_add_(-1, ids.clamp_min(0), q.to(dtype))
        if isinstance(at, Tensor):
            grad.index_copy_(0, at, (grad[at] + z).to(grad.dtype))  # rounded once, as below
        else:
            grad[at].add_(z)
