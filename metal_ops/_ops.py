"""Defines the ops as torch knows them: schema, fake tensors, autograd. Backends do the arithmetic.

A DivergenceSpec travels as text, because an op's schema knows numbers and strings only. Ops form
the gradient with the loss and keep it for the backward, which scales it. N tokens, V vocabulary,
H hidden; what was not asked for is empty.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metal_ops._dispatch import run
from metal_ops._registration import differentiate, register, scaled
from metal_ops.backends.blocks.linear import HardLabels, Needs, Projection
from metal_ops.backends.blocks.rows import NUM_STATS, accumulator
from metal_ops.spec import DivergenceSpec


def _resolve_process_group(name: str) -> Any:
    import torch.distributed  # noqa: PLC0415 - not in every build

    groups: Any = torch.distributed.distributed_c10d
    return groups._resolve_process_group(name)


# --- logits, one loss a token


class LogitsArguments(NamedTuple):
    """Holds what `divergence` takes."""

    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]
    mask: Tensor | None  # [N]
    spec: str
    want_grad: bool
    want_stats: bool
    backend: str


class LogitsResult(NamedTuple):
    """Holds what `divergence` returns."""

    loss: Tensor  # [N]
    stats: Tensor  # [NUM_STATS, N or 0]
    grad: Tensor  # of each row's loss, [N, V] or [0]


def _compute_logits(given: LogitsArguments) -> LogitsResult:
    student, teacher, spec = given.student, given.teacher, DivergenceSpec.from_text(given.spec)
    args = student, teacher, given.mask, spec, given.want_grad, given.want_stats
    loss, stats, grad = run("forward", given.backend, student, teacher, *args)
    return LogitsResult(loss, stats, student.new_empty(0) if grad is None else grad)


def _allocate_logits(given: LogitsArguments) -> LogitsResult:
    student, num_tokens = given.student, given.student.shape[0]
    loss = student.new_empty(num_tokens, dtype=accumulator(student))
    stats = loss.new_empty(NUM_STATS, num_tokens if given.want_stats else 0)
    grad = torch.empty_like(student) if given.want_grad else student.new_empty(0)
    return LogitsResult(loss, stats, grad)


divergence = register(
    "metal_ops::divergence",
    LogitsArguments,
    LogitsResult,
    compute=_compute_logits,
    allocate=_allocate_logits,
)


@torch.library.custom_op("metal_ops::divergence_backward", mutates_args=())
def divergence_backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, spec: str, backend: str
) -> Tensor:
    """Compute the gradient for the student logits [N, V], without rows whose upstream is 0."""
    args = upstream, student, teacher, DivergenceSpec.from_text(spec)
    return run("backward", backend, student, teacher, *args)


@divergence_backward.register_fake
def _(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _save_logits(ctx: Any, given: LogitsArguments, result: LogitsResult) -> None:
    ctx.spec, ctx.formed, ctx.backend = given.spec, given.want_grad, given.backend
    recompute = given.student, given.teacher, given.mask
    ctx.save_for_backward(*((result.grad,) if ctx.formed else recompute))


def _logits_gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    if ctx.formed:
        return {"student": scaled(ctx.saved_tensors[0], upstream[:, None])}
    student, teacher, mask = ctx.saved_tensors
    upstream = upstream.contiguous() if mask is None else upstream * mask
    return {"student": divergence_backward(upstream, student, teacher, ctx.spec, ctx.backend)}


differentiate(
    divergence, LogitsArguments, LogitsResult, save=_save_logits, gradients=_logits_gradients
)

# --- logits, one loss in all


class WeightedArguments(NamedTuple):
    """Holds what `weighted_divergence` takes."""

    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]
    weights: Tensor  # [N]
    spec: str
    want_grad: bool
    want_stats: bool
    backend: str


class WeightedResult(NamedTuple):
    """Holds what `weighted_divergence` returns."""

    loss: Tensor  # []
    per_token: Tensor  # [N]
    stats: Tensor  # [NUM_STATS, N or 0]
    grad: Tensor  # of the loss, [N, V] or [0]


def _compute_weighted(given: WeightedArguments) -> WeightedResult:
    student, teacher, spec = given.student, given.teacher, DivergenceSpec.from_text(given.spec)
    args = student, teacher, given.weights, spec, given.want_grad, given.want_stats
    per_token, stats, grad = run("forward", given.backend, student, teacher, *args)
    loss = (given.weights * per_token).sum()
    return WeightedResult(loss, per_token, stats, student.new_empty(0) if grad is None else grad)


def _allocate_weighted(given: WeightedArguments) -> WeightedResult:
    student, num_tokens = given.student, given.student.shape[0]
    per_token = student.new_empty(num_tokens, dtype=accumulator(student))
    stats = per_token.new_empty(NUM_STATS, num_tokens if given.want_stats else 0)
    grad = torch.empty_like(student) if given.want_grad else student.new_empty(0)
    return WeightedResult(per_token.new_empty(()), per_token, stats, grad)


weighted_divergence = register(
    "metal_ops::weighted_divergence",
    WeightedArguments,
    WeightedResult,
    compute=_compute_weighted,
    allocate=_allocate_weighted,
)


def _save_weighted(ctx: Any, given: WeightedArguments, result: WeightedResult) -> None:
    ctx.need, ctx.dtype = given.want_grad, given.student.dtype
    ctx.save_for_backward(result.grad)


def _weighted_gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    (grad,) = ctx.saved_tensors
    return {"student": scaled(grad, upstream).to(ctx.dtype) if ctx.need else None}


differentiate(
    weighted_divergence,
    WeightedArguments,
    WeightedResult,
    save=_save_weighted,
    gradients=_weighted_gradients,
)

# --- hidden states


class HiddenArguments(NamedTuple):
    """Holds what `hidden_divergence` takes."""

    student: Tensor  # [N, H]
    teacher: Tensor  # [N, H]
    weights: Tensor | None  # [N]
    kind: str
    want_grad: bool
    backend: str


class HiddenResult(NamedTuple):
    """Holds what `hidden_divergence` returns."""

    loss: Tensor  # [N]
    grad: Tensor  # of the weighted losses, [N, H] or [0]


def _compute_hidden(given: HiddenArguments) -> HiddenResult:
    student, teacher = given.student, given.teacher
    args = student, teacher, given.kind, given.weights, given.want_grad
    loss, grad = run("hidden_states", given.backend, student, teacher, *args)
    return HiddenResult(loss, student.new_empty(0) if grad is None else grad)


def _allocate_hidden(given: HiddenArguments) -> HiddenResult:
    student = given.student
    loss = student.new_empty(student.shape[0], dtype=accumulator(student))
    grad = torch.empty_like(student) if given.want_grad else student.new_empty(0)
    return HiddenResult(loss, grad)


hidden_divergence = register(
    "metal_ops::hidden_divergence",
    HiddenArguments,
    HiddenResult,
    compute=_compute_hidden,
    allocate=_allocate_hidden,
)


def _save_hidden(ctx: Any, given: HiddenArguments, result: HiddenResult) -> None:
    ctx.kind, ctx.formed, ctx.backend = given.kind, given.want_grad, given.backend
    recompute = given.student, given.teacher, given.weights
    ctx.save_for_backward(*((result.grad,) if ctx.formed else recompute))


def _hidden_gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    if ctx.formed:
        return {"student": scaled(ctx.saved_tensors[0], upstream[:, None])}
    student, teacher, mask = ctx.saved_tensors
    upstream = upstream.contiguous() if mask is None else upstream * mask
    again = {"kind": ctx.kind, "want_grad": True, "backend": ctx.backend}
    _, grad = hidden_divergence(student, teacher, weights=upstream, **again)
    return {"student": grad}


differentiate(
    hidden_divergence, HiddenArguments, HiddenResult, save=_save_hidden, gradients=_hidden_gradients
)

# --- hidden states and heads


class LinearArguments(NamedTuple):
    """Holds what `linear_divergence` takes; without teacher_weight both sides have one head."""

    student_hidden: Tensor  # [N, H]
    student_weight: Tensor  # [V, H]
    student_bias: Tensor | None  # [V]
    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    weights: Tensor  # [N]
    labels: Tensor | None  # [N]
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    alpha: float
    spec: str
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    want_stats: bool
    backend: str
    group: str  # of processes, each with some rows of the heads; none if empty
    sum_hidden: bool  # over that group

    def student(self) -> Projection:
        """Return the student's hidden states and head."""
        return Projection(
            self.student_hidden,
            self.student_weight,
            self.student_bias,
            self.student_scale,
            self.student_softcap,
        )

    def teacher(self) -> Projection | Tensor:
        """Return the teacher's hidden states and head, or the states alone for a shared head."""
        if self.teacher_weight is None:
            return self.teacher_hidden
        return Projection(
            self.teacher_hidden,
            self.teacher_weight,
            self.teacher_bias,
            self.teacher_scale,
            self.teacher_softcap,
        )

    def needs(self) -> Needs:
        """Say which gradients are wanted."""
        return Needs(self.need_hidden, self.need_weight, self.need_bias)


class LinearResult(NamedTuple):
    """Holds what `linear_divergence` returns; gradients are those of the loss."""

    loss: Tensor  # []
    per_token: Tensor  # soft and hard, [2, N]
    stats: Tensor  # [NUM_STATS, N or 0]
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def _compute_linear(given: LinearArguments) -> LinearResult:
    op, more = "linear", ()
    if given.group:
        op, more = "split_linear", (_resolve_process_group(given.group), given.sum_hidden)
    # autocast has been applied to the inputs; inside, products have the dtype the backend chose
    with torch.autocast(given.student_hidden.device.type, enabled=False):
        loss, per_token, stats, *grads = run(
            op,
            given.backend,
            given.student_hidden,
            given.teacher_hidden,
            given.student(),
            given.teacher(),
            given.weights,
            HardLabels(given.labels, given.alpha),
            DivergenceSpec.from_text(given.spec),
            given.needs(),
            given.want_stats,
            *more,
        )
    hidden, weight, bias = (loss.new_empty(0) if g is None else g for g in grads)
    return LinearResult(loss, per_token, stats, hidden, weight, bias)


def _allocate_linear(given: LinearArguments) -> LinearResult:
    hidden, weight, needs = given.student_hidden, given.student_weight, given.needs()
    num_tokens = hidden.shape[0]
    loss = weight.new_empty((), dtype=accumulator(weight))
    return LinearResult(
        loss,
        per_token=loss.new_empty(2, num_tokens),
        stats=loss.new_empty(NUM_STATS, num_tokens if given.want_stats else 0),
        grad_hidden=torch.empty_like(hidden) if needs.hidden else loss.new_empty(0),
        grad_weight=loss.new_empty(weight.shape if needs.weight else 0),
        grad_bias=loss.new_empty(weight.shape[0] if needs.bias else 0),
    )


linear_divergence = register(
    "metal_ops::linear_divergence",
    LinearArguments,
    LinearResult,
    compute=_compute_linear,
    allocate=_allocate_linear,
)


def _save_linear(ctx: Any, given: LinearArguments, result: LinearResult) -> None:
    inputs = given.student_hidden, given.student_weight, given.student_bias
    ctx.needs, ctx.dtypes = given.needs(), [None if x is None else x.dtype for x in inputs]
    ctx.save_for_backward(result.grad_hidden, result.grad_weight, result.grad_bias)


def _linear_gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    names = ("student_hidden", "student_weight", "student_bias")
    saved = zip(names, ctx.needs, ctx.saved_tensors, ctx.dtypes, strict=True)
    return {name: scaled(grad, upstream).to(dtype) for name, need, grad, dtype in saved if need}


differentiate(
    linear_divergence, LinearArguments, LinearResult, save=_save_linear, gradients=_linear_gradients
)
