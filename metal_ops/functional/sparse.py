"""Computes divergences to a teacher of which a few entries are known."""

import functools
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metal_ops import _sparse_ops
from metal_ops.functional._arguments import flat_mask, forbid_second_derivative, form_gradient
from metal_ops.functional.sparse_teacher import SparseTeacher, TailSamples
from metal_ops.spec import DivergenceSpec

ASSERTING = ("cuda", "xpu")
TAILS = ("auto", "sampled", "bucket", "renorm")

logger = logging.getLogger("metal_ops")


def _largest(teacher: SparseTeacher, spec: DivergenceSpec) -> SparseTeacher:
    """Cut the teacher to the spec's top_k; what is cut joins the tail."""
    ids, log_probs, log_tail, temperature, *_ = teacher
    if spec.top_k is None or spec.top_k >= ids.shape[-1]:
        return teacher
    log_probs = log_probs.masked_fill(ids < 0, -torch.inf)
    log_probs, order = log_probs.sort(dim=-1, descending=True)
    cut = torch.cat([log_probs[..., spec.top_k :], log_tail[..., None]], dim=-1)
    kept = slice(0, spec.top_k)
    ids = ids.gather(-1, order[..., kept])
    return SparseTeacher(ids, log_probs[..., kept], cut.logsumexp(-1), temperature)


@functools.cache
def _warn_of_reverse(kind: str) -> None:
    if kind not in ("reverse_kl", "mixed_kl"):
        return
    logger.warning(
        "%s to samples of a teacher's tail: they lie where the teacher has its mass and say little "
        "of where a far student has its own; a JSD or the forward KL does not need to know that",
        kind,
    )


def _check_sampled(teacher: SparseTeacher, spec: DivergenceSpec) -> None:
    if teacher.samples is None:
        raise ValueError("tail 'sampled' needs a teacher with samples of its tail, got none")
    if spec.support != "full" or spec.missing != "tail":
        raise ValueError(
            "tail 'sampled' stands for every entry: it needs support 'full' and missing 'tail', "
            f"got {spec.support!r} and {spec.missing!r}"
        )
    if spec.clip is not None and spec.clip_level == "vocab_entry":
        raise ValueError(
            "clip_level 'vocab_entry' bounds every entry, samples know only some of the tail: use "
            "clip_level 'token' or 'token_rescale', or tail='bucket'; got the bound "
            f"{spec.clip:g}"
        )


def _reading(teacher: SparseTeacher, spec: DivergenceSpec, tail: str) -> tuple[str, DivergenceSpec]:
    """Return the tail rule without "auto", and the spec it asks for."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}")
    if tail == "auto":
        whole = spec.support == "full" and spec.missing == "tail"
        tail = "sampled" if whole and teacher.samples is not None else "bucket"
    elif tail == "bucket" and spec.missing != "tail":
        raise ValueError(f"tail 'bucket' needs missing 'tail', got {spec.missing!r}")
    elif tail == "renorm":
        if spec.missing == "zero":
            raise ValueError("tail 'renorm' needs missing 'renormalise' or 'tail', got 'zero'")
        spec = replace(spec, missing="renormalise")
    if tail == "sampled":
        _check_sampled(teacher, spec)
        if not torch.compiler.is_compiling():
            _warn_of_reverse(spec.resolved().kind)
    elif teacher.ids.shape[-1] == 0:
        raise ValueError(
            f"a teacher without entries has a loss by its samples only, got the tail rule {tail!r}"
            f" with support {spec.support!r} and missing {spec.missing!r}"
        )
    return tail, spec


def _check_ids(name: str, ids: Tensor, vocab: int) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {ids.dtype}")
    # gathers on these devices stop at such ids themselves, and asking for the largest would wait
    asks = ids.device.type not in ASSERTING and not torch.compiler.is_compiling()
    if asks and ids.numel() and int(ids.max()) >= vocab:
        raise ValueError(f"{name} must be below the vocabulary of {vocab}, got {int(ids.max())}")


def _check_samples(samples: TailSamples, shape: torch.Size, vocab: int) -> None:
    size = samples.ids.shape
    if size[:-1] != shape or any(x.shape != size for x in samples):
        raise ValueError(
            f"the samples' ids, log_probs and log_weights must be [{', '.join(map(str, shape))}, "
            f"n], got {', '.join(str(list(x.shape)) for x in samples)}"
        )
    _check_ids("the samples' ids", samples.ids, vocab)


def sparse_divergence(
    student_logits: Tensor,
    teacher: SparseTeacher,
    spec: DivergenceSpec,
    *,
    tail: str = "auto",
    max_ratio: float | None = 4.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the divergence per token to a teacher of which a few entries are known.

    Args:
        student_logits: [..., vocab]; float32, bfloat16, float16 or float64.
        teacher: its entries and the mass of the rest, at the spec's temperature.
        spec: which divergence. Its support is "full" (all entries given count) or "teacher_topk"
            (the top_k most probable of them). `missing` says what becomes of the others: "tail"
            makes them one category on both sides, "renormalise" and "zero" leave them out.
        tail: "bucket": what `missing` "tail" says, one category. "sampled": the category, and what
            it lacks estimated from the teacher's samples; needs support "full". "renorm": as
            `missing` "renormalise". "auto": "sampled" where the teacher has samples and the spec
            has support "full" and missing "tail", else what the spec says.
        max_ratio: >= 1 or None, for "sampled". Where the student's share of its tail is more than
            this many times the teacher's share of its own, a draw's gradient is bounded: forward
            KL and soft cross-entropy give it the weight of max_ratio, the other kinds none. The
            value is never bounded, so it is the unbiased estimate; the gradient is unbiased with
            None.
        mask: [...] bool or None; where False nothing is computed.
        backend: as in `divergence`.

    Returns:
        [...] float32 (float64 for float64 student logits), in nats.

    Raises:
        ValueError: shapes, temperatures or the mask disagree, ids are not int64 or reach beyond
            the vocabulary (on CUDA and XPU PyTorch's own assertion there), the support depends on
            the student, or the tail rule contradicts the spec or the teacher (a clip of vocabulary
            entries cannot be sampled).
        NotImplementedError, RuntimeError: as `divergence`.

    Numerics:
        As `divergence`. The student's tail is a sum over the other entries, never one less the
        kept ones. No [tokens, vocab] tensor of the teacher is built. The estimate is never
        negative, and it and its gradient are zero at a student whose tail is shaped like the
        teacher's. A clip of tokens bounds the sum of both parts.

    Source:
        The correction is the Bregman divergence of the kind's generator between a tail entry and
        the tail as one category; `metal_ops.reference.bregman` is its definition.
    """
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    ids, log_probs, log_tail = teacher[:3]
    if ids.shape[:-1] != shape or log_probs.shape != ids.shape or log_tail.shape != shape:
        raise ValueError(
            f"ids and log_probs must be [{', '.join(map(str, shape))}, K] and log_tail "
            f"{list(shape)}, got {list(ids.shape)}, {list(log_probs.shape)}, {list(log_tail.shape)}"
        )
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
    if max_ratio is not None and not max_ratio >= 1.0:
        raise ValueError(f"max_ratio must be at least 1, or None, got {max_ratio}")
    _check_ids("ids", ids, vocab)
    tail, spec = _reading(teacher, spec, tail)
    drawn = teacher.samples if tail == "sampled" else None
    if drawn is not None:
        _check_samples(drawn, shape, vocab)
    teacher, mask = _largest(teacher, spec), flat_mask(mask, shape)
    if mask is None:
        mask = torch.ones(shape.numel(), dtype=torch.bool, device=student_logits.device)
    settings = form_gradient(student_logits), backend
    student_logits = forbid_second_derivative(student_logits)
    per_token = _call(student_logits, teacher, drawn, mask, spec, max_ratio, settings)
    return per_token.view(shape)


def _call(
    student_logits: Tensor,
    teacher: SparseTeacher,
    drawn: TailSamples | None,
    mask: Tensor,
    spec: DivergenceSpec,
    max_ratio: float | None,
    settings: tuple[bool, str],
) -> Tensor:
    """Compute the losses [N] by the op that fits, given [N, ...] tensors."""

    def rows(x: Tensor) -> Tensor:
        return x.detach().reshape(len(mask), x.shape[-1])

    want_grad, backend = settings
    known: dict[str, Any] = {
        "student": student_logits.reshape(len(mask), student_logits.shape[-1]),
        "ids": rows(teacher.ids),
        "log_probs": rows(teacher.log_probs),
        "log_tail": teacher.log_tail.detach().reshape(-1),
        "weights": mask.to(torch.float32),
        "spec": spec.resolved_text,
        "want_grad": want_grad,
        "backend": backend,
    }
    if drawn is None:
        return _sparse_ops.sparse_divergence(**known)[0]
    return _sparse_ops.sampled_divergence(
        **known,
        draws=rows(drawn.ids),
        draw_log_probs=rows(drawn.log_probs),
        draw_log_weights=rows(drawn.log_weights),
        max_ratio=math.inf if max_ratio is None else float(max_ratio),
    )[0]
