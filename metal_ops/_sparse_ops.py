"""Defines the ops for a teacher known at K entries a token, as `_ops` does; n draws a token."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metal_ops._dispatch import run
from metal_ops._registration import differentiate, register, scaled
from metal_ops.backends.blocks.rows import accumulator, clip_tokens, scale_gradient
from metal_ops.backends.blocks.tail import TailDraws, add_tail_correction
from metal_ops.spec import DivergenceSpec


class SparseResult(NamedTuple):
    """Holds what both ops return."""

    loss: Tensor  # [N]
    grad: Tensor  # of the weighted losses, [N, V] or [0]


def _allocate(student: Tensor, want_grad: bool) -> SparseResult:
    loss = student.new_empty(student.shape[0], dtype=accumulator(student))
    return SparseResult(loss, torch.empty_like(student) if want_grad else student.new_empty(0))


class SparseArguments(NamedTuple):
    """Holds what `sparse_divergence` takes."""

    student: Tensor  # [N, V]
    ids: Tensor  # [N, K]
    log_probs: Tensor  # [N, K]
    log_tail: Tensor  # [N]
    weights: Tensor  # [N]
    spec: str
    want_grad: bool
    backend: str


def _compute_sparse(given: SparseArguments) -> SparseResult:
    student, known = given.student, (given.ids, given.log_probs, given.log_tail)
    args = student, known, given.weights, DivergenceSpec.from_text(given.spec), given.want_grad
    loss, grad = run("sparse", given.backend, student, given.log_probs, *args)
    return SparseResult(loss, student.new_empty(0) if grad is None else grad)


sparse_divergence = register(
    "metal_ops::sparse_divergence",
    SparseArguments,
    SparseResult,
    compute=_compute_sparse,
    allocate=lambda given: _allocate(given.student, given.want_grad),
)


def _save_sparse(ctx: Any, given: SparseArguments, result: SparseResult) -> None:
    ctx.spec, ctx.formed, ctx.backend = given.spec, given.want_grad, given.backend
    recompute = given.student, given.ids, given.log_probs, given.log_tail, given.weights
    ctx.save_for_backward(*((result.grad,) if ctx.formed else recompute))


def _sparse_gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    if ctx.formed:
        return {"student": scaled(ctx.saved_tensors[0], upstream[:, None])}
    *inputs, mask = ctx.saved_tensors
    again = {"spec": ctx.spec, "want_grad": True, "backend": ctx.backend}
    _, grad = sparse_divergence(*inputs, weights=upstream * mask, **again)
    return {"student": grad}


differentiate(
    sparse_divergence, SparseArguments, SparseResult, save=_save_sparse, gradients=_sparse_gradients
)

# --- and by draws from the others


class SampledArguments(NamedTuple):
    """Holds what `sampled_divergence` takes; max_ratio may be inf."""

    student: Tensor  # [N, V]
    ids: Tensor  # [N, K]
    log_probs: Tensor  # [N, K]
    log_tail: Tensor  # [N]
    draws: Tensor  # [N, n]
    draw_log_probs: Tensor  # [N, n]
    draw_log_weights: Tensor  # [N, n]
    weights: Tensor  # [N]
    spec: str
    max_ratio: float
    want_grad: bool
    backend: str


def _compute_sampled(given: SampledArguments) -> SparseResult:
    student, weights, ratio = given.student, given.weights, given.max_ratio
    asked = DivergenceSpec.from_text(given.spec)
    free = replace(asked, clip=None)  # a clip bounds the sum of both parts
    known = given.ids, given.log_probs, given.log_tail
    args = student, known, weights, free, given.want_grad
    loss, grad = run("sparse", given.backend, student, given.log_probs, *args)
    drawn = TailDraws(given.draws, given.draw_log_probs, given.draw_log_weights, given.log_tail)
    add_tail_correction(student, given.ids, drawn, weights, free, ratio, loss, grad)
    loss, shrink, _ = clip_tokens(loss / asked.scale, asked)
    if grad is not None and shrink is not None:
        scale_gradient(grad, shrink)
    return SparseResult(loss * asked.scale, student.new_empty(0) if grad is None else grad)


sampled_divergence = register(
    "metal_ops::sampled_divergence",
    SampledArguments,
    SparseResult,
    compute=_compute_sampled,
    allocate=lambda given: _allocate(given.student, given.want_grad),
)


def _save_sampled(ctx: Any, given: SampledArguments, result: SparseResult) -> None:
    ctx.spec, ctx.max_ratio = given.spec, given.max_ratio
    ctx.formed, ctx.backend = given.want_grad, given.backend
    known = given.ids, given.log_probs, given.log_tail
    drawn = given.draws, given.draw_log_probs, given.draw_log_weights
    recompute = given.student, *known, *drawn, given.weights
    ctx.save_for_backward(*((result.grad,) if ctx.formed else recompute))


def _sampled_gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    if ctx.formed:
        return {"student": scaled(ctx.saved_tensors[0], upstream[:, None])}
    *inputs, mask = ctx.saved_tensors
    again = {"spec": ctx.spec, "want_grad": True, "backend": ctx.backend}
    again["max_ratio"] = ctx.max_ratio
    _, grad = sampled_divergence(*inputs, weights=upstream * mask, **again)
    return {"student": grad}


differentiate(
    sampled_divergence,
    SampledArguments,
    SparseResult,
    save=_save_sampled,
    gradients=_sampled_gradients,
)
