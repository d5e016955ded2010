"""Holds what the public ops share: statistics, checks, and how gradients are asked for."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec


class DivergenceStats(NamedTuple):
    """Holds, per token and without gradient, what the passes over the vocabulary also know.

    Each field is [...] float32 (float64 for float64 input). Entropies are in nats, of the softmax
    at the spec's temperature; top1_agreement is 1 where both sides have the same largest logit;
    clipped is 1 where the spec's clip changed the token.
    """

    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    clipped: Tensor


def named_stats(values: Tensor, wanted: bool) -> DivergenceStats | None:
    """Name the statistics of an op's [4, ...] tensor; None if they were not wanted."""
    return DivergenceStats(*values.unbind(0)) if wanted else None


def check_pair(student: Tensor, teacher: Tensor, names: str, last: str) -> None:
    """Check for one shape [..., last] and one device; errors call the two by `names`."""
    if student.shape != teacher.shape or student.ndim < 1 or student.shape[-1] == 0:
        raise ValueError(
            f"{names} must both be [..., {last}] with {last} > 0, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{names} must be on one device, got {student.device} and {teacher.device}"
        )


def check_logits(student: Tensor, teacher: Tensor) -> None:
    check_pair(student, teacher, "student_logits and teacher_logits", "vocab")


def flat_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask.reshape(-1)


def needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def form_gradient(student: Tensor) -> bool:
    """Say whether to form the gradient with the loss, for an upstream gradient not known yet.

    A float16 or bfloat16 gradient would be rounded before and after the upstream is applied (and
    a float16 one may underflow before): it is computed in the backward instead.
    """
    return needs_grad(student) and student.dtype in (torch.float32, torch.float64)


def scale_for_float16(
    weights: Tensor, dtype: torch.dtype, spec: DivergenceSpec, alpha: float = 1.0
) -> tuple[Tensor, Tensor | float]:
    """Divide weights by a unit, which is returned too, so that gradients fit into float16.

    Towards both ends of beta a JSD fades, to beta (1 - beta) times a KL: in units of the weights
    alone its gradient would fade to zero, also for who divides by that again. The factor for it is
    a power of two, which rounds nothing.
    """
    if dtype != torch.float16:
        return weights, 1.0
    fades = spec.resolved().kind == "jsd"
    size = 1 - alpha + alpha * (spec.beta * (1 - spec.beta) if fades else 1.0)
    unit = (
        weights.abs().max() * 2.0 ** math.ceil(math.log2(size))
        if len(weights)
        else weights.new_ones(())
    )
    unit = torch.where(unit > 0, unit, 1.0)
    return weights / unit, unit


class _NoDerivative(torch.autograd.Function):
    """Passes a gradient on, and raises an error in place of its derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "metal_ops has no second derivatives (create_graph=True and a second backward); "
            "metal_ops.reference can be differentiated twice"
        )


class _DifferentiableOnce(torch.autograd.Function):
    """Passes an input on, whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        if torch.is_grad_enabled():  # create_graph=True
            grad = _NoDerivative.apply(grad, *ctx.saved_tensors)
        return grad, None


def forbid_second_derivative(x: Tensor) -> Tensor:
    """Return x, with an error for second derivatives, which would lack those through the op."""
    if not needs_grad(x) or torch.compiler.is_compiling():
        return x
    # an empty piece of x carries its place in the graph without its memory
    return _DifferentiableOnce.apply(x, x[..., :0].clone())
