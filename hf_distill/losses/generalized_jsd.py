"""The generalized Jensen-Shannon divergence as a function of logits, as the OPSD release has it."""

import torch
from torch import Tensor

from hf_distill.data.sides import IGNORE_INDEX
from metal_ops import DivergenceSpec, reference, weighted_divergence


def _reduce(values: Tensor, mask: Tensor | None, rows: int, reduction: str) -> Tensor:
    """Reduce unreduced or per-token values as `generalized_jsd_loss` is asked to."""
    if reduction == "batchmean":
        return values.sum() / (rows if mask is None else mask.sum())
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.mean()
    return values


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    top_k: int | None = None,
    token_clip: float | None = None,
) -> Tensor:
    """Compute the generalized Jensen-Shannon divergence, with OPSD's signature and conventions.

    Both logits are divided by temperature, without a temperature² factor. beta 0 is forward KL,
    KL(teacher || student), beta 1 reverse KL, KL(student || teacher); between them, with
    M = (1 - beta) P_student + beta P_teacher, beta KL(teacher || M) + (1 - beta) KL(student || M).

    Args:
        student_logits: [B, T, V].
        teacher_logits: [B, T, V].
        labels: [B, T], -100 is ignored; not shifted.
        beta: in [0, 1].
        temperature: > 0.
        reduction: "batchmean" divides the sum by the number of labels that are not -100, or by B
            without labels; "mean" divides by the number of kept entries (tokens times V, or times
            top_k); "sum"; "none" returns the entries, [B, T, V], or [tokens, V] with labels.
        logits_are_probs: the inputs are probabilities: their log, clamped at 1e-8, is used, and
            temperature and top_k are not.
        top_k: keep the teacher's top_k entries and renormalise both sides over them.
        token_clip: upper bound of each vocabulary entry of the divergence, in nats.

    Returns:
        [] for the reductions, else the entries. With labels that are all -100, "batchmean" and
        "mean" are 0 / 0 = nan, as in the original.

    Raises:
        ValueError: reduction is unknown, or beta or temperature is out of range.

    Numerics:
        A scalar without logits_are_probs runs on the fused op: no [B, T, V] tensor but the
        student's gradient is kept, and float16 and bfloat16 are computed in float32. The teacher
        gets a gradient only if it requires one, which takes the unfused path.

    Source:
        `OPSDTrainer.generalized_jsd_loss` of github.com/siyan-zhao/OPSD; Eq. (1) of
        arXiv:2306.13649.
    """
    if reduction not in ("batchmean", "sum", "mean", "none"):
        raise ValueError(
            f"reduction must be 'batchmean', 'sum', 'mean' or 'none', got {reduction!r}"
        )
    spec = DivergenceSpec("jsd", beta, temperature, clip=token_clip)
    if top_k is not None and top_k > 0 and not logits_are_probs:
        kept = teacher_logits.topk(top_k, dim=-1).indices
        student_logits, teacher_logits = (
            student_logits.gather(-1, kept),
            teacher_logits.gather(-1, kept),
        )
    mask = None if labels is None else labels != IGNORE_INDEX
    rows, entries_per_token = student_logits.shape[0], student_logits.shape[-1]
    if not (reduction == "none" or logits_are_probs or teacher_logits.requires_grad):
        wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        counted = torch.ones_like(student_logits[..., 0]) if mask is None else mask
        counted = counted.to(wide)
        total = counted.sum()
        weights = counted / total.clamp_min(1) if reduction != "sum" else counted
        if reduction == "mean":
            weights = weights / entries_per_token
        elif reduction == "batchmean" and mask is None:
            weights = counted / rows
        loss = weighted_divergence(student_logits, teacher_logits, spec, weights=weights).loss
        empty = reduction != "sum" and mask is not None
        return torch.where(total == 0, torch.nan, loss) if empty else loss
    if logits_are_probs:
        log_q, log_p = (x.clamp_min(1e-8).log() for x in (student_logits, teacher_logits))
    else:
        log_q, log_p = (
            torch.log_softmax(x / temperature, dim=-1) for x in (student_logits, teacher_logits)
        )
    resolved = spec.resolved()
    if token_clip is None:
        values = reference.entries(log_p, log_q, resolved.kind, resolved.beta)
    else:
        values = reference.clipped_entries(log_p, log_q, resolved, token_clip)
    return _reduce(values if mask is None else values[mask], mask, rows, reduction)
