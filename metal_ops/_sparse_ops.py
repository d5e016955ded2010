"""The ops for a teacher known at a few entries; otherwise as `_ops`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metal_ops._dispatch import run
from metal_ops._ops import scaled
from metal_ops.backends.blocks.rows import accumulator, clip_tokens
from metal_ops.backends.blocks.tail import TailDraws, add_tail_correction
from metal_ops.spec import DivergenceSpec


@torch.library.custom_op("metal_ops::sparse_divergence", mutates_args=())
def sparse_divergence(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    weights: Tensor,
    spec: str,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [N], gradient of the weighted losses [N, V] or [0])."""
    known = ids, log_probs, log_tail
    args = student, known, weights, DivergenceSpec.from_text(spec), want_grad
    loss, grad = run("sparse", backend, student, log_probs, *args)
    return loss, student.new_empty(0) if grad is None else grad


@sparse_divergence.register_fake
def _(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    weights: Tensor,
    spec: str,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=accumulator(student))
    return loss, torch.empty_like(student) if want_grad else student.new_empty(0)


def _save_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, ids, log_probs, log_tail, mask, ctx.spec, ctx.formed, ctx.backend = inputs
    recompute = (student, ids, log_probs, log_tail, mask)
    ctx.save_for_backward(*((output[1],) if ctx.formed else recompute))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sparse_backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    if ctx.formed:
        grad = scaled(ctx.saved_tensors[0], upstream[:, None])
    else:
        *inputs, mask = ctx.saved_tensors
        grad = sparse_divergence(*inputs, upstream * mask, ctx.spec, True, ctx.backend)[1]
    return (grad, *[None] * 7)


sparse_divergence.register_autograd(_sparse_backward, setup_context=_save_sparse)

# --- and by draws from the others


@torch.library.custom_op("metal_ops::sampled_divergence", mutates_args=())
def sampled_divergence(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    draws: Tensor,
    draw_log_probs: Tensor,
    draw_log_weights: Tensor,
    weights: Tensor,
    spec: str,
    max_ratio: float,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As sparse_divergence, with [N, n] draws from the tail; max_ratio may be inf."""
    asked = DivergenceSpec.from_text(spec)
    free = replace(asked, clip=None)  # a clip bounds the sum of both parts
    known = ids, log_probs, log_tail
    args = student, known, weights, free, want_grad
    loss, grad = run("sparse", backend, student, log_probs, *args)
    drawn = TailDraws(draws, draw_log_probs, draw_log_weights, log_tail)
    add_tail_correction(student, ids, drawn, weights, free, max_ratio, loss, grad)
    loss, shrink, _ = clip_tokens(loss / asked.scale, asked)
    if grad is not None and shrink is not None:
        grad.mul_(shrink[:, None])
    return loss * asked.scale, student.new_empty(0) if grad is None else grad


@sampled_divergence.register_fake
def _(student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=accumulator(student))
    return loss, torch.empty_like(student) if args[-2] else student.new_empty(0)


def _save_sampled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *recompute, ctx.spec, ctx.max_ratio, ctx.formed, ctx.backend = inputs
    ctx.save_for_backward(*((output[1],) if ctx.formed else recompute))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sampled_backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 12
    if ctx.formed:
        grad = scaled(ctx.saved_tensors[0], upstream[:, None])
    else:
        *inputs, mask = ctx.saved_tensors
        settings = ctx.spec, ctx.max_ratio, True, ctx.backend
        grad = sampled_divergence(*inputs, upstream * mask, *settings)[1]
    return (grad, *[None] * 11)


sampled_divergence.register_autograd(_sampled_backward, setup_context=_save_sampled)
