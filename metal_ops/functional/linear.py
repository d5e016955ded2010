"""Divergences from hidden states and heads: no logits of all tokens in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import _ops
from metal_ops.functional._arguments import DivergenceStats, needs_grad, once, unit
from metal_ops.spec import DivergenceSpec


class LinearTerms(NamedTuple):
    """What `linear_divergence_with_stats` returns.

    loss is the scalar with a gradient. soft [N] and hard [N] are the divergence (with the spec's
    temperature scaling) and the cross-entropy per token, unweighted and without gradient; hard is
    zero without labels.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    stats: DivergenceStats


def local(x: Tensor) -> Tensor:
    """A DTensor gathered, its gradient averaged over the mesh; any other tensor as it is.

    Under data parallelism (FSDP) every rank has tokens of its own and the average is the
    convention; where all ranks hold the same tokens (tensor parallelism) their gradients agree.
    """
    if not torch.distributed.is_available():
        return x
    from torch.distributed.tensor import DTensor, Partial  # noqa: PLC0415 - slow, and seldom used

    if not isinstance(x, DTensor):
        return x
    mesh = x.device_mesh
    full = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())  # gloo has no average of its own
    return full


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype autocast asks for, if it is on: what F.linear would do."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check_linear(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    weights: Tensor,
    labels: Tensor | None,
) -> None:
    for name, h, w in (
        ("student", hidden, weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
            raise ValueError(
                f"{name}_hidden must be [tokens, hidden] and {name}_weight [vocab, hidden], got "
                f"{tuple(h.shape)} and {tuple(w.shape)}"
            )
    if hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same number of tokens, got "
            f"{hidden.shape[0]} and {teacher_hidden.shape[0]}"
        )
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "student and teacher must have one vocabulary, got heads of "
            f"{weight.shape[0]} and {teacher_weight.shape[0]} entries"
        )
    if weights.shape != hidden.shape[:1]:
        raise ValueError(
            f"weights must be [tokens] = [{hidden.shape[0]}], got {tuple(weights.shape)}"
        )
    if labels is not None and (labels.shape != weights.shape or labels.dtype != torch.int64):
        raise ValueError(
            f"labels must be int64 [tokens] = [{hidden.shape[0]}], got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )


def linear_divergence_with_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    spec: DivergenceSpec,
    *,
    weights: Tensor,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    want_stats: bool = True,
    backend: str = "auto",
) -> LinearTerms:
    """`linear_divergence`, and what its passes know of every token.

    Arguments and errors are those of `linear_divergence`; `LinearTerms` documents the result, in
    which the statistics are empty without want_stats.
    """
    _check_linear(student_hidden, student_weight, teacher_hidden, teacher_weight, weights, labels)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if labels is None and alpha < 1.0:
        raise ValueError(f"alpha {alpha} < 1 needs labels [tokens]; got None")
    shared = teacher_weight is student_weight and teacher_bias is student_bias
    student_weight = local(student_weight)
    student_bias = None if student_bias is None else local(student_bias)
    if not shared:
        teacher_weight = local(teacher_weight)
        teacher_bias = None if teacher_bias is None else local(teacher_bias)
    hidden, weight, bias = _autocast(student_hidden, student_weight, student_bias)
    assert hidden is not None
    assert weight is not None
    with torch.no_grad():
        teacher = _autocast(
            teacher_hidden, None if shared else teacher_weight, None if shared else teacher_bias
        )
    needs = [x is not None and needs_grad(x) for x in (hidden, weight, bias)]
    weights = weights.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    weights, size = unit(weights, weight.dtype, spec, alpha)
    loss, per_token, stats, *_ = _ops.linear_divergence(
        *[None if x is None else once(x) for x in (hidden, weight, bias)],
        *[None if x is None else x.detach() for x in teacher],
        weights,
        labels,
        student_logit_scale,
        student_softcap,
        teacher_logit_scale,
        teacher_softcap,
        alpha,
        spec.resolved_text,
        *needs,
        want_stats,
        backend,
    )
    return LinearTerms(loss * size, per_token[0], per_token[1], DivergenceStats(*stats.unbind(0)))


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    spec: DivergenceSpec,
    *,
    weights: Tensor,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of divergences from hidden states, without [tokens, vocab] logits in memory.

    With soft the divergence of `spec` and hard the cross-entropy of the labels at temperature 1:

        loss = sum_n weights_n (alpha soft_n + (1 - alpha) hard_n)

    Args:
        student_hidden: [tokens, hidden], the input of the student's output head.
        student_weight: [vocab, hidden].
        teacher_hidden: [tokens, hidden of the teacher]. No gradient.
        teacher_weight: [vocab, hidden of the teacher]. No gradient. If it is the very tensor
            `student_weight` (and the biases are too), both sides are projected in one product.
        spec: which divergence, at which temperature.
        weights: [tokens]; mask / num_items_in_batch in a trainer. No gradient.
        labels: [tokens] int64 in [0, vocab), needed when alpha < 1.
        alpha: share of the divergence, in [0, 1].
        student_bias: [vocab] or None.
        teacher_bias: [vocab] or None.
        student_logit_scale: multiplies the student's logits (Cohere, Granite).
        teacher_logit_scale: the same for the teacher.
        student_softcap: if set, logits become softcap * tanh(logits / softcap), after the scale
            (Gemma).
        teacher_softcap: the same for the teacher.
        backend: as in `divergence`.

    Returns:
        [] float32 (float64 for float64 weights), in nats.

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
    return linear_divergence_with_stats(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        spec,
        weights=weights,
        labels=labels,
        alpha=alpha,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        want_stats=False,
        backend=backend,
    ).loss
