"""Objective: a divergence to the teacher over the vocabulary, and cross-entropy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.heads import Head, Signal
from hf_distill.losses import tokens
from hf_distill.losses.sparse import sparse_terms
from metal_ops import DivergenceSpec, linear_divergence, weighted_divergence
from metal_ops.functional import DivergenceStats, LinearTerms


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
    hard = F.cross_entropy(tokens.wide(logits), targets, reduction="none")
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
        terms = linear_divergence(
            hidden,
            head,
            teacher.hidden,
            teacher.head,
            self.spec,
            weights=fused,
            labels=targets if together else None,
            alpha=alpha,
            stats=True,
        )
        assert terms.stats is not None
        soft = self._times(terms.soft)
        if not apart:
            return Terms(terms.loss, soft, terms.hard, terms.stats, {})
        assert hard_weights is not None
        loss, hard = tokens.cross_entropy(hidden, head, targets, hard_weights)
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
        loss, values = tokens.sum_over_chunks(hidden, head, piece, largest)
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
            dense = teacher.dense()
            soft = weighted_divergence(logits, dense, self.spec, weights=scaled, stats=True)
        assert soft.stats is not None
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
