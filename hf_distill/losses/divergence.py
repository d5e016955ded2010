"""The divergence between teacher and student over the vocabulary, and cross-entropy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import chunks
from hf_distill.losses.sparse_teacher import sparse_terms
from hf_distill.models.signals import Head, Signal
from metal_ops import DivergenceSpec, weighted_divergence
from metal_ops.functional import LinearTerms, linear_divergence_with_stats
from metal_ops.functional.linear import DivergenceStats


@dataclass
class ClipConfig:
    """A bound on the divergence.

    Raises:
        ValueError: a value is out of range.
    """

    bound: float | None = field(default=None, metadata={"help": "In nats, > 0; None is no clip."})
    level: str = field(
        default="vocab_entry",
        metadata={
            "help": "What is bounded: vocab_entry as in the OPSD release (can reverse gradients), "
            "token, or token_rescale (keeps their direction)."
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
    """A spec and a factor whose product is JSD / (beta (1 - beta)), clip included.

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


class Terms(NamedTuple):
    """The loss of some tokens, and what is known of each.

    loss is the scalar with a gradient. soft [N] and hard [N] are nats per token, unweighted and
    without gradient; hard is zero where it was not needed. stats are [N] too. `extra` holds more
    values of tokens, by the name under which their mean is logged; each has a length of its own,
    and NaN where there is no value.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    stats: DivergenceStats
    extra: Mapping[str, Tensor]

    def counted(self, counts: Tensor | None) -> LinearTerms:
        """Without `extra`, and only of the tokens where `counts` [N] bool is true (None: all)."""
        rows = (self.soft, self.hard, *self.stats)
        soft, hard, *stats = rows if counts is None else (row[counts] for row in rows)
        return LinearTerms(self.loss, soft, hard, DivergenceStats(*stats))


def mixed(alpha: float, soft: Tensor, hard: Tensor) -> Tensor:
    """Alpha * soft + (1 - alpha) * hard; a side without a share may be infinite."""
    if alpha == 1.0:
        return soft
    return (1 - alpha) * hard if alpha == 0.0 else alpha * soft + (1 - alpha) * hard


def hard_sum(
    logits: Tensor, targets: Tensor, weights: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(weighted sum, per token [N]) of cross-entropies; a `given` sum takes the place of ours."""
    hard = F.cross_entropy(chunks.wide(logits), targets, reduction="none")
    return (weights * hard).sum() if given is None else given, hard.detach()


@dataclass(frozen=True)
class Objective:
    """alpha * soft + (1 - alpha) * hard: a divergence to the teacher, and cross-entropy.

    Args:
        spec: the divergence.
        alpha: share of the divergence, in [0, 1].
        factor: what the divergence is multiplied by, > 0.
        measures_hard: whether the cross-entropy is computed although alpha is 1, as where other
            steps have another alpha.
    """

    spec: DivergenceSpec
    alpha: float
    factor: float = field(default=1.0, kw_only=True)
    measures_hard: bool = field(default=False, kw_only=True)
    extra_names: tuple[str, ...] = field(default=(), init=False, repr=False)

    @property
    def _wants_hard(self) -> bool:
        return self.alpha < 1.0 or self.measures_hard

    def _fused(self, weights: Tensor, with_hard: bool) -> tuple[Tensor, float]:
        """Weights and alpha with which the op, which knows no factor, gives the same sum."""
        if not with_hard:
            return self._times(weights), 1.0
        if self.factor == 1.0:
            return weights, self.alpha
        soft = self.alpha * self.factor
        total = soft + (1 - self.alpha)
        return weights * total, soft / total

    def _times(self, values: Tensor) -> Tensor:
        return values if self.factor == 1.0 else values * self.factor

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Metrics of single tokens that this loss does not compute."""
        hard = () if self._wants_hard else ("hard",)
        return hard if self.spec.clip is not None else (*hard, "clipped")

    def from_hidden(
        self,
        hidden: Tensor,
        head: Head,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
    ) -> Terms:
        """Terms of N tokens from the student's hidden states [N, H] and its head.

        The teacher's signal must be hidden states too, or sparse; targets is [N] int64, weights
        [N]. hard_weights [N] are those of the cross-entropy where they differ, which costs a
        second projection of the student unless the signal is sparse.
        """
        if teacher.sparse is not None:
            known = teacher.sparse.at(self.spec.temperature)
            return self._in_chunks(
                hidden,
                head,
                lambda at: replace(teacher, sparse=known.rows(at)),
                targets,
                weights,
                weights if hard_weights is None else hard_weights,
            )
        assert teacher.hidden is not None
        assert teacher.head is not None
        if hard_weights is None or hard_weights is weights or self.alpha == 1.0:
            apart = False
        else:  # comparing waits for the device, a second projection takes longer
            apart = not torch.equal(weights, hard_weights)
        together = self._wants_hard and not apart
        fused, alpha = self._fused(weights, together)
        terms = linear_divergence_with_stats(
            hidden,
            head.weight,
            teacher.hidden,
            teacher.head.weight,
            self.spec,
            weights=fused,
            labels=targets if together else None,
            alpha=alpha,
            student_bias=head.bias,
            teacher_bias=teacher.head.bias,
            student_logit_scale=head.logit_scale,
            teacher_logit_scale=teacher.head.logit_scale,
            student_softcap=head.softcap,
            teacher_softcap=teacher.head.softcap,
        )
        soft = self._times(terms.soft)
        if not apart:
            return Terms(terms.loss, soft, terms.hard, terms.stats, {})
        assert hard_weights is not None
        loss, hard = chunks.cross_entropy(hidden, head, targets, hard_weights)
        return Terms(mixed(self.alpha, terms.loss, loss), soft, hard, terms.stats, {})

    def _in_chunks(
        self,
        hidden: Tensor,
        head: Head,
        teacher: Callable[[slice], Signal],
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor,
    ) -> Terms:
        """`from_logits`, a chunk of tokens at a time; `teacher` gives the signal of some."""

        def piece(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            terms = self.from_logits(
                logits, teacher(at), targets[at], weights[at], hard_weights[at]
            )
            extra = (terms.extra[name] for name in self.extra_names)
            return terms.loss, torch.stack([terms.soft, terms.hard, *terms.stats, *extra])

        largest = torch.maximum(weights.abs(), hard_weights.abs())
        loss, values = chunks.sum_over_chunks(hidden, head, piece, largest)
        if not len(hidden):
            values = values.new_zeros(6 + len(self.extra_names), 0)
        soft, hard, *stats = values[:6]
        extra = dict(zip(self.extra_names, values[6:], strict=True))
        return Terms(loss, soft, hard, DivergenceStats(*stats), extra)

    def from_logits(
        self,
        logits: Tensor,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
        hard_loss: Tensor | None = None,
    ) -> Terms:
        """Terms of N tokens from the student's logits [N, V].

        hard_loss, a scalar already normalised over the optimizer step, replaces the cross-entropy
        (label smoothing, the user's compute_loss_func).
        """
        scaled = self._times(weights)
        if teacher.sparse is not None:
            soft = sparse_terms(logits, teacher.sparse, teacher.tail, self.spec, scaled)
        else:
            soft = weighted_divergence(logits, teacher.dense(), self.spec, weights=scaled)
        per_token = self._times(soft.per_token)
        if not self._wants_hard:
            return Terms(soft.loss, per_token, torch.zeros_like(per_token), soft.stats, {})
        hard_weights = weights if hard_weights is None else hard_weights
        loss, hard = hard_sum(logits, targets, hard_weights, hard_loss)
        return Terms(mixed(self.alpha, soft.loss, loss), per_token, hard, soft.stats, {})


def assert_finite(terms: Terms) -> None:
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
