"""Computes divergences from logits, per token or as one weighted sum."""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import _ops
from metal_ops.functional._arguments import (
    DivergenceStats,
    check_logits,
    flat_mask,
    forbid_second_derivative,
    form_gradient,
    named_stats,
    needs_grad,
    scale_for_float16,
)
from metal_ops.spec import DivergenceSpec


class WeightedTerms(NamedTuple):
    """Holds what `weighted_divergence` returns.

    loss is the scalar with a gradient. per_token [...] is the divergence, unweighted and without
    gradient. stats are None if they were not asked for, and zero, like per_token, where the weight
    is zero.
    """

    loss: Tensor
    per_token: Tensor
    stats: DivergenceStats | None


def _divergence(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    mask: Tensor | None,
    backend: str,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    check_logits(student, teacher)
    shape = student.shape[:-1]
    per_token, stats, _ = _ops.divergence(
        student=forbid_second_derivative(student).reshape(-1, student.shape[-1]),
        teacher=teacher.detach().reshape(-1, teacher.shape[-1]),
        mask=flat_mask(mask, shape),
        spec=spec.resolved_text,
        want_grad=form_gradient(student),
        want_stats=want_stats,
        backend=backend,
    )
    return per_token.view(shape), stats.view(len(stats), *shape) if want_stats else stats


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: DivergenceSpec,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the divergence between two softmax distributions, per token.

    Args:
        student_logits: [..., vocab]; float32, bfloat16, float16 or float64.
        teacher_logits: [..., vocab]; may differ in dtype. Receives no gradient.
        spec: which divergence, at which temperature.
        mask: [...] bool or None; where False the result and its gradient are zero and nothing is
            computed.
        backend: "auto" or a name of `available_backends`. "auto" takes the first that supports the
            tensors, and where a kernel of it does not compile or start, with a warning, the next;
            a named backend is used or the call raises.

    Returns:
        [...] float32 (float64 for float64 student logits), in nats.

    Raises:
        ValueError: shapes, devices or the mask disagree; the backend's name is unknown.
        NotImplementedError: no allowed backend supports the tensors; the message gives each reason.
        RuntimeError: a second derivative is asked for; a kernel of a named backend failed; or
            METAL_OPS_CHECK is set and two backends disagree.

    Numerics:
        float32 inside for every input dtype but float64. For float32 and float64 the gradient is
        formed with the loss and kept, one [tokens, vocab] tensor; for float16 and bfloat16 it is
        computed in the backward, so that it is rounded once (`weighted_divergence` forms it at once
        for every dtype). An entry that is -inf on both sides contributes nothing. Where the
        teacher alone is -inf, the reverse KL is infinite, where the student alone is, the forward
        KL; the JSD is finite in both cases. A NaN stays in its row.

    Source:
        `DivergenceSpec` names the kinds; `metal_ops.reference` defines them. The generalized JSD
        is Eq. (1) of Agarwal et al. 2024, arXiv:2306.13649; the skewed KLs are Eq. (4) and (5) of
        Ko et al. 2024, arXiv:2402.03898.
    """
    return _divergence(student_logits, teacher_logits, spec, mask, backend, False)[0]


def divergence_with_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: DivergenceSpec,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, DivergenceStats]:
    """Compute `divergence`, and entropies, top-1 agreement and clipping from the same passes.

    Arguments, errors and first result are those of `divergence`; the second holds [...] tensors.
    """
    per_token, stats = _divergence(student_logits, teacher_logits, spec, mask, backend, True)
    return per_token, DivergenceStats(*stats.unbind(0))


def weighted_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: DivergenceSpec,
    *,
    weights: Tensor,
    stats: bool = False,
    backend: str = "auto",
) -> WeightedTerms:
    """Sum weights * divergence, and form the gradient in one go with the loss.

    The faster way to a scalar: nothing is left for the backward but to pass the gradient on.

    Args:
        student_logits: [..., vocab], as in `divergence`.
        teacher_logits: [..., vocab].
        spec: which divergence, at which temperature.
        weights: [...]; mask / num_items_in_batch in a trainer. No gradient. Nothing is computed
            for a token of weight 0.
        stats: whether to compute the statistics, which takes more passes over the logits.
        backend: as in `divergence`.

    Returns:
        `WeightedTerms`; the loss is [] float32 (float64 for float64 student logits), in nats.

    Raises:
        ValueError: as `divergence`, or weights has another shape than the tokens.
        NotImplementedError, RuntimeError: as `divergence`.

    Numerics:
        As `divergence`. A float16 or bfloat16 gradient is rounded once, and a second time if the
        upstream gradient of the loss is not a power of two.
    """
    check_logits(student_logits, teacher_logits)
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    if weights.shape != shape:
        raise ValueError(f"weights must be {list(shape)} as the tokens, got {list(weights.shape)}")
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    weights = weights.detach().reshape(-1).to(wide)
    weights, size = scale_for_float16(weights, student_logits.dtype, spec)
    found = _ops.WeightedResult(
        *_ops.weighted_divergence(
            student=forbid_second_derivative(student_logits).reshape(-1, vocab),
            teacher=teacher_logits.detach().reshape(-1, vocab),
            weights=weights,
            spec=spec.resolved_text,
            want_grad=needs_grad(student_logits),
            want_stats=stats,
            backend=backend,
        )
    )
    values = found.stats.view(len(found.stats), *shape) if stats else found.stats
    per_token = found.per_token.view(shape)
    return WeightedTerms(found.loss * size, per_token, named_stats(values, stats))
