"""Registration with torch: schema, fake tensors, autograd. The arithmetic is in the backends.

A DivergenceSpec travels as text, because an op's schema knows numbers and strings only. Ops form
the gradient with the loss and keep it for the backward, which scales it.
"""

from typing import Any

import torch
from torch import Tensor

from metal_ops._dispatch import run
from metal_ops.backends.blocks.linear import HardLabels, Projection
from metal_ops.backends.blocks.rows import NUM_STATS, accumulator
from metal_ops.spec import DivergenceSpec


def scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """Grad * upstream, in the memory of grad where nobody will ask for it again."""
    # a tensor of one element with dimensions takes part in type promotion, one without does not
    upstream = upstream.reshape([1] * grad.ndim) if upstream.ndim == 0 else upstream
    plain = type(grad) is Tensor and not torch.compiler.is_compiling()
    internals: Any = torch._C
    plain = plain and not internals._functorch.is_legacy_batchedtensor(upstream)
    autograd = internals._autograd
    if not plain or autograd._get_current_graph_task_keep_graph():  # retain_graph=True
        return (grad * upstream).to(grad.dtype)
    if grad.device.type == "cpu":
        if upstream.numel() == 1 or (upstream.numel() and not any(upstream.stride())):
            # one number for all, in place counts in full precision, and is not converted entry by
            # entry, which takes ten times as long
            upstream = upstream.flatten()[0]
        if bool((upstream == 1).all()):
            return grad
    return grad.mul_(upstream)


# --- logits, one loss a token


@torch.library.custom_op("metal_ops::divergence", mutates_args=())
def divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    spec: str,
    want_grad: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], stats [NUM_STATS, N or 0], gradient of each row's loss [N, V] or [0])."""
    args = student, teacher, mask, DivergenceSpec.from_text(spec), want_grad, want_stats
    loss, stats, grad = run("forward", backend, student, teacher, *args)
    return loss, stats, student.new_empty(0) if grad is None else grad


@divergence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    spec: str,
    want_grad: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=accumulator(student))
    stats = loss.new_empty(NUM_STATS, student.shape[0] if want_stats else 0)
    return loss, stats, torch.empty_like(student) if want_grad else student.new_empty(0)


@torch.library.custom_op("metal_ops::divergence_backward", mutates_args=())
def divergence_backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, spec: str, backend: str
) -> Tensor:
    """Gradient for the student logits [N, V]; rows whose upstream is 0 are skipped."""
    args = upstream, student, teacher, DivergenceSpec.from_text(spec)
    return run("backward", backend, student, teacher, *args)


@divergence_backward.register_fake
def _(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _save_divergence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, mask, ctx.spec, ctx.formed, _, ctx.backend = inputs
    ctx.save_for_backward(*((output[2],) if ctx.formed else (student, teacher, mask)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the other outputs, one of them [N, V]


def _divergence_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 7
    if ctx.formed:
        grad = scaled(ctx.saved_tensors[0], upstream[:, None])
    else:
        student, teacher, mask = ctx.saved_tensors
        upstream = upstream.contiguous() if mask is None else upstream * mask
        grad = divergence_backward(upstream, student, teacher, ctx.spec, ctx.backend)
    return (grad, *[None] * 6)


divergence.register_autograd(_divergence_backward, setup_context=_save_divergence)

# --- logits, one loss in all


@torch.library.custom_op("metal_ops::weighted_divergence", mutates_args=())
def weighted_divergence(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    spec: str,
    want_grad: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], per token [N], stats [NUM_STATS, N or 0], gradient of loss [N, V] or [0])."""
    args = student, teacher, weights, DivergenceSpec.from_text(spec), want_grad, want_stats
    per_token, stats, grad = run("forward", backend, student, teacher, *args)
    loss = (weights * per_token).sum()
    return loss, per_token, stats, student.new_empty(0) if grad is None else grad


@weighted_divergence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    spec: str,
    want_grad: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_token = student.new_empty(student.shape[0], dtype=accumulator(student))
    stats = per_token.new_empty(NUM_STATS, student.shape[0] if want_stats else 0)
    grad = torch.empty_like(student) if want_grad else student.new_empty(0)
    return per_token.new_empty(()), per_token, stats, grad


# --- hidden states


@torch.library.custom_op("metal_ops::hidden_divergence", mutates_args=())
def hidden_divergence(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    kind: str,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [N], gradient of the weighted losses [N, H] or [0])."""
    args = student, teacher, kind, weights, want_grad
    loss, grad = run("hidden_states", backend, student, teacher, *args)
    return loss, student.new_empty(0) if grad is None else grad


@hidden_divergence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    kind: str,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=accumulator(student))
    return loss, torch.empty_like(student) if want_grad else student.new_empty(0)


def _save_hidden(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, mask, ctx.kind, ctx.formed, ctx.backend = inputs
    ctx.save_for_backward(*((output[1],) if ctx.formed else (student, teacher, mask)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _hidden_backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 6
    if ctx.formed:
        grad = scaled(ctx.saved_tensors[0], upstream[:, None])
    else:
        student, teacher, mask = ctx.saved_tensors
        upstream = upstream.contiguous() if mask is None else upstream * mask
        grad = hidden_divergence(student, teacher, upstream, ctx.kind, True, ctx.backend)[1]
    return (grad, *[None] * 5)


hidden_divergence.register_autograd(_hidden_backward, setup_context=_save_hidden)

# --- hidden states and heads


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
    spec: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, soft and hard [2, N], stats, gradients of hidden, weight, bias; empty if unwanted)."""
    student = Projection(
        student_hidden, student_weight, student_bias, student_scale, student_softcap
    )
    teacher = teacher_hidden
    if teacher_weight is not None:
        teacher = Projection(
            teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap
        )
    # autocast has been applied to the inputs; inside, products have the dtype the backend chose
    with torch.autocast(student_hidden.device.type, enabled=False):
        loss, per_token, stats, *grads = run(
            "linear",
            backend,
            student_hidden,
            teacher_hidden,
            student,
            teacher,
            weights,
            HardLabels(labels, alpha),
            DivergenceSpec.from_text(spec),
            (need_hidden, need_weight, need_bias),
            want_stats,
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
    spec: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab = student_hidden.shape[0], student_weight.shape[0]
    loss = student_weight.new_empty((), dtype=accumulator(student_weight))
    empty = loss.new_empty(0)
    return (
        loss,
        loss.new_empty(2, num_tokens),
        loss.new_empty(NUM_STATS, num_tokens if want_stats else 0),
        torch.empty_like(student_hidden) if need_hidden else empty,
        loss.new_empty(student_weight.shape) if need_weight else empty.clone(),
        loss.new_empty(vocab) if need_bias else empty.clone(),
    )


def _save_scalar(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For the ops whose first output is the loss and whose last are gradients of first inputs."""
    linear = len(output) == 6
    ctx.num_inputs = len(inputs)
    ctx.needs = inputs[-5:-2] if linear else (inputs[4],)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[: len(ctx.needs)]]
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scalar_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.num_inputs
    grads = [
        scaled(grad, upstream).to(dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return (*grads, *[None] * (ctx.num_inputs - len(grads)))


linear_divergence.register_autograd(_scalar_backward, setup_context=_save_scalar)
weighted_divergence.register_autograd(_scalar_backward, setup_context=_save_scalar)
