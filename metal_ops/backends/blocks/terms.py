"""Computes the terms of every divergence, exactly also where p and q nearly agree.

With f the entries of the sum and h = d f / d log q, a row's loss is sum(f) and its gradient for
student logit k is (h_k - q_k sum(h)) / temperature. The terms take no difference of nearly equal
numbers, and nothing overflows; -inf logits on either side are legal.

torch.compile traces them too, for float32. Where a compiled loop has a cheaper way to an elementary
function than a sequence of operators has, the function asks whether it is `_traced`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec

Number = float | Tensor  # a tensor [] where a graph must serve every value
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")  # functions of p and q, without their logs


class Probabilities(NamedTuple):
    """Holds a block of rows, each [rows, V], normalised; the logs may be empty for MIXTURES."""

    p: Tensor
    q: Tensor
    log_q: Tensor
    log_ratio: Tensor  # log p - log q, not the rounded difference of the two


class Mix(NamedTuple):
    """Holds the beta of a spec, and 1 - beta."""

    beta: Number
    rest: Number

    @staticmethod
    def of(spec: DivergenceSpec) -> "Mix":
        """Take the spec's."""
        return Mix(spec.beta, 1 - spec.beta)


class Terms(NamedTuple):
    """Holds f, what may be added to it, and h = d f / d log q.

    sum(f) = sum(f + zero), where the sum of `zero` vanishes on normalised rows and f + zero is
    small where p and q agree. A multiple of q in h has no effect on the gradient of a whole sum
    and is left out, unless terms were asked for `whole`: where only some of them count.
    """

    f: Tensor
    zero: Tensor | None
    h: Tensor


def _traced() -> bool:
    return torch.compiler.is_compiling()


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight * value with 0 * anything = 0; a NaN weight stays."""
    return (weight * value).masked_fill_(weight == 0, 0.0)


def _expm1_series(x: Tensor) -> Tensor:
    """Compute exp(x) - 1 for |x| <= 1/2, to float32's last digit."""
    series = x * (1 / 40320) + 1 / 5040
    series = (series * x + 1 / 720) * x + 1 / 120
    return (((series * x + 1 / 24) * x + 1 / 6) * x + 1 / 2) * x * x + x


def _expm1(x: Tensor) -> Tensor:
    if _traced():
        return torch.where(x.abs() <= 0.5, _expm1_series(x), x.exp() - 1)
    return torch.expm1(x)


def _difference(row: Probabilities) -> Tensor:
    """Compute q - p from the logarithm of their ratio."""
    d = row.log_ratio
    if _traced():
        return torch.where(d.abs() <= 0.5, row.p * _expm1_series(-d), row.q - row.p)
    return torch.expm1(d.abs().neg_()).copysign_(d.neg()).mul_(torch.maximum(row.p, row.q))


def _over(a: Tensor, m: Tensor) -> Tensor:
    """Compute a / m; in a graph by 1 / m, of which several quotients need one."""
    return a * m.reciprocal() if _traced() else a / m


def _log_share(a: Tensor, m: Tensor, excess: Tensor) -> Tensor:
    """Compute log(a / m), given excess = a / m - 1: from it where they agree, else from a / m."""
    info = torch.finfo(a.dtype)
    if _traced():
        near = excess.abs() <= 0.5
        share = torch.where(near, 1 + excess, _over(a, m).clamp_min(info.tiny))
        rounded_away = torch.where(near, excess - (share - 1), 0.0)
        return share.log() + rounded_away * (2 - share)  # 2 - share: 1 / share near 1
    far = (a / m).clamp_min_(info.tiny).log_()
    return torch.where(excess < -0.5, far, excess.clamp_min(-0.5).log1p_())


def _mixture(a: Tensor, b: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Return m = beta a + (1 - beta) b, and (a - b) / m, with 0 / 0 = 0."""
    info = torch.finfo(a.dtype)
    least = info.tiny * info.eps  # above zero
    if _traced():
        least = info.tiny  # of which 1 / m is finite
    m = (a * mix.beta).add_(b * mix.rest).clamp_min_(least)
    return m, _over(a - b, m)


def _kl(row: Probabilities, kind: str, share: Mix, whole: bool) -> Terms:
    """Compute KL(p || q), KL(q || p), or a share of the first and the rest of the other."""
    difference = _difference(row)
    # where one side is zero log_ratio is infinite: so is its KL, if the other side is not
    forward_h = -row.p if whole else difference
    if kind == "forward_kl":
        return Terms(_times(row.p, row.log_ratio), difference, forward_h)
    reverse = _times(row.q, row.log_ratio.neg())
    reverse_h = reverse + row.q if whole else reverse
    if kind == "reverse_kl":
        return Terms(reverse, difference.neg(), reverse_h)
    f = _times(row.p, row.log_ratio).mul_(share.beta).add_(reverse * share.rest)
    h = (forward_h * share.beta).add_(reverse_h * share.rest)
    return Terms(f, difference * (share.beta - share.rest), h)


def _jsd(row: Probabilities, mix: Mix) -> Terms:
    m, relative = _mixture(row.p, row.q, mix)
    h = _log_share(row.q, m, relative * -mix.beta).mul_(row.q).mul_(mix.rest)
    f = _log_share(row.p, m, relative.mul_(mix.rest)).mul_(row.p).mul_(mix.beta)
    return Terms(f.add_(h), None, h)


def _skew_kl(row: Probabilities, mix: Mix, whole: bool) -> Terms:
    m, relative = _mixture(row.p, row.q, mix)
    f = _log_share(row.p, m, relative * mix.rest).mul_(row.p)
    if whole:
        h = _over(row.p, m).mul_(row.q).mul_(-mix.rest)
    else:
        h = relative.mul_(row.q).mul_(-(mix.rest**2))
    return Terms(f, (row.q - row.p).mul_(mix.rest), h)


def _skew_reverse_kl(row: Probabilities, mix: Mix, whole: bool) -> Terms:
    m, relative = _mixture(row.q, row.p, mix)
    f = _log_share(row.q, m, relative * mix.rest).mul_(row.q)
    if whole:
        h = _over(row.p, m).mul_(row.q).mul_(mix.rest).add_(f)
    else:
        h = relative.mul_(row.q).mul_(-mix.beta * mix.rest).add_(f)
    return Terms(f, (row.p - row.q).mul_(mix.rest), h)


def _alpha(row: Probabilities, mix: Mix) -> Terms:
    """Compute f = (a p + (1 - a) q - g) / (a (1 - a)), h = (q - g) / a with g = p^a q^(1-a)."""
    order, rest = (x if isinstance(x, Tensor) else row.p.new_tensor(x) for x in mix)
    far = row.log_ratio.abs().neg_()
    power = torch.where(row.log_ratio > 0, rest, order)
    larger = torch.maximum(row.p, row.q)
    near, exponent = far > -1, far * power
    # nearby, all three less the larger of p and q
    g = exponent.exp().mul_(larger)
    less_g, less = _expm1(exponent), _expm1(far)
    f = (power * less).sub_(less_g).mul_(larger)
    f = torch.where(near, f, order * row.p + rest * row.q - g)
    h = torch.where(row.log_ratio > 0, less, 0.0).sub_(less_g).mul_(larger)
    h = torch.where(near, h, row.q - g)
    return Terms(f.div_(order * rest), None, h.div_(order))


def terms(row: Probabilities, kind: str, mix: Mix, whole: bool) -> Terms:
    """Compute the terms of a resolved spec's kind for a block of rows."""
    if kind in ("forward_kl", "reverse_kl", "mixed_kl"):
        return _kl(row, kind, mix, whole)
    if kind == "soft_ce":
        h = -row.p if whole else _difference(row)
        return Terms(_times(row.p, row.log_q.neg()), None, h)
    if kind == "tvd":
        difference = _difference(row)
        h = difference.sign().mul_(row.q).mul_(0.5)
        h = torch.where(difference.isnan(), difference, h)  # of which the sign is 0
        return Terms(difference.abs_().mul_(0.5), None, h)
    if kind == "jsd":
        return _jsd(row, mix)
    if kind == "skew_kl":
        return _skew_kl(row, mix, whole)
    if kind == "skew_reverse_kl":
        return _skew_reverse_kl(row, mix, whole)
    return _alpha(row, mix)
