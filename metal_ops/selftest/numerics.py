"""Compare an op with float64, with a tolerance taken from the arithmetic.

The reference works on probabilities (the mixture is beta p + (1 - beta) q, then its log), so that
it shares no formula with the ops. p is the teacher, q the student, both at the spec's temperature.
N tokens, V vocabulary; categories are the entries that count and perhaps the mass of the rest.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import DivergenceSpec, SparseTeacher

# Rounding errors per term, in units of eps (1 + x_max) magnitude. Largest needed on a CPU, over
# all dtypes, shapes, kinds and supports of test_values.py and test_grid.py in tests: randn 3.7,
# near 2.5, peaked 1.7, planted 1.1, huge 0.7, shifted 1.3, 151 936 columns 3.5; linear_divergence
# 1.8; the variants in test_numerics.py 3.7. (The total variation reaches C where a sign is
# undecided: there the magnitude allows the whole jump.) The rest is room for other vector units
# and for exponentials that are wrong by a few ulp.
C = 6.0

comparisons = 0  # calls of assert_matches_reference that compared something, in this process


class Exact(NamedTuple):
    """Holds float64. Magnitudes are the formulas with every term replaced by its absolute value."""

    loss: Tensor  # [N]
    grad: Tensor  # [N, V], of the student logits, for an upstream gradient of one
    loss_magnitude: Tensor
    grad_magnitude: Tensor
    x_max: Tensor  # [N], largest finite |logit| / temperature: exp makes its error a relative one


class Terms(NamedTuple):
    """Holds by category f, whose sum is the divergence, h = d f / d log q, and both magnitudes."""

    f: Tensor
    h: Tensor
    f_magnitude: Tensor
    h_magnitude: Tensor

    def plus(self, other: "Terms", share: float) -> "Terms":
        """Mix a share of this with the rest of the other."""
        return Terms(*(share * x + (1 - share) * y for x, y in zip(self, other, strict=True)))


class Sides(NamedTuple):
    """Holds both sides by category."""

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor
    p_: Tensor  # for magnitudes: a probability below the normal numbers may come out as zero
    q_: Tensor
    slack: Tensor  # [N, 1], the relative error that the rule allows a probability
    whole: bool  # whether p and q each sum to one

    @staticmethod
    def of(
        log_p: Tensor, log_q: Tensor, x_max: Tensor, dtype: torch.dtype, whole: bool = True
    ) -> "Sides":
        """Make both sides from log-probabilities, with what the rule allows them."""
        info = _precision(dtype)
        tiny = info.tiny / info.eps
        # behind -inf a probability is exactly zero
        p_, q_ = (torch.where(x.isfinite(), x.exp() + tiny, 0.0) for x in (log_p, log_q))
        slack = C * (1 + x_max[:, None]) * info.eps
        return Sides(log_p, log_q, log_p.exp(), log_q.exp(), p_, q_, slack, whole)


def _precision(dtype: torch.dtype) -> torch.finfo:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Return float64 log-probabilities, by the log-sum-exp."""
    x = logits.double() / temperature
    return x - x.logsumexp(-1, keepdim=True)


def _weigh(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * value)


def _size(log: Tensor) -> Tensor:
    return torch.where(log.isfinite(), log.abs(), 0.0)


def _log_mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return (beta * p + (1 - beta) * q).clamp_min(torch.finfo(torch.float64).tiny).log()


# Each KL is that of possibly unnormalised sides, sum p log (p / m) - p + m: what is added is zero
# in the sum, and part of the magnitude.


def _from_teacher(x: Sides, skew: float) -> Terms:
    """Compute KL(p || m), m = skew p + (1 - skew) q."""
    log_m = _log_mixture(x.p, x.q, skew) if skew else x.log_q
    share = (1 - skew) * _weigh(x.q, (-log_m).exp()) if skew else torch.ones_like(x.q)
    size = _weigh(x.p_, _size(x.log_p) + _size(log_m)) + (1 + skew) * x.p_ + (1 - skew) * x.q_
    h_size = x.p_ * share
    if skew and x.whole:  # with the derivative of m: the form that is exact near p = q
        h_size = h_size + (1 - skew) * x.q_
    return Terms(_weigh(x.p, x.log_p - log_m), -x.p * share, size, h_size)


def _from_student(x: Sides, skew: float) -> Terms:
    """Compute KL(q || m), m = (1 - skew) p + skew q."""
    log_m = _log_mixture(x.q, x.p, skew) if skew else x.log_p
    share = skew * _weigh(x.q, (-log_m).exp()) if skew else torch.zeros_like(x.q)
    f, logs = _weigh(x.q, x.log_q - log_m), _size(x.log_q) + _size(log_m)
    size = _weigh(x.q_, logs) + (1 + skew) * x.q_ + (1 - skew) * x.p_
    return Terms(f, f + x.q - x.q * share, size, _weigh(x.q_, logs + 1 + share))


def _jsd(x: Sides, beta: float) -> Terms:
    log_m, logs = _log_mixture(x.p, x.q, beta), _size(x.log_p) + _size(x.log_q)
    logs = logs - math.log(beta) - math.log1p(-beta)
    h = (1 - beta) * _weigh(x.q, x.log_q - log_m)
    h_size = (1 - beta) * _weigh(x.q_, logs)
    size = beta * _weigh(x.p_, logs) + h_size
    return Terms(beta * _weigh(x.p, x.log_p - log_m) + h, h, size, h_size)


def _soft_ce(x: Sides, beta: float) -> Terms:
    return Terms(_weigh(x.p, -x.log_q), -x.p, _weigh(x.p_, _size(x.log_q) + 1), x.p_)


def _tvd(x: Sides, beta: float) -> Terms:
    # The sign of a difference below rounding is anyone's guess: there the slope may be off by q.
    unsure = (x.p - x.q).abs() <= x.slack * (x.p_ + x.q_)
    jump = torch.where(unsure, x.q_ / x.slack, 0.0)
    f, h = (x.p - x.q).abs() / 2, x.q * (x.q - x.p).sign() / 2
    return Terms(f, h, (x.p_ + x.q_) / 2, x.q_ / 2 + jump)


def _alpha(x: Sides, beta: float) -> Terms:
    between = (beta * x.log_p + (1 - beta) * x.log_q).exp()
    arithmetic, size = (beta * p + (1 - beta) * q for p, q in ((x.p, x.q), (x.p_, x.q_)))
    both = beta * (1 - beta)
    f, h = (arithmetic - between) / both, (x.q - between) / beta
    return Terms(f, h, (size + between) / both, (x.q_ + between) / beta)


KINDS: dict[str, Callable[[Sides, float], Terms]] = {
    "forward_kl": lambda x, beta: _from_teacher(x, 0.0),
    "reverse_kl": lambda x, beta: _from_student(x, 0.0),
    "jsd": _jsd,
    "soft_ce": _soft_ce,
    "tvd": _tvd,
    "skew_kl": _from_teacher,
    "skew_reverse_kl": _from_student,
    "mixed_kl": lambda x, beta: _from_teacher(x, 0.0).plus(_from_student(x, 0.0), beta),
    "alpha": _alpha,
}
# what stands for a kind at an end of beta where its formula is zero, 0 / 0 or 0 * inf
FORWARD_END = {("jsd", 0.0), ("mixed_kl", 1.0), ("alpha", 1.0)}
REVERSE_END = {("jsd", 1.0), ("mixed_kl", 0.0), ("alpha", 0.0)}


def terms(x: Sides, spec: DivergenceSpec) -> Terms:
    """Compute the terms of a spec's kind, at the ends of beta those of the KL it stands for."""
    kind = spec.kind
    if (kind, spec.beta) in FORWARD_END:
        kind = "forward_kl"
    if (kind, spec.beta) in REVERSE_END:
        kind = "reverse_kl"
    return KINDS[kind](x, spec.beta)


def _top(x: Tensor, k: int) -> Tensor:
    k = min(k, x.shape[-1])
    kept = x >= x.sort(dim=-1, descending=True).values[:, k - 1 : k]
    assert (kept.sum(-1) == k).all(), "entries tie for the last place: inputs.untied parts them"
    return kept


def support(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor | None:
    """Mark the entries that count: [N, V] bool, or None for all."""
    if spec.support == "full":
        return None
    k = spec.top_k or 0
    if spec.support == "union":
        return _top(teacher, k) | _top(student, k)
    return _top(teacher if spec.support == "teacher_topk" else student, k)


def restrict(log_p: Tensor, kept: Tensor | None, missing: str) -> Tensor:
    """Restrict [N, V] to the categories: [N, V], or [N, V + 1] with the tail last."""
    if kept is None:
        return log_p
    inside = log_p.masked_fill(~kept, -math.inf)
    if missing == "tail":
        tail = log_p.masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([inside, tail], -1)
    return inside if missing == "zero" else inside - inside.logsumexp(-1, keepdim=True)


def entries(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """Return the terms of the sum by category, differentiable where both sides are positive."""
    kept = support(student.detach(), teacher, spec)
    # renormalising makes up for a normalisation left out, which would leave rounding outside
    logs = [
        x.double() / spec.temperature
        if kept is not None and spec.missing == "renormalise"
        else log_probs(x, spec.temperature)
        for x in (teacher, student)
    ]
    log_p, log_q = (restrict(x, kept, spec.missing) for x in logs)
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    x = Sides.of(log_p, log_q, log_q.new_zeros(len(student)), student.dtype)
    return terms(x, spec).f.masked_fill(absent, 0.0)


def definition(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """Compute what a spec means, [N] float64, with clip and temperature scaling; for autograd."""
    scale = spec.temperature**2 if spec.temperature_scaling == "t2" else 1.0
    f = entries(student, teacher.detach(), spec)
    if spec.clip is None:
        return scale * f.sum(-1)
    if spec.clip_level == "vocab_entry":
        return scale * torch.where(f > spec.clip, spec.clip, f).sum(-1)
    loss = f.sum(-1)
    over = loss.detach() > spec.clip
    if spec.clip_level == "token":
        return scale * torch.where(over, spec.clip, loss)
    return scale * torch.where(over, loss * (spec.clip / loss.detach()), loss)


def _largest(x: Tensor) -> Tensor:
    x = _size(x.double())
    return x.amax(-1) if x.shape[-1] else x.new_zeros(len(x))


def _exact(
    student: Tensor, log_p: Tensor, kept: Tensor | None, x_max: Tensor, spec: DivergenceSpec
) -> Exact:
    """Compute `exact` from the teacher's categories; legal where p or q is zero."""
    assert spec.clip is None
    log_q_all = log_probs(student, spec.temperature)
    log_q = restrict(log_q_all, kept, spec.missing)
    whole = kept is None or spec.missing != "zero"
    x = Sides.of(log_p, log_q, x_max, student.dtype, whole)
    f, h, f_size, h_size = terms(x, spec)
    # d log q / d logit_k is 1 at entry k, less q_k everywhere: q of the softmax that was taken
    inside = slice(0, student.shape[-1])
    y = x if spec.missing == "renormalise" else Sides.of(log_q_all, log_q_all, x_max, student.dtype)
    grad = h[:, inside] - y.q * h.sum(-1, keepdim=True)
    size = h_size[:, inside] + y.q_ * h_size.sum(-1, keepdim=True)
    if kept is not None and spec.missing == "tail":
        share = (log_q_all - log_q[:, -1:]).exp().masked_fill(kept | log_q_all.isinf(), 0.0)
        grad, size = grad + share * h[:, -1:], size + share * h_size[:, -1:]
    # a device may flush what is smaller than the normal numbers, not only a probability
    flushed = _precision(student.dtype).tiny / _precision(student.dtype).eps
    size, f_size = size + flushed, f_size.sum(-1) + flushed
    scale = spec.temperature**2 if spec.temperature_scaling == "t2" else 1.0
    grad_scale = scale / spec.temperature
    return Exact(scale * f.sum(-1), grad_scale * grad, scale * f_size, grad_scale * size, x_max)


def exact(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Exact:
    """Compute value and gradient of a spec without clip, in closed form; p or q may be zero."""
    kept = support(student, teacher, spec)
    x_max = torch.maximum(_largest(student), _largest(teacher)) / spec.temperature
    log_p = restrict(log_probs(teacher, spec.temperature), kept, spec.missing)
    return _exact(student, log_p, kept, x_max, spec)


def exact_sparse(student: Tensor, teacher: SparseTeacher, spec: DivergenceSpec) -> Exact:
    """Compute `exact` for a teacher known at a few entries, all of which count."""
    rows, columns = (teacher.ids >= 0).nonzero(as_tuple=True)
    log_p = torch.full(student.shape, -math.inf, dtype=torch.float64)
    log_p[rows, teacher.ids[rows, columns]] = teacher.log_probs[rows, columns].double()
    kept = torch.zeros(student.shape, dtype=torch.bool)
    kept[rows, teacher.ids[rows, columns]] = True
    x_max = torch.maximum(_largest(student) / spec.temperature, _largest(teacher.log_probs))
    if spec.missing == "tail":
        log_p = torch.cat([log_p, teacher.log_tail.double()[:, None]], -1)
        x_max = torch.maximum(x_max, _size(teacher.log_tail.double()))
    if spec.missing == "renormalise":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    return _exact(student, log_p, kept, x_max, spec)


def unit_upstream(want: Exact, dtype: torch.dtype) -> Tensor:
    """Return the upstream gradient [N] that lets each row of the gradient peak at one.

    A row that is nothing but cancellation stays small, and one that underflows stays as it is.
    """
    peak = torch.maximum(want.grad.abs(), 2.0**-24 * want.grad_magnitude).amax(-1)
    return torch.where(peak > 2.0**-60, 1 / peak, 1.0).to(dtype)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of `dtype` at |x|, subnormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().double()).exponent - 1
    spacing = torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent)
    return torch.where(x == 0, 0.0, spacing).clamp_min(info.smallest_normal * info.eps)


def sum_roundings(terms: int) -> float:
    """Return how many eps of the sum of absolute values a running sum may be off by.

    Each addition rounds by eps / 2 at most, and the independent roundings of n additions grow like
    sqrt(n), of which three times makes more improbable (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", 2019). Twice that, since small terms that meet a large
    sum all round the same way. Libraries add wide products in parts; a product of a few rows by a
    few columns is one running sum: 151 936 terms were found off by 2.5 sqrt(n) eps / 2.
    """
    return 3.0 * math.sqrt(terms)


def needed_c(
    actual: Tensor, expected: Tensor, magnitude: Tensor, x_max: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return per element the smallest c with which the rule accepts it; inf if none does."""
    eps = _precision(dtype).eps
    x_max = x_max.reshape(x_max.shape + (1,) * (expected.ndim - x_max.ndim))
    excess = (actual.double() - expected).abs() - ulp(expected, dtype)
    needed = torch.where(excess <= 0, 0.0, excess / ((1 + x_max) * eps * magnitude))
    return torch.where(actual.isfinite(), needed, math.inf)


def assert_matches_reference(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    x_max: Tensor,
    dtype: torch.dtype,
    context: object = "",
) -> None:
    """Assert |actual - expected| <= ulp(dtype, expected) + C (1 + x_max) eps magnitude everywhere.

    Args:
        actual: what the op returned, of type `dtype`.
        expected: float64.
        magnitude: float64, the formula of `expected` with each term's absolute value.
        x_max: one number a row, the largest |logit| / temperature.
        dtype: of the output; eps is that of float64 for float64, else that of float32.
        context: named in the failure.
    """
    assert actual.dtype == dtype, f"{context}: {actual.dtype}, want {dtype}"
    assert actual.shape == expected.shape, f"{context}: {actual.shape}, want {expected.shape}"
    if actual.numel() == 0:
        return
    global comparisons
    comparisons += 1
    needed = needed_c(actual, expected, magnitude, x_max, dtype)
    worst = int(needed.argmax())
    assert bool((needed <= C).all()), (
        f"{context}: element {worst} of {tuple(actual.shape)} is {actual.flatten()[worst]:.9g}, "
        f"want {expected.flatten()[worst]:.9g}; needs c = {needed.flatten()[worst]:.3g} > {C}"
    )
