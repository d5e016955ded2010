"""The divergence between teacher and student over the vocabulary, and cross-entropy."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.base import Loss, Terms, Tokens, mixed
from hf_distill.losses.sparse_teacher import sparse_terms
from hf_distill.losses.split_heads import split_heads
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec, linear_divergence, weighted_divergence
from metal_ops.functional import DivergenceStats


@dataclass
class ClipConfig:
    """Bounds the divergence.

    Raises:
        ValueError: a value is out of range.
    """

    bound: float | None = field(
        default=None,
        metadata={
            "help": "The limit of the soft loss in nats, greater than 0. With None, nothing is "
            "clipped."
        },
    )
    level: str = field(
        default="vocab_entry",
        metadata={
            "help": "Says what is limited: vocab_entry cuts each entry of the sum over the "
            "vocabulary, as the OPSD release does, and can reverse gradients. token cuts the loss "
            "of a token, whose gradient is then 0. token_rescale scales it down to the bound and "
            "keeps the direction of its gradient."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        DivergenceSpec("jsd", clip=self.bound, clip_level=self.level)


NEAREST_BETA = 1e-12
"""Nearer than this to 0 or 1 the KL itself is taken.

Until there the ops lose no digits: against float64, in float32, with p and q from a hundredth to
several nats apart, the quotient is off by 2e-4 at most (at beta 0.003) and by 4e-7 below 1e-4, its
gradient never by more than at 0.5. Farther out beta times a small probability would leave float32's
normal numbers. The quotient differs from the KL by about beta exp(log p - log q), so at 1e-12 only
where the two are more than some 20 nats apart.
"""


def normalised_jsd(spec: DivergenceSpec) -> tuple[DivergenceSpec, float]:
    """Return a spec and a factor whose product is JSD / (beta (1 - beta)), clip included.

    With p the teacher, q the student and m = beta p + (1 - beta) q it is KL(p || m) / (1 - beta) +
    KL(q || m) / beta, which tends to KL(p || q) as beta goes to 0 and to KL(q || p) as it goes to
    1; four times the JSD at 0.5. The JSD itself goes to 0 there.

    Args:
        spec: of kind "jsd"; its clip bounds the quotient.

    Raises:
        ValueError: the spec is of another kind.
    """
    if spec.kind != "jsd":
        raise ValueError(f"the kind must be 'jsd', got {spec.kind!r}")
    if not NEAREST_BETA <= spec.beta <= 1 - NEAREST_BETA:
        return replace(spec, beta=float(round(spec.beta))), 1.0
    size = spec.beta * (1 - spec.beta)
    return replace(spec, clip=None if spec.clip is None else spec.clip * size), 1 / size


@dataclass(frozen=True)
class DivergenceLoss(Loss):
    """Computes alpha * soft + (1 - alpha) * hard: a divergence to the teacher, cross-entropy.

    From hidden states of both sides one fused operation computes both, and their gradients.

    Args:
        spec: the divergence.
        alpha: share of the divergence, in [0, 1].
        factor: what the divergence is multiplied by, > 0.
        measures_hard: whether the cross-entropy is computed although alpha is 1, as where other
            steps have another alpha.
    """

    needs_dense: ClassVar[bool] = False
    chunks_logits: ClassVar[bool] = False  # the operation forms no second tensor of their size
    copies_logits: ClassVar[bool] = False

    spec: DivergenceSpec
    alpha: float = 1.0
    factor: float = field(default=1.0, kw_only=True)
    measures_hard: bool = field(default=False, kw_only=True)

    def __call__(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms of N tokens, see `Loss`.

        Weights of the soft loss that differ from the others cost a second projection of the
        student, unless the teacher's signal is sparse.
        """
        if teacher.sparse is not None:
            known = teacher.sparse.at(self.spec.temperature)
            return super().__call__(student, replace(teacher, sparse=known), tokens)
        if student.hidden is None or teacher.hidden is None:
            return super().__call__(student, teacher, tokens)
        return self._fused(student, teacher, tokens)

    def _fused(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms from hidden states of both sides."""
        assert student.hidden is not None
        assert teacher.hidden is not None
        weights = tokens.soft_weights
        if weights is tokens.weights or self.alpha == 1.0:
            apart = False
        else:  # comparing waits for the device, a second projection takes longer
            apart = not torch.equal(weights, tokens.weights)
        together = self.wants_hard and not apart
        fused, alpha = self._fused_weights(weights, together)
        heads = split_heads(student, teacher, self.spec)
        terms = linear_divergence(
            student.hidden,
            heads.student,
            teacher.hidden,
            heads.teacher,
            self.spec,
            weights=fused,
            labels=tokens.targets if together else None,
            alpha=alpha,
            stats=True,
            **heads.options,
        )
        metrics = self._metrics(terms.soft, terms.stats)
        if together:
            metrics["hard"] = terms.hard
        if not apart:
            return Terms(terms.loss, metrics)
        hard_sum, metrics["hard"] = self._hard(student, tokens)
        return Terms(mixed(self.alpha, terms.loss, hard_sum), metrics)

    def _hard(self, student: Signal, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy alone: the sum [] with a gradient, and of each token [N]."""
        heads = split_heads(student, student, DivergenceSpec("forward_kl"))
        if not heads.options:
            return chunks.cross_entropy(student, tokens.targets, tokens.weights)
        assert student.hidden is not None
        # of heads in pieces the same operation computes it, with itself for a teacher
        side, given = (student.hidden, heads.student), {"labels": tokens.targets, "alpha": 0.0}
        kl = DivergenceSpec("forward_kl")
        terms = linear_divergence(
            *side, *side, kl, weights=tokens.weights, **given, **heads.options
        )
        return terms.loss, terms.hard

    def _fused_weights(self, weights: Tensor, with_hard: bool) -> tuple[Tensor, float]:
        """Return weights and alpha with which the op, which knows no factor, gives the same sum."""
        if not with_hard:
            return self._times(weights), 1.0
        if self.factor == 1.0:
            return weights, self.alpha
        soft = self.alpha * self.factor
        total = soft + (1 - self.alpha)
        return weights * total, soft / total

    def _times(self, values: Tensor) -> Tensor:
        return values if self.factor == 1.0 else values * self.factor

    def _metrics(self, per_token: Tensor, stats: DivergenceStats | None) -> dict[str, Tensor]:
        assert stats is not None
        metrics = {"soft": self._times(per_token), **stats._asdict()}
        if self.spec.clip is None:
            del metrics["clipped"]
        return metrics

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the divergence of n tokens, from the student's logits [n, V]."""
        weights = self._times(tokens.soft_weights)
        if teacher.sparse is not None:
            terms = sparse_terms(logits, teacher.sparse, teacher.tail, self.spec, weights)
        else:
            dense = teacher.dense()
            terms = weighted_divergence(logits, dense, self.spec, weights=weights, stats=True)
        return Terms(terms.loss, self._metrics(terms.per_token, terms.stats))
