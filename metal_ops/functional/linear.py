"""Computes divergences from hidden states and heads, without logits of all tokens in memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metal_ops import _ops
from metal_ops.backends.blocks import sizes
from metal_ops.backends.blocks.rows import NUM_BUFFERS, accumulator
from metal_ops.functional._arguments import (
    DivergenceStats,
    forbid_second_derivative,
    named_stats,
    needs_grad,
    scale_for_float16,
)
from metal_ops.functional.head import Head, is_dtensor
from metal_ops.spec import DivergenceSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearTerms(NamedTuple):
    """Holds what `linear_divergence` returns.

    loss is the scalar with a gradient. soft [N] and hard [N] are the divergence (with the spec's
    temperature scaling) and the cross-entropy per token, unweighted and without gradient; hard is
    zero without labels. stats are None if they were not asked for.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    stats: DivergenceStats | None


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in the dtype autocast asks for, if it is on, as F.linear would do."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check_shapes(
    student_hidden: Tensor, student_head: Head, teacher_hidden: Tensor, teacher_head: Head
) -> None:
    weight, teacher_weight = student_head.weight, teacher_head.weight
    for name, h, w in (
        ("student", student_hidden, weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
            raise ValueError(
                f"{name}_hidden must be [tokens, hidden] and {name}_head.weight [vocab, hidden], "
                f"got {tuple(h.shape)} and {tuple(w.shape)}"
            )
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same number of tokens, got "
            f"{student_hidden.shape[0]} and {teacher_hidden.shape[0]}"
        )
    if student_head.vocab != teacher_head.vocab:
        raise ValueError(
            "student and teacher must have one vocabulary, got heads of "
            f"{student_head.vocab} and {teacher_head.vocab} entries"
        )


def _check_tokens(tokens: int, weights: Tensor, labels: Tensor | None, alpha: float) -> None:
    if weights.shape != (tokens,):
        raise ValueError(f"weights must be [tokens] = [{tokens}], got {tuple(weights.shape)}")
    if labels is not None and (labels.shape != weights.shape or labels.dtype != torch.int64):
        raise ValueError(
            f"labels must be int64 [tokens] = [{tokens}], got {labels.dtype} {tuple(labels.shape)}"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if labels is None and alpha < 1.0:
        raise ValueError(f"alpha {alpha} < 1 needs labels [tokens]; got None")


class _Tokens(NamedTuple):
    """Holds what there is of each token."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    weights: Tensor
    labels: Tensor | None


class _Settings(NamedTuple):
    """Holds what is the same for all tokens."""

    spec: DivergenceSpec
    alpha: float
    stats: bool
    backend: str


_Heads = tuple[Head, Head]


def _both(heads: _Heads, shared: bool, change: Callable[[Head], Head]) -> _Heads:
    """Change both heads, or the one that they are."""
    student = change(heads[0])
    return student, student if shared else change(heads[1])


def _gathered_rows(head: Head, group: Any, own_tokens: bool) -> Head:
    from metal_ops.functional.groups import gather_rows  # noqa: PLC0415 - not in every build

    rows = [
        None if x is None else gather_rows(x, group, own_tokens) for x in (head.weight, head.bias)
    ]
    return replace(head, weight=rows[0], bias=rows[1])


def _linear(
    tokens: _Tokens, heads: _Heads, settings: _Settings, group: Any = None, sum_hidden: bool = True
) -> LinearTerms:
    """Call the op, on heads that are plain tensors: whole, or a process's rows."""
    student_head, teacher_head = heads
    spec, alpha, stats, backend = settings
    shared = teacher_head.same_as(student_head)
    hidden, weight, bias = _autocast(tokens.student_hidden, student_head.weight, student_head.bias)
    assert hidden is not None
    assert weight is not None
    with torch.no_grad():
        teacher = _autocast(
            tokens.teacher_hidden,
            None if shared else teacher_head.weight,
            None if shared else teacher_head.bias,
        )
    teacher = [None if x is None else x.detach() for x in teacher]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weights = tokens.weights.detach().to(wide)
    weights, size = scale_for_float16(weights, weight.dtype, spec, alpha)
    found = _ops.LinearResult(
        *_ops.linear_divergence(
            student_hidden=forbid_second_derivative(hidden),
            student_weight=forbid_second_derivative(weight),
            student_bias=None if bias is None else forbid_second_derivative(bias),
            teacher_hidden=teacher[0],
            teacher_weight=teacher[1],
            teacher_bias=teacher[2],
            weights=weights,
            labels=tokens.labels,
            student_scale=student_head.logit_scale,
            student_softcap=student_head.softcap,
            teacher_scale=teacher_head.logit_scale,
            teacher_softcap=teacher_head.softcap,
            alpha=alpha,
            spec=spec.resolved_text,
            need_hidden=needs_grad(hidden),
            need_weight=needs_grad(weight),
            need_bias=bias is not None and needs_grad(bias),
            want_stats=stats,
            backend=backend,
            group="" if group is None else group.group_name,
            sum_hidden=sum_hidden,
        )
    )
    soft, hard = found.per_token[0], found.per_token[1]
    return LinearTerms(found.loss * size, soft, hard, named_stats(found.stats, stats))


class _Valued(torch.autograd.Function):
    """Has another value; the gradient goes to what it was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def _of_own_tokens(tokens: _Tokens, heads: _Heads, settings: _Settings, group: Any) -> LinearTerms:
    """Compute the terms of a process's own tokens; their gradients are those of all tokens."""
    from metal_ops.functional.groups import AllTokens  # noqa: PLC0415 - not in every build

    every = AllTokens.of(*tokens, group)
    found = _linear(_Tokens(*every[:4]), heads, settings, group, sum_hidden=False)
    soft, hard, alpha = found.soft[every.own], found.hard[every.own], settings.alpha
    value, weights = torch.zeros_like(found.loss), tokens.weights.detach().to(found.loss.dtype)
    for share, each in ((alpha, soft), (1 - alpha, hard)):
        if share:  # a side without a share may be infinite
            value = value + share * (weights * each).sum()
    stats = found.stats and DivergenceStats(*(x[every.own] for x in found.stats))
    return LinearTerms(_Valued.apply(found.loss, value), soft, hard, stats)


def linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    spec: DivergenceSpec,
    *,
    weights: Tensor,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    stats: bool = False,
    backend: str = "auto",
    group: "ProcessGroup | None" = None,
    own_tokens: bool = False,
) -> LinearTerms:
    """Sum weighted divergences from hidden states, without [tokens, vocab] logits in memory.

    With soft the divergence of `spec` and hard the cross-entropy of the labels at temperature 1:

        loss = sum_n weights_n (alpha soft_n + (1 - alpha) hard_n)

    Args:
        student_hidden: [tokens, hidden], the input of the student's output head.
        student_head: of [vocab, hidden].
        teacher_hidden: [tokens, hidden of the teacher]. No gradient.
        teacher_head: of [vocab, hidden of the teacher]. No gradient. If it is that of the student
            (`Head.same_as`), both sides are projected in one product.
        spec: which divergence, at which temperature.
        weights: [tokens]; mask / num_items_in_batch in a trainer. No gradient.
        labels: [tokens] int64 in [0, vocab), needed when alpha < 1.
        alpha: share of the divergence, in [0, 1].
        stats: whether to compute the statistics, which takes more passes over the logits.
        backend: as in `divergence`.
        group: of processes that share the vocabulary: each gives some rows of both heads, as many
            of the one as of the other, which follow each other in the order of the ranks. All call
            this, and the backward, together. Nothing of the size of a head or of logits is
            exchanged, and each gets the gradients of its own rows. None if heads are whole.
        own_tokens: whether processes of the group have tokens of their own. Hidden states are then
            exchanged, the loss is that of a process's own tokens, and the gradients of its rows are
            those of the sum of all losses. Else all processes give the same tokens.

    Returns:
        `LinearTerms`; the loss is [] float32 (float64 for a float64 head), in nats.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, alpha is outside [0, 1], labels are
            missing, a head is a DTensor although a group is given, or own_tokens without a group.
        TypeError: group is no process group.
        NotImplementedError: no allowed backend supports the tensors.

    Numerics:
        Logits of a chunk of tokens are projected once, in the dtype of the head (of autocast, if it
        is on; in float32 for a 16-bit head on a CPU that would emulate the product), and reduced
        in float32; the gradients of hidden states, head and bias are formed while they exist, so
        the backward is one multiplication. The head's gradient accumulates in float32. No gradient
        is computed for a tensor that does not require one. With a group, a divergence over some
        entries only (`support` other than "full") gathers both heads.
    """
    _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head)
    _check_tokens(len(student_hidden), weights, labels, alpha)
    if own_tokens and group is None:
        raise ValueError("own_tokens needs the group of processes that have them, got group None")
    tokens = _Tokens(student_hidden, teacher_hidden, weights, labels)
    shared = teacher_head.same_as(student_head)
    heads, settings = (student_head, teacher_head), _Settings(spec, alpha, stats, backend)
    if group is None:
        return _linear(tokens, _both(heads, shared, Head.gathered), settings)
    if not isinstance(getattr(group, "group_name", None), str):
        raise TypeError(f"group must be a process group of torch.distributed, got {group!r}")
    if any(is_dtensor(head.weight) for head in heads):
        raise ValueError("with a group, heads must be a process's own rows, got a DTensor")
    if spec.support != "full":
        gather = partial(_gathered_rows, group=group, own_tokens=own_tokens)
        return _linear(tokens, _both(heads, shared, gather), settings)
    if not own_tokens:
        return _linear(tokens, heads, settings, group)
    return _of_own_tokens(tokens, heads, settings, group)


def linear_scratch_bytes(
    num_tokens: int, student_head: Head, teacher_head: Head, processes: int = 1
) -> int:
    """Return the bytes that `linear_divergence` takes while it runs on blocks in PyTorch.

    They are the logits of a chunk of tokens and the buffers of a block of rows. Inputs and
    gradients are not in it: that of a trained head is [vocab, hidden] in float32.

    Args:
        num_tokens: the tokens of a call, at least 0.
        student_head: of [vocab, hidden]; only its shape, dtype and device are read, and the meta
            device stands for any accelerator.
        teacher_head: the same of the teacher; the student's own if both sides share it.
        processes: of a `group=`, each with as many rows of both heads, which are given whole here.

    Returns:
        Those of one process.

    Raises:
        ValueError: num_tokens is negative, or processes is below 1.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    weight = student_head.weight
    vocab, hidden = weight.shape
    tokens = min(num_tokens, sizes.tokens_per_chunk(weight[:1, :hidden], weight))
    logits = sum(sizes.product_dtype(x.weight).itemsize for x in (student_head, teacher_head))
    columns, wide = -(-vocab // processes), accumulator(weight).itemsize
    rows = min(tokens, sizes.rows_per_block(weight, columns))
    if processes > 1:  # a chunk is one block: what heads do behind the product is held beside it
        scaled = [x.logit_scale != 1 or x.softcap is not None for x in (student_head, teacher_head)]
        logits += wide * (2 * scaled[0] + scaled[1])
    return columns * (tokens * logits + NUM_BUFFERS * rows * wide)
