"""From per-token divergences to the scalar the optimizer sees."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.alignment import IGNORE_INDEX
from hf_distill.heads import Head, Signal
from metal_ops import (
    DivergenceSpec,
    DivergenceStats,
    SparseTeacher,
    reference,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.functional import LinearTerms, WeightedTerms, linear_divergence_with_stats

STATS_ROWS = 64  # of logits at a time: statistics of a sparse teacher's tokens
CLIP_SEEN = 1e-5  # nats: with and without a clip the same sum is rounded otherwise


def token_weights(
    num_tokens: int, num_items_in_batch: Tensor | int, num_processes: int, device: torch.device
) -> Tensor:
    """[num_tokens] float32 weights that make a sum over tokens the mean over an optimizer step.

    Args:
        num_tokens: N, the tokens of this micro-batch on this process.
        num_items_in_batch: scored tokens of the whole optimizer step, over all its micro-batches
            and, if the Trainer gathers them, all processes.
        num_processes: processes whose gradients are averaged although the count is of all of them;
            1 if the count is local.
        device: of the result.
    """
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return torch.ones(num_tokens, device=device) * (num_processes / num_items_in_batch)


@dataclass(frozen=True)
class Objective:
    """alpha * soft + (1 - alpha) * hard: a divergence to the teacher, and cross-entropy.

    Args:
        spec: the divergence.
        alpha: share of the divergence, in [0, 1].
    """

    spec: DivergenceSpec
    alpha: float

    def from_hidden(
        self, hidden: Tensor, head: Head, teacher: Signal, targets: Tensor, weights: Tensor
    ) -> LinearTerms:
        """Terms of N tokens from the student's hidden states [N, H] and its head.

        The teacher's signal must be hidden states too; targets is [N] int64, weights [N].
        """
        assert teacher.hidden is not None
        assert teacher.head is not None
        return linear_divergence_with_stats(
            hidden,
            head.weight,
            teacher.hidden,
            teacher.head.weight,
            self.spec,
            weights=weights,
            labels=targets if self.alpha < 1.0 else None,
            alpha=self.alpha,
            student_bias=head.bias,
            teacher_bias=teacher.head.bias,
            student_logit_scale=head.logit_scale,
            teacher_logit_scale=teacher.head.logit_scale,
            student_softcap=head.softcap,
            teacher_softcap=teacher.head.softcap,
        )

    def from_logits(
        self,
        logits: Tensor,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_loss: Tensor | None = None,
    ) -> LinearTerms:
        """Terms of N tokens from the student's logits [N, V].

        hard_loss, a scalar already normalised over the optimizer step, replaces the cross-entropy
        (label smoothing, the user's compute_loss_func).
        """
        if teacher.sparse is not None:
            soft = self.from_sparse(logits, teacher.sparse, weights)
        else:
            soft = weighted_divergence(logits, teacher.dense(), self.spec, weights=weights)
        loss = self.alpha * soft.loss
        hard = torch.zeros_like(soft.per_token)
        if self.alpha < 1.0:
            hard = F.cross_entropy(logits.float(), targets, reduction="none")
            if hard_loss is None:
                hard_loss = (weights * hard).sum()
            loss = loss + (1 - self.alpha) * hard_loss
        return LinearTerms(loss, soft.per_token, hard.detach(), soft.stats)

    def from_sparse(self, logits: Tensor, teacher: SparseTeacher, weights: Tensor) -> WeightedTerms:
        """The soft terms of N tokens from the student's logits [N, V] and a sparse teacher.

        The teacher's entropy is that of its entries and of the rest as one: a lower bound.

        Raises:
            ValueError: the loss's temperature is not the one of the teacher's log-probabilities.
        """
        if teacher.temperature != self.spec.temperature:
            raise ValueError(
                f"the teacher's log-probabilities are at temperature {teacher.temperature:g} and "
                "cannot be taken at another: set the loss's temperature to it, got "
                f"{self.spec.temperature:g}"
            )
        per_token = sparse_divergence(logits, teacher, self.spec)
        stats = _sparse_stats(logits.detach(), teacher, self.spec, per_token.detach())
        return WeightedTerms((weights * per_token).sum(), per_token.detach(), stats)


@torch.no_grad()
def _sparse_stats(
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


def assert_finite(terms: LinearTerms) -> None:
    """Stop at a loss that is not a number, saying which side it comes from.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    if bool(torch.isfinite(terms.loss)):
        return
    sides = {
        "student logits": terms.stats.student_entropy,
        "teacher logits": terms.stats.teacher_entropy,
    }
    bad = {name: int((~torch.isfinite(entropy)).sum()) for name, entropy in sides.items()}
    named = [f"{name} are NaN at {n} of {len(terms.soft)} tokens" for name, n in bad.items() if n]
    infinite = int((~torch.isfinite(terms.soft)).sum())
    if infinite and not named:
        named = [
            f"the divergence is infinite at {infinite} of {len(terms.soft)} tokens "
            "(the teacher gives a token probability 0)"
        ]
    cause = " and ".join(named) or "the hard loss is not finite"
    raise FloatingPointError(f"the loss must be finite, got {terms.loss.item()}: {cause}")


def _reduce(values: Tensor, mask: Tensor | None, rows: int, reduction: str) -> Tensor:
    """`generalized_jsd_loss`'s reductions of unreduced or per-token values."""
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
    """Generalized Jensen-Shannon divergence, with the signature and conventions of OPSD.

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
        loss = weighted_divergence(
            student_logits, teacher_logits, spec, weights=weights, want_stats=False
        ).loss
        empty = reduction != "sum" and mask is not None
        return torch.where(total == 0, torch.nan, loss) if empty else loss
    if logits_are_probs:
        log_q, log_p = (x.clamp_min(1e-8).log() for x in (student_logits, teacher_logits))
    else:
        log_q, log_p = (
            torch.log_softmax(x / temperature, dim=-1) for x in (student_logits, teacher_logits)
        )
    resolved = spec.resolved()
    values = reference.entries(log_p, log_q, resolved.kind, resolved.beta)
    values = values if token_clip is None else values.clamp(max=token_clip)
    return _reduce(values if mask is None else values[mask], mask, rows, reduction)
