"""Registration with torch: schema, fake tensors, autograd. The arithmetic is in the backends.

A DivergenceSpec travels as its six fields, because an op's schema knows numbers and strings only.
"""

from typing import Any

import torch
from torch import Tensor

from metal_ops._dispatch import select
from metal_ops.backends.chunked import NUM_STATS
from metal_ops.spec import DivergenceSpec


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("metal_ops::divergence", mutates_args=())
def divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    kind: str,
    beta: float,
    temperature: float,
    temperature_scaling: str,
    clip: float | None,
    clip_level: str,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [N], stats [NUM_STATS, N or 0])."""
    spec = DivergenceSpec(kind, beta, temperature, temperature_scaling, clip, clip_level)
    return select(backend, student, teacher).forward(student, teacher, mask, spec, want_stats)


@divergence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    kind: str,
    beta: float,
    temperature: float,
    temperature_scaling: str,
    clip: float | None,
    clip_level: str,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=_accumulator(student))
    return loss, loss.new_empty(NUM_STATS, student.shape[0] if want_stats else 0)


@torch.library.custom_op("metal_ops::divergence_backward", mutates_args=())
def divergence_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    kind: str,
    beta: float,
    temperature: float,
    temperature_scaling: str,
    clip: float | None,
    clip_level: str,
    backend: str,
) -> Tensor:
    """Gradient for the student logits [N, V]."""
    spec = DivergenceSpec(kind, beta, temperature, temperature_scaling, clip, clip_level)
    return select(backend, student, teacher).backward(upstream, student, teacher, mask, spec)


@divergence_backward.register_fake
def _(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _save_divergence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, mask, *spec, _, backend = inputs
    ctx.save_for_backward(student, teacher, mask)
    ctx.options = (*spec, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)


def _divergence_backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grad = divergence_backward(upstream.contiguous(), *ctx.saved_tensors, *ctx.options)
    return (grad, *[None] * 10)


divergence.register_autograd(_divergence_backward, setup_context=_save_divergence)


@torch.library.custom_op("metal_ops::linear_divergence", mutates_args=())
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor,
    labels: Tensor | None,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    alpha: float,
    kind: str,
    beta: float,
    temperature: float,
    temperature_scaling: str,
    clip: float | None,
    clip_level: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, soft and hard [2, N], stats, gradients of hidden, weight, bias; empty if unwanted)."""
    spec = DivergenceSpec(kind, beta, temperature, temperature_scaling, clip, clip_level)
    loss, per_token, stats, *grads = select(backend, student_hidden, teacher_hidden).linear(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        (student_scale, student_softcap, teacher_scale, teacher_softcap),
        weights,
        labels,
        spec,
        alpha,
        (need_hidden, need_weight, need_bias),
    )
    hidden, weight, bias = (loss.new_empty(0) if g is None else g for g in grads)
    return loss, per_token, stats, hidden, weight, bias


@linear_divergence.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor,
    labels: Tensor | None,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    alpha: float,
    kind: str,
    beta: float,
    temperature: float,
    temperature_scaling: str,
    clip: float | None,
    clip_level: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab = student_hidden.shape[0], student_weight.shape[0]
    loss = student_weight.new_empty((), dtype=_accumulator(student_weight))
    empty = loss.new_empty(0)
    return (
        loss,
        loss.new_empty(2, num_tokens),
        loss.new_empty(NUM_STATS, num_tokens),
        torch.empty_like(student_hidden) if need_hidden else empty,
        loss.new_empty(student_weight.shape) if need_weight else empty.clone(),
        loss.new_empty(vocab) if need_bias else empty.clone(),
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.needs = inputs[-4:-1]
    ctx.mark_non_differentiable(*output[1:])


def _linear_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = [
        (upstream * grad.to(upstream.dtype)).to(dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return (*grads, *[None] * 20)


linear_divergence.register_autograd(_linear_backward, setup_context=_save_linear)
