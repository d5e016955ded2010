"""A teacher of which only some entries of each token's distribution are known."""

from dataclasses import replace

import torch
from torch import Tensor

from metal_ops import DivergenceSpec, DivergenceStats, SparseTeacher, sparse_divergence
from metal_ops.functional import WeightedTerms

STATS_ROWS = 64  # of logits at a time: statistics of a sparse teacher's tokens
CLIP_SEEN = 1e-5  # nats: with and without a clip the same sum is rounded otherwise


def sparse_terms(
    logits: Tensor, teacher: SparseTeacher, spec: DivergenceSpec, weights: Tensor
) -> WeightedTerms:
    """The soft terms of N tokens from the student's logits [N, V] and a sparse teacher.

    The teacher's entropy is that of its entries and of the rest as one: a lower bound.

    Raises:
        ValueError: the loss's temperature is not the one of the teacher's log-probabilities.
    """
    if teacher.temperature != spec.temperature:
        raise ValueError(
            f"the teacher's log-probabilities are at temperature {teacher.temperature:g} and "
            "cannot be taken at another: set the loss's temperature to it, got "
            f"{spec.temperature:g}"
        )
    per_token = sparse_divergence(logits, teacher, spec)
    stats = _stats(logits.detach(), teacher, spec, per_token.detach())
    return WeightedTerms((weights * per_token).sum(), per_token.detach(), stats)


@torch.no_grad()
def _stats(
    logits: Tensor, teacher: SparseTeacher, spec: DivergenceSpec, per_token: Tensor
) -> DivergenceStats:
    """What `divergence_with_stats` would say, as far as the teacher is known."""
    student_entropy = [
        -torch.special.xlogy(q, q).sum(-1)
        for rows in logits.split(STATS_ROWS)
        for q in [(rows.to(per_token.dtype) / spec.temperature).softmax(-1)]
    ]
    log_p = teacher.log_probs.masked_fill(teacher.ids < 0, -torch.inf)
    known = torch.cat([log_p, teacher.log_tail[..., None]], dim=-1).to(per_token.dtype)
    best = teacher.ids.gather(-1, log_p.argmax(-1, keepdim=True))
    agreement = (best[..., 0] == logits.argmax(-1)).to(per_token.dtype)
    clipped = torch.zeros_like(per_token)
    if spec.clip is not None:
        free = sparse_divergence(logits, teacher, replace(spec, clip=None))
        clipped = (free - per_token > CLIP_SEEN * spec.scale).to(per_token.dtype)
    teacher_entropy = -torch.special.xlogy(known.exp(), known.exp()).sum(-1)
    return DivergenceStats(
        torch.cat([*student_entropy, per_token[:0]]), teacher_entropy, agreement, clipped
    )
