"""What a loss is: from what student and teacher say of N tokens to a scalar and its metrics.

The loss of an optimizer step is alpha * soft + (1 - alpha) * hard, each a weighted sum over tokens.
A `Loss` computes the part of one micro-batch. `step.step_terms` adds what surrounds it.

Shapes: N scored tokens, M tokens of an anchor, H hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import chunks
from hf_distill.losses.drift import DRIFT_NAME, Drift
from hf_distill.models.signals import Signal

IMPORTANCE_NAMES = ("importance_ratio", "importance_clipped")
ANCHOR_NAME = "anchor"
ROUTER_NAMES = ("aux", "expert_agreement")
TAKEN_NAMES = frozenset(("soft", "hard", "loss", "tokens", "rows", ANCHOR_NAME))
TAKEN_NAMES |= {*IMPORTANCE_NAMES, *ROUTER_NAMES, DRIFT_NAME, "contrast_factor", "base_kl"}

PerToken = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""What `Loss.per_token` returns: the losses [n], or these and metrics [n] by name."""

AnyLoss = TypeVar("AnyLoss", bound="Loss")


class Terms(NamedTuple):
    """Holds the loss of some tokens, and what was measured of each.

    loss: the scalar with a gradient. metrics: by the name under which their mean is logged, values
    without gradient, [N] for the scored tokens; a NaN is no value, and what was not measured is
    absent. "soft" and "hard" are nats per token, unweighted. evidence: by "student" and "teacher",
    [N], NaN where this side's logits are and finite elsewhere, where its entropies do not show it.
    others: by name, values of other tokens than the N.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    evidence: Mapping[str, Tensor] = {}
    others: Mapping[str, Tensor] = {}


class Importance(NamedTuple):
    """Holds what corrects for a student that has moved since it sampled the tokens.

    behaviour [N]: the log-probability of each token under the student that sampled it, at
    temperature 1; NaN where it is not known. clip: the largest ratio, > 0.
    """

    behaviour: Tensor
    clip: float


class Anchor(NamedTuple):
    """Holds M tokens of supervised training beside the others: targets [M] int64, weights [M]."""

    targets: Tensor
    weights: Tensor


class LossSettings(NamedTuple):
    """Says what the loss of a causal LM's batch knows of rollouts.

    importance_clip: the largest weight of a reused token, or None. anchor_weight: that of the
    data's own completions beside sampled ones.
    """

    importance_clip: float | None = None
    anchor_weight: float = 0.0


class Tokens(NamedTuple):
    """Holds the N tokens that are compared with the teacher.

    targets: [N] int64. weights: [N], which make a sum over tokens the mean over an optimizer step.
    counted: [N] bool, the tokens that metrics count, or None for all. corrected: [N], weights of
    the soft loss where they differ from `weights`. importance, drift: what makes them so. The
    anchor's tokens, if there are some, come behind these in what the student says.
    """

    targets: Tensor
    weights: Tensor
    counted: Tensor | None = None
    importance: Importance | None = None
    anchor: Anchor | None = None
    corrected: Tensor | None = None
    drift: Drift | None = None

    @property
    def soft_weights(self) -> Tensor:
        """Return [N]: the weights of the soft loss."""
        return self.weights if self.corrected is None else self.corrected

    def rows(self, at: slice) -> "Tokens":
        """Return the targets and weights of some tokens."""
        corrected = None if self.corrected is None else self.corrected[at]
        return Tokens(self.targets[at], self.weights[at], corrected=corrected)


def mixed(alpha: float, soft: Tensor, hard: Tensor) -> Tensor:
    """Return alpha * soft + (1 - alpha) * hard; a side without a share may be infinite."""
    if alpha == 1.0:
        return soft
    return (1 - alpha) * hard if alpha == 0.0 else alpha * soft + (1 - alpha) * hard


class Loss:
    """Computes a loss of tokens: alpha * soft + (1 - alpha) * hard, where soft compares two models.

    Subclasses override `per_token`. The rest works for all of them: the soft loss is computed from
    a chunk of tokens at a time, its gradients are formed while the logits of the chunk exist, and
    the cross-entropy of the labels is added. A loss with a fused operation overrides `__call__`.

    A trainer works with a copy of the loss that it is given, the same one in the whole run: what
    `per_token` keeps on `self` stays there, and is read at `trainer.loss`.

    Attributes:
        alpha: share of the soft loss, in [0, 1]. In a trainer it is that of the config.
        measures_hard: whether the cross-entropy is computed although alpha is 1, as where other
            steps have another alpha.
        needs_dense: whether it reads the teacher's logits of the whole vocabulary.
        of_tokens: whether it means tokens of a text, so that a classifier's classes have none.
        chunks_logits: whether logits of all tokens, where the model gives them, are given to `soft`
            in chunks as well; False for operations that form no second tensor of their size.
        copies_logits: whether `soft` makes many copies of its logits, as plain PyTorch does, so
            that it is given fewer tokens at a time.
    """

    alpha: float = 1.0
    measures_hard: bool = False
    needs_dense: ClassVar[bool] = True
    of_tokens: ClassVar[bool] = False
    chunks_logits: ClassVar[bool] = True
    copies_logits: ClassVar[bool] = True

    def per_token(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
    ) -> PerToken:
        """Compute the soft loss of some tokens.

        Args:
            student_logits: [n, V] in the dtype of the model, with a gradient.
            teacher_logits: [n, V] without one.
            targets: [n] int64, the labels; of a classifier -100 where a row has none.

        Returns:
            [n] in any unit, or that and a mapping of metrics [n] by name. A NaN is no value.
        """
        raise NotImplementedError(f"{type(self).__name__} must override per_token or soft")

    def with_share(self: AnyLoss, alpha: float, measures_hard: bool) -> AnyLoss:
        """Return the same loss with another share of the soft part."""
        other = copy.copy(self)
        other.set_share(alpha, measures_hard)
        return other

    def set_share(self, alpha: float, measures_hard: bool) -> None:
        """Set the share of the soft part, also of a frozen dataclass."""
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "measures_hard", measures_hard)

    @property
    def wants_hard(self) -> bool:
        """Return whether the cross-entropy is computed."""
        return self.alpha < 1.0 or self.measures_hard

    def check_signal(self, teacher: Signal, num_tokens: int) -> None:
        """Check what the teacher says of N tokens.

        Raises:
            ValueError: it says too little for this loss.
        """
        if self.needs_dense and teacher.sparse is not None:
            teacher.dense()  # says why it cannot be read

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the soft loss of some tokens.

        Args:
            logits: [n, V] of the student.
            teacher: about the same tokens.
            tokens: their targets and weights.

        Returns:
            The weighted sum [], and among the metrics "soft" [n].

        Raises:
            ValueError: `per_token` does not return one loss a token, or one without a gradient.
        """
        with torch.no_grad():
            said = teacher.dense()
        weights = tokens.soft_weights
        if logits.requires_grad:
            logits = without_odd_gradients(logits, weights == 0)
        found = self.per_token(logits, said, tokens.targets)
        value, metrics = found if isinstance(found, tuple) else (found, {})
        self._check_returned(value, metrics, len(tokens.targets))
        if logits.requires_grad and not value.requires_grad:
            raise ValueError(f"the loss {self!r} must have a gradient for the student's logits")
        value = chunks.at_least_float32(value)
        value = torch.where(weights == 0, 0.0, value)  # a token without weight may be infinite
        return Terms((weights * value).sum(), {"soft": value, **metrics})

    def _check_returned(self, value: Any, metrics: Mapping[str, Any], num_tokens: int) -> None:
        """Check what `per_token` returns."""
        for name, each in (("a loss", value), *metrics.items()):
            got = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            if got != [num_tokens]:
                raise ValueError(
                    f"{name} must have the shape [{num_tokens}], one value a token, got {got} "
                    f"from {self!r}"
                )
        taken = sorted(TAKEN_NAMES & metrics.keys())
        if taken:
            raise ValueError(
                f"metrics must have other names than what a trainer logs itself, got {taken} from "
                f"{self!r}"
            )

    def __call__(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms of N tokens.

        Args:
            student: hidden states and the head, or logits; with a gradient.
            teacher: without one.
            tokens: their targets and weights.

        Raises:
            ValueError: see `check_signal` and `soft`.
        """
        self.check_signal(teacher, len(tokens.targets))
        if student.hidden is not None:
            return self._from_hidden(student, teacher, tokens)
        return self._from_logits(student, teacher, tokens)

    def _from_hidden(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms from hidden states, a chunk of tokens at a time."""

        def piece(logits: Tensor, at: slice) -> Terms:
            own = tokens.rows(at)
            if not self.wants_hard:
                return self.soft(logits, teacher.rows(at), own)
            # before the soft loss, which may change its logits in place
            hard = F.cross_entropy(chunks.at_least_float32(logits), own.targets, reduction="none")
            terms = self.soft(logits, teacher.rows(at), own)
            loss = mixed(self.alpha, terms.loss, (own.weights * hard).sum())
            return terms._replace(loss=loss, metrics={**terms.metrics, "hard": hard})

        assert student.hidden is not None
        largest = torch.maximum(tokens.weights.abs(), tokens.soft_weights.abs())
        width = self._width(student, teacher, student.hidden.device)
        return _summed(piece, student.hidden, student.head, largest, width)

    def _from_logits(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms from logits; the model's own loss may replace the cross-entropy."""
        logits = student.dense()
        if self.chunks_logits:

            def piece(part: Tensor, at: slice) -> Terms:
                return self.soft(part, teacher.rows(at), tokens.rows(at))

            width = self._width(student, teacher, logits.device)
            terms = _summed(piece, logits, None, tokens.soft_weights, width)
        else:
            terms = self.soft(logits, teacher, tokens)
        if not self.wants_hard:
            return terms
        hard_sum, hard = chunks.cross_entropy(student, tokens.targets, tokens.weights)
        hard_sum = hard_sum if student.own_loss is None else student.own_loss
        loss = mixed(self.alpha, terms.loss, hard_sum)
        return terms._replace(loss=loss, metrics={**terms.metrics, "hard": hard})

    def _width(self, student: Signal, teacher: Signal, device: torch.device) -> int:
        """Return how many entries a chunk is to hold for each token."""
        width = max(student.vocab or 0, teacher.vocab or 0)
        return chunks.width_of_copies(width, device) if self.copies_logits else width


def without_odd_gradients(logits: Tensor, unweighted: Tensor) -> Tensor:
    """Return logits [n, V] with gradient 0 at tokens without weight, where a loss may be infinite.

    0 times the gradient of an infinite loss is NaN.
    """
    passed = logits.view_as(logits)
    passed.register_hook(lambda grad: grad.masked_fill(unweighted[:, None], 0.0))
    return passed


def _summed(
    piece: Callable[[Tensor, slice], Terms],
    rows: Tensor,
    head: Any,
    weights: Tensor,
    width: int,
) -> Terms:
    """Return the terms of all tokens from those of a chunk at a time."""
    names: tuple[list[str], list[str]] = ([], [])

    def stacked(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        terms = piece(logits, at)
        if at.start and names[0] != [*terms.metrics]:
            raise ValueError(
                "the metrics of all chunks of tokens must have the same names, got "
                f"{names[0]} and {[*terms.metrics]}"
            )
        names[0][:], names[1][:] = terms.metrics, terms.evidence
        values = [*terms.metrics.values(), *terms.evidence.values()]
        dtype = terms.loss.dtype
        return terms.loss, torch.stack([value.detach().to(dtype) for value in values])

    loss, values = chunks.sum_over_chunks(rows, head, stacked, weights, width)
    metrics, evidence = values[: len(names[0])], values[len(names[0]) :]
    return Terms(
        loss,
        dict(zip(names[0], metrics, strict=True)),
        dict(zip(names[1], evidence, strict=True)),
    )
