"""Computes the terms of every divergence, exactly also where p and q nearly agree.

With f the entries of the sum and h = d f / d log q, a row's loss is sum(f) and its gradient for
student logit k is (h_k - q_k sum(h)) / temperature. The terms take no difference of nearly equal
numbers, and nothing overflows; -inf logits on either side are legal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec

MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")  # functions of p and q, without their logs


class Probabilities(NamedTuple):
    """Holds a block of rows, each [rows, V], normalised; the logs may be empty for MIXTURES."""

    p: Tensor
    q: Tensor
    log_q: Tensor
    log_ratio: Tensor  # log p - log q, not the rounded difference of the two


class Terms(NamedTuple):
    """Holds f, what may be added to it, and h = d f / d log q.

    sum(f) = sum(f + zero), where the sum of `zero` vanishes on normalised rows and f + zero is
    small where p and q agree. A multiple of q in h has no effect on the gradient of a whole sum
    and is left out, unless terms were asked for `whole`: where only some of them count.
    """

    f: Tensor
    zero: Tensor | None
    h: Tensor


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight * value with 0 * anything = 0; a NaN weight stays."""
    return (weight * value).masked_fill_(weight == 0, 0.0)


def _difference(row: Probabilities) -> Tensor:
    """Compute q - p from the logarithm of their ratio."""
    d = row.log_ratio
    return torch.expm1(d.abs().neg_()).copysign_(d.neg()).mul_(torch.maximum(row.p, row.q))


def _log_share(a: Tensor, m: Tensor, excess: Tensor) -> Tensor:
    """Compute log(a / m), given excess = a / m - 1: from it where they agree, else from a / m."""
    info = torch.finfo(a.dtype)
    far = (a / m).clamp_min_(info.tiny).log_()
    return torch.where(excess < -0.5, far, excess.clamp_min(-0.5).log1p_())


def _mixture(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return m = beta a + (1 - beta) b, and (a - b) / m, with 0 / 0 = 0."""
    info = torch.finfo(a.dtype)
    m = (a * beta).add_(b * (1 - beta)).clamp_min_(info.tiny * info.eps)  # the least above zero
    return m, (a - b).div_(m)


def _kl(row: Probabilities, share: float, whole: bool) -> Terms:
    """Compute share * KL(p || q) + (1 - share) * KL(q || p)."""
    difference = _difference(row)
    # where one side is zero log_ratio is infinite: so is its KL, if the other side is not
    forward_h = -row.p if whole else difference
    if share == 1.0:
        return Terms(_times(row.p, row.log_ratio), difference, forward_h)
    reverse = _times(row.q, row.log_ratio.neg())
    reverse_h = reverse + row.q if whole else reverse
    if share == 0.0:
        return Terms(reverse, difference.neg(), reverse_h)
    f = _times(row.p, row.log_ratio).mul_(share).add_(reverse, alpha=1 - share)
    h = (forward_h * share).add_(reverse_h, alpha=1 - share)
    return Terms(f, difference * (2 * share - 1), h)


def _jsd(row: Probabilities, beta: float) -> Terms:
    m, relative = _mixture(row.p, row.q, beta)
    h = _log_share(row.q, m, relative * -beta).mul_(row.q).mul_(1 - beta)
    f = _log_share(row.p, m, relative.mul_(1 - beta)).mul_(row.p).mul_(beta)
    return Terms(f.add_(h), None, h)


def _skew_kl(row: Probabilities, beta: float, whole: bool) -> Terms:
    m, relative = _mixture(row.p, row.q, beta)
    f = _log_share(row.p, m, relative * (1 - beta)).mul_(row.p)
    if whole:
        h = (row.p / m).mul_(row.q).mul_(beta - 1)
    else:
        h = relative.mul_(row.q).mul_(-((1 - beta) ** 2))
    return Terms(f, (row.q - row.p).mul_(1 - beta), h)


def _skew_reverse_kl(row: Probabilities, beta: float, whole: bool) -> Terms:
    m, relative = _mixture(row.q, row.p, beta)
    f = _log_share(row.q, m, relative * (1 - beta)).mul_(row.q)
    if whole:
        h = (row.p / m).mul_(row.q).mul_(1 - beta).add_(f)
    else:
        h = relative.mul_(row.q).mul_(-beta * (1 - beta)).add_(f)
    return Terms(f, (row.p - row.q).mul_(1 - beta), h)


def _alpha(row: Probabilities, order: float) -> Terms:
    """Compute f = (a p + (1 - a) q - g) / (a (1 - a)), h = (q - g) / a with g = p^a q^(1-a)."""
    far = row.log_ratio.abs().neg_()
    powers = far.new_tensor([1 - order, order])
    power = torch.where(row.log_ratio > 0, *powers)
    larger = torch.maximum(row.p, row.q)
    near, exponent = far > -1, far * power
    # nearby, all three less the larger of p and q
    g = exponent.exp().mul_(larger)
    less_g, less = exponent.expm1_(), far.expm1_()
    f = (power * less).sub_(less_g).mul_(larger)
    f = torch.where(near, f, order * row.p + (1 - order) * row.q - g)
    h = torch.where(row.log_ratio > 0, less, 0.0).sub_(less_g).mul_(larger)
    h = torch.where(near, h, row.q - g)
    return Terms(f.div_(order * (1 - order)), None, h.div_(order))


def terms(row: Probabilities, spec: DivergenceSpec, whole: bool) -> Terms:
    """Compute the terms of a resolved spec's kind for a block of rows."""
    kind, beta = spec.kind, spec.beta
    if kind in ("forward_kl", "reverse_kl", "mixed_kl"):
        return _kl(row, {"forward_kl": 1.0, "reverse_kl": 0.0}.get(kind, beta), whole)
    if kind == "soft_ce":
        h = -row.p if whole else _difference(row)
        return Terms(_times(row.p, row.log_q.neg()), None, h)
    if kind == "tvd":
        difference = _difference(row)
        h = difference.sign().mul_(row.q).mul_(0.5)
        h = torch.where(difference.isnan(), difference, h)  # of which the sign is 0
        return Terms(difference.abs_().mul_(0.5), None, h)
    if kind == "jsd":
        return _jsd(row, beta)
    if kind == "skew_kl":
        return _skew_kl(row, beta, whole)
    if kind == "skew_reverse_kl":
        return _skew_reverse_kl(row, beta, whole)
    return _alpha(row, beta)
