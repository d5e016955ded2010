"""The terms of every divergence from p, q and log p - log q: exact also where p and q nearly agree.

With f the entries of the sum and h = d f / d log q, a row's loss is sum(f) and its gradient for
student logit k is (h_k - q_k sum(h)) / temperature. Written so that no difference of nearly equal
numbers is taken and that nothing overflows; -inf logits on either side are legal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec

MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")  # functions of p and q, without their logs


class Row(NamedTuple):
    """A block of rows, each [rows, V], normalised; the logs may be empty for MIXTURES."""

    p: Tensor
    q: Tensor
    log_q: Tensor
    log_ratio: Tensor  # log p - log q, not the rounded difference of the two


class Terms(NamedTuple):
    """f and h in two parts each.

    sum(f) = sum(f + zero), where the sum of `zero` vanishes on normalised rows and f + zero is
    small where p and q agree. h = d f / d log q = centred + multiple * q; a multiple of q has no
    effect on the gradient of a whole sum, but one on that of a sum some of whose terms are cut.
    """

    f: Tensor
    zero: Tensor | None
    centred: Tensor
    multiple: float


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """Weight * value with 0 * anything = 0; a NaN weight stays."""
    return (weight * value).masked_fill_(weight == 0, 0.0)


def _difference(row: Row) -> Tensor:
    """Q - p, from the logarithm of their ratio."""
    d = row.log_ratio
    return torch.expm1(d.abs().neg_()).copysign_(d.neg()).mul_(torch.maximum(row.p, row.q))


def _log_share(a: Tensor, m: Tensor, excess: Tensor) -> Tensor:
    """log(a / m), given excess = a / m - 1: from it where the two agree, else from the ratio."""
    info = torch.finfo(a.dtype)
    far = (a / m).clamp_min_(info.tiny).log_()
    return torch.where(excess < -0.5, far, excess.clamp_min(-0.5).log1p_())


def _mixture(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """M = beta a + (1 - beta) b, and (a - b) / m, with 0 / 0 = 0."""
    info = torch.finfo(a.dtype)
    m = (a * beta).add_(b * (1 - beta)).clamp_min_(info.tiny * info.eps)  # the least above zero
    return m, (a - b).div_(m)


def _kl(row: Row, share: float) -> Terms:
    """Share KL(p || q) + (1 - share) KL(q || p)."""
    difference = _difference(row)
    # where one side is zero log_ratio is infinite: so is its KL, if the other side is not
    if share == 1.0:
        return Terms(_times(row.p, row.log_ratio), difference, difference, -1.0)
    reverse = _times(row.q, row.log_ratio.neg())
    if share == 0.0:
        return Terms(reverse, difference.neg(), reverse, 1.0)
    f = _times(row.p, row.log_ratio).mul_(share).add_(reverse, alpha=1 - share)
    h = (difference * share).add_(reverse, alpha=1 - share)
    return Terms(f, difference.mul_(2 * share - 1), h, 1 - 2 * share)


def _jsd(row: Row, beta: float) -> Terms:
    m, relative = _mixture(row.p, row.q, beta)
    h = _log_share(row.q, m, relative * -beta).mul_(row.q).mul_(1 - beta)
    f = _log_share(row.p, m, relative.mul_(1 - beta)).mul_(row.p).mul_(beta)
    return Terms(f.add_(h), None, h, 0.0)


def _skew_kl(row: Row, beta: float) -> Terms:
    m, relative = _mixture(row.p, row.q, beta)
    f = _log_share(row.p, m, relative * (1 - beta)).mul_(row.p)
    h = relative.mul_(row.q).mul_(-((1 - beta) ** 2))
    return Terms(f, (row.q - row.p).mul_(1 - beta), h, beta - 1)


def _skew_reverse_kl(row: Row, beta: float) -> Terms:
    m, relative = _mixture(row.q, row.p, beta)
    f = _log_share(row.q, m, relative * (1 - beta)).mul_(row.q)
    h = relative.mul_(row.q).mul_(-beta * (1 - beta)).add_(f)
    return Terms(f, (row.p - row.q).mul_(1 - beta), h, 1 - beta)


def _alpha(row: Row, order: float) -> Terms:
    """F = (a p + (1 - a) q - p^a q^(1-a)) / (a (1 - a)), as a multiple of the larger of p and q."""
    far = row.log_ratio.abs().neg_()
    powers = far.new_tensor([1 - order, order])
    power = torch.where(row.log_ratio > 0, *powers)
    larger = torch.maximum(row.p, row.q)
    geometric = torch.expm1(far * power)
    far.expm1_()
    f = (power * far).sub_(geometric).mul_(larger).div_(order * (1 - order))
    h = torch.where(row.log_ratio > 0, far, 0.0).sub_(geometric).mul_(larger).div_(order)
    return Terms(f, None, h, 0.0)


def terms(row: Row, spec: DivergenceSpec) -> Terms:
    """The terms of a resolved spec's kind for a block of rows."""
    kind, beta = spec.kind, spec.beta
    if kind in ("forward_kl", "reverse_kl", "mixed_kl"):
        return _kl(row, {"forward_kl": 1.0, "reverse_kl": 0.0}.get(kind, beta))
    if kind == "soft_ce":
        return Terms(_times(row.p, row.log_q.neg()), None, _difference(row), -1.0)
    if kind == "tvd":
        difference = _difference(row)
        h = difference.sign().mul_(row.q).mul_(0.5)
        return Terms(difference.abs_().mul_(0.5), None, h, 0.0)
    if kind == "jsd":
        return _jsd(row, beta)
    if kind == "skew_kl":
        return _skew_kl(row, beta)
    if kind == "skew_reverse_kl":
        return _skew_reverse_kl(row, beta)
    return _alpha(row, beta)
