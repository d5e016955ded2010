"""Divergences to a teacher of which a few entries are known."""

import torch
from torch import Tensor

from metal_ops import _ops
from metal_ops.functional._arguments import flat_mask, form_gradient, once
from metal_ops.functional.sparse_teacher import SparseTeacher
from metal_ops.spec import DivergenceSpec


def _largest(teacher: SparseTeacher, spec: DivergenceSpec) -> SparseTeacher:
    """The teacher cut to the spec's top_k; what is cut joins the tail."""
    ids, log_probs, log_tail, temperature, *_ = teacher
    if spec.top_k is None or spec.top_k >= ids.shape[-1]:
        return teacher
    log_probs = log_probs.masked_fill(ids < 0, -torch.inf)
    log_probs, order = log_probs.sort(dim=-1, descending=True)
    cut = torch.cat([log_probs[..., spec.top_k :], log_tail[..., None]], dim=-1)
    kept = slice(0, spec.top_k)
    ids = ids.gather(-1, order[..., kept])
    return SparseTeacher(ids, log_probs[..., kept], cut.logsumexp(-1), temperature)


def sparse_divergence(
    student_logits: Tensor,
    teacher: SparseTeacher,
    spec: DivergenceSpec,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence per token to a teacher of which a few entries are known.

    Args:
        student_logits: [..., vocab]; float32, bfloat16, float16 or float64.
        teacher: its entries and the mass of the rest, at the spec's temperature.
        spec: which divergence. Its support is "full" (all entries given count) or "teacher_topk"
            (the top_k most probable of them). `missing` says what becomes of the others: "tail"
            makes them one category on both sides, "renormalise" and "zero" leave them out.
        mask: [...] bool or None; where False nothing is computed.
        backend: as in `divergence`.

    Returns:
        [...] float32 (float64 for float64 student logits), in nats.

    Raises:
        ValueError: shapes, temperatures or the mask disagree, ids are not int64 or reach beyond
            the vocabulary, or the support depends on the student.
        NotImplementedError, RuntimeError: as `divergence`.

    Numerics:
        As `divergence`. The student's tail is a sum over the other entries, never one less the
        kept ones. No [tokens, vocab] tensor of the teacher is built.
    """
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    ids, log_probs, log_tail = teacher[:3]
    if ids.shape[:-1] != shape or log_probs.shape != ids.shape or log_tail.shape != shape:
        raise ValueError(
            f"ids and log_probs must be [{', '.join(map(str, shape))}, K] and log_tail "
            f"{list(shape)}, got {list(ids.shape)}, {list(log_probs.shape)}, {list(log_tail.shape)}"
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}")
    if spec.support not in ("full", "teacher_topk"):
        raise ValueError(
            "the support of a sparse teacher must be 'full' or 'teacher_topk', got "
            f"{spec.support!r}"
        )
    if teacher.temperature != spec.temperature:
        raise ValueError(
            "the teacher's log-probabilities must be taken at the spec's temperature "
            f"{spec.temperature}, got {teacher.temperature}"
        )
    if not torch.compiler.is_compiling() and ids.numel() and int(ids.max()) >= vocab:
        raise ValueError(f"ids must be below the vocabulary of {vocab}, got {int(ids.max())}")
    teacher = _largest(teacher, spec)
    mask = flat_mask(mask, shape)
    if mask is None:
        mask = torch.ones(shape.numel(), dtype=torch.bool, device=student_logits.device)
    per_token, _ = _ops.sparse_divergence(
        once(student_logits).reshape(-1, vocab),
        teacher.ids.reshape(-1, teacher.ids.shape[-1]),
        teacher.log_probs.detach().reshape(-1, teacher.ids.shape[-1]),
        teacher.log_tail.detach().reshape(-1),
        mask.to(torch.float32),
        spec.resolved_text,
        form_gradient(student_logits),
        backend,
    )
    return per_token.view(shape)
