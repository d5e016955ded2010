"""Compare an op with float64, with a tolerance taken from the arithmetic.

The reference works on probabilities (the mixture is beta p + (1 - beta) q, then its log), so that
it shares no formula with the ops. p is the teacher, q the student, both at the spec's temperature.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import DivergenceSpec

# Rounding errors per term, in units of eps (1 + x_max) magnitude. Largest needed on a CPU, over
# all dtypes, shapes and kinds of ops/test_values.py: randn 3.5, peaked 1.4, planted 1.1, near 1.5,
# huge 0.7, 151 936 columns 3.5; linear_divergence 1.2; the variants in test_numerics.py 2.1. The
# rest is room for other vector units and for exponentials that are wrong by a few ulp.
C = 6.0


class Exact(NamedTuple):
    """Float64. Magnitudes are the formulas with every term replaced by its absolute value."""

    loss: Tensor  # [N]
    grad: Tensor  # [N, V], of the student logits, for an upstream gradient of one
    loss_magnitude: Tensor
    grad_magnitude: Tensor
    x_max: Tensor  # [N], largest finite |logit| / temperature: exp makes its error a relative one


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    x = logits.double() / temperature
    return x - x.logsumexp(-1, keepdim=True)


def _weigh(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * value)


def _log_mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return (beta * p + (1 - beta) * q).clamp_min(torch.finfo(torch.float64).tiny).log()


def entries(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """The terms of the sum over the vocabulary, differentiable where both sides are positive."""
    log_p, log_q = log_probs(teacher, spec.temperature), log_probs(student, spec.temperature)
    p, q = log_p.exp(), log_q.exp()
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": spec.beta}[spec.kind]
    if beta == 0.0:
        return _weigh(p, log_p - log_q)
    if beta == 1.0:
        return _weigh(q, log_q - log_p)
    log_m = _log_mixture(p, q, beta)
    return beta * _weigh(p, log_p - log_m) + (1 - beta) * _weigh(q, log_q - log_m)


def definition(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """What a spec means, [N] float64, clipping and temperature scaling included; for autograd."""
    scale = spec.temperature**2 if spec.temperature_scaling == "t2" else 1.0
    terms = entries(student, teacher.detach(), spec)
    if spec.clip is None:
        return scale * terms.sum(-1)
    if spec.clip_level == "vocab_entry":
        return scale * torch.where(terms > spec.clip, spec.clip, terms).sum(-1)
    loss = terms.sum(-1)
    over = loss.detach() > spec.clip
    if spec.clip_level == "token":
        return scale * torch.where(over, spec.clip, loss)
    return scale * torch.where(over, loss * (spec.clip / loss.detach()), loss)


def exact(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Exact:
    """Value and gradient of a spec without clip, in closed form; legal where p or q is zero."""
    assert spec.clip is None
    log_p, log_q = log_probs(teacher, spec.temperature), log_probs(student, spec.temperature)
    p, q = log_p.exp(), log_q.exp()
    f = entries(student, teacher, spec)
    # a probability below the normal numbers may come out as zero; behind -inf it is exactly zero
    info = torch.finfo(torch.float64 if student.dtype == torch.float64 else torch.float32)
    tiny = info.tiny / info.eps
    p_, q_ = (torch.where(x.isfinite(), x.exp() + tiny, 0.0) for x in (log_p, log_q))
    both = torch.where(log_p.isfinite(), log_p.abs(), 0.0)
    both = both + torch.where(log_q.isfinite(), log_q.abs(), 0.0)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": spec.beta}[spec.kind]
    if beta == 0.0:
        h, h_magnitude = -p, p_
        f_magnitude = _weigh(p_, both) + p_ + q_
    elif beta == 1.0:
        h, h_magnitude = f + q, _weigh(q_, both + 1)
        f_magnitude = _weigh(q_, both) + p_ + q_
    else:
        log_m = _log_mixture(p, q, beta)
        constants = -math.log(beta) - math.log1p(-beta)
        h = (1 - beta) * _weigh(q, log_q - log_m)
        h_magnitude = (1 - beta) * _weigh(q_, both + constants)
        f_magnitude = beta * _weigh(p_, both + constants) + h_magnitude
    scale = spec.temperature**2 if spec.temperature_scaling == "t2" else 1.0
    grad_scale = scale / spec.temperature
    largest = [
        torch.where(x.isfinite(), x.double().abs(), 0.0).amax(-1) for x in (student, teacher)
    ]
    return Exact(
        scale * f.sum(-1),
        grad_scale * (h - q * h.sum(-1, keepdim=True)),
        scale * f_magnitude.sum(-1),
        grad_scale * (h_magnitude + q_ * h_magnitude.sum(-1, keepdim=True)),
        torch.maximum(*largest) / spec.temperature,
    )


def unit_upstream(want: Exact, dtype: torch.dtype) -> Tensor:
    """[N] upstream gradient that lets each row of the gradient peak at one.

    A row that is nothing but cancellation stays small, and one that underflows stays as it is.
    """
    peak = torch.maximum(want.grad.abs(), 2.0**-24 * want.grad_magnitude).amax(-1)
    return torch.where(peak > 2.0**-60, 1 / peak, 1.0).to(dtype)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at |x|, subnormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().double()).exponent - 1
    spacing = torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent)
    return torch.where(x == 0, 0.0, spacing).clamp_min(info.smallest_normal * info.eps)


def needed_c(
    actual: Tensor, expected: Tensor, magnitude: Tensor, x_max: Tensor, dtype: torch.dtype
) -> Tensor:
    """Per element, the smallest c with which the rule accepts it; inf if none does."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
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
    """|actual - expected| <= ulp(dtype, expected) + C (1 + x_max) eps magnitude, every element.

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
    needed = needed_c(actual, expected, magnitude, x_max, dtype)
    worst = int(needed.argmax())
    assert bool((needed <= C).all()), (
        f"{context}: element {worst} of {tuple(actual.shape)} is {actual.flatten()[worst]:.9g}, "
        f"want {expected.flatten()[worst]:.9g}; needs c = {needed.flatten()[worst]:.3g} > {C}"
    )
