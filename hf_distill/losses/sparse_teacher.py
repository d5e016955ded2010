"""A teacher of which only some entries of each token's distribution are known."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.models.signals import TailRule
from metal_ops import DivergenceSpec, DivergenceStats, SparseTeacher, sparse_divergence
from metal_ops.functional import WeightedTerms

STATS_ROWS = 64  # of logits at a time: statistics of a sparse teacher's tokens
CLIP_SEEN = 1e-5  # nats: with and without a clip the same sum is rounded otherwise


def sparse_terms(
    logits: Tensor, teacher: SparseTeacher, rule: TailRule, spec: DivergenceSpec, weights: Tensor
) -> WeightedTerms:
    """Compute the soft terms of N tokens from student logits [N, V] and a sparse teacher.

    The teacher's entropy is `known_entropy`, its largest entry the largest that is known.

    Args:
        logits: [N, V].
        teacher: at the spec's temperature, or with power sums that reach it.
        rule: how its tail is read.
        spec: the divergence.
        weights: [N].

    Raises:
        ValueError: the teacher does not know the loss's temperature, or as `sparse_divergence`.
    """
    teacher = teacher.at(spec.temperature)
    # a token without weight may be infinite
    reading: dict[str, Any] = {"tail": rule.tail, "max_ratio": rule.max_ratio, "mask": weights != 0}
    per_token = sparse_divergence(logits, teacher, spec, **reading)
    stats = _stats(logits.detach(), teacher, reading, spec, per_token.detach())
    return WeightedTerms((weights * per_token).sum(), per_token.detach(), stats)


def known_entropy(teacher: SparseTeacher, dtype: torch.dtype) -> Tensor:
    """Return [N] the entropy in nats, as far as the teacher is known, at its temperature.

    It is that of its entries and of the rest as one, a lower bound. Where there are samples, their
    estimate of the entropy within the rest is added.
    """
    log_p = teacher.log_probs.masked_fill(teacher.ids < 0, -torch.inf)
    known = torch.cat([log_p, teacher.log_tail[..., None]], dim=-1).to(dtype)
    entropy = -torch.special.xlogy(known.exp(), known.exp()).sum(-1)
    if teacher.samples is None:
        return entropy
    ids, drawn, log_weights = teacher.samples
    share = (drawn - teacher.log_tail[..., None]).to(dtype)
    weight = (log_weights + drawn).to(dtype).exp().where(ids >= 0, 0.0)
    return entropy - (weight * share).where(weight > 0, 0.0).sum(-1)


@torch.no_grad()
def _stats(
    logits: Tensor,
    teacher: SparseTeacher,
    reading: Mapping[str, Any],
    spec: DivergenceSpec,
    per_token: Tensor,
) -> DivergenceStats:
    """Return what `divergence_with_stats` would say, as far as the teacher is known."""
    dtype = per_token.dtype
    student_entropy = [
        -torch.special.xlogy(q, q).sum(-1)
        for rows in logits.split(STATS_ROWS)
        for q in [(rows.to(dtype) / spec.temperature).softmax(-1)]
    ]
    log_p = teacher.log_probs.masked_fill(teacher.ids < 0, -torch.inf)
    ids, largest = teacher.ids, log_p
    if teacher.samples is not None:
        drawn = teacher.samples.log_probs.masked_fill(teacher.samples.ids < 0, -torch.inf)
        ids = torch.cat([ids, teacher.samples.ids], dim=-1)
        largest = torch.cat([largest, drawn.to(largest.dtype)], dim=-1)
    best = ids.gather(-1, largest.argmax(-1, keepdim=True))
    agreement = (best[..., 0] == logits.argmax(-1)).to(dtype)
    clipped = torch.zeros_like(per_token)
    if spec.clip is not None:
        free = replace(spec, clip=None)
        free = sparse_divergence(logits, teacher, free, **reading)
        clipped = (free - per_token > CLIP_SEEN * spec.scale).to(dtype)
    return DivergenceStats(
        torch.cat([*student_entropy, per_token[:0]]),
        known_entropy(teacher, dtype),
        agreement,
        clipped,
    )
