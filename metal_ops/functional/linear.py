"""Computes divergences from hidden states and heads, without logits of all tokens in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import _ops
from metal_ops.functional._arguments import (
    DivergenceStats,
    forbid_second_derivative,
    named_stats,
    needs_grad,
    scale_for_float16,
)
from metal_ops.functional.head import Head
from metal_ops.spec import DivergenceSpec


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
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "student and teacher must have one vocabulary, got heads of "
            f"{weight.shape[0]} and {teacher_weight.shape[0]} entries"
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

    Returns:
        `LinearTerms`; the loss is [] float32 (float64 for a float64 head), in nats.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, alpha is outside [0, 1], or labels are
            missing.
        NotImplementedError: no allowed backend supports the tensors.

    Numerics:
        Logits of a chunk of tokens are projected once, in the dtype of the head (of autocast, if it
        is on; in float32 for a 16-bit head on a CPU that would emulate the product), and reduced
        in float32; the gradients of hidden states, head and bias are formed while they exist, so
        the backward is one multiplication. The head's gradient accumulates in float32. No gradient
        is computed for a tensor that does not require one.
    """
    _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head)
    _check_tokens(len(student_hidden), weights, labels, alpha)
    shared = teacher_head.same_as(student_head)
    student_head = student_head.gathered()
    teacher_head = student_head if shared else teacher_head.gathered()
    hidden, weight, bias = _autocast(student_hidden, student_head.weight, student_head.bias)
    assert hidden is not None
    assert weight is not None
    with torch.no_grad():
        teacher = _autocast(
            teacher_hidden,
            None if shared else teacher_head.weight,
            None if shared else teacher_head.bias,
        )
    teacher = [None if x is None else x.detach() for x in teacher]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weights, size = scale_for_float16(weights.detach().to(wide), weight.dtype, spec, alpha)
    found = _ops.LinearResult(
        *_ops.linear_divergence(
            student_hidden=forbid_second_derivative(hidden),
            student_weight=forbid_second_derivative(weight),
            student_bias=None if bias is None else forbid_second_derivative(bias),
            teacher_hidden=teacher[0],
            teacher_weight=teacher[1],
            teacher_bias=teacher[2],
            weights=weights,
            labels=labels,
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
        )
    )
    soft, hard = found.per_token[0], found.per_token[1]
    return LinearTerms(found.loss * size, soft, hard, named_stats(found.stats, stats))
