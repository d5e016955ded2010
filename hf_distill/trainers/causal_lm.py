"""What of a causal LM's batch is scored, and how much each token counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_distill.data import anchor_rows, sides
from hf_distill.data.sides import Side
from hf_distill.data.token_weights import KEY, TokenWeights, TokenWeightsConfig
from hf_distill.losses import Anchor, Importance, Scored, entropy_share
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm, vocab_size
from hf_distill.trainers.distill_config import LossSettings

if TYPE_CHECKING:
    from hf_distill.trainers.distill_trainer import DistillTrainer

BEHAVIOUR = "behaviour_log_probs"


class Share(NamedTuple):
    """The weights of a micro-batch, and what they are divided by, to be its share of a step.

    weights: [B, T] aligned with the labels, or None if every token counts as one. num_items: the
    sum of those of the step's scored tokens (without weights, their number), over all its
    micro-batches and, if the Trainer gathers them, all processes; None is that of this batch.
    num_averaged: processes whose gradients are averaged although num_items is of all of them, else
    1. num_processes: those whose gradients are averaged.
    """

    weights: Tensor | None
    num_items: Tensor | int | None
    num_averaged: int
    num_processes: int


class Work(NamedTuple):
    """The student's forward, its scored tokens, and which of them metrics count (None: all)."""

    side: Side
    scored: Scored
    counts: Tensor | None


@dataclass(frozen=True)
class Scoring:
    """Reads a batch.

    Args:
        settings: of reused completions and the anchor.
    """

    settings: LossSettings

    def work(self, batch: Mapping[str, Any], student: Side, share: Share, training: bool) -> Work:
        """What is to be computed.

        Args:
            batch: with labels [B, T].
            student: its student's side.
            share: the tokens' weights, and what the sums are divided by.
            training: the anchor is a part of the training loss only.

        Raises:
            ValueError: no token counts, or the shape of `behaviour_log_probs` is not the labels'.
        """
        targets = sides.targets(batch["labels"], student.predicts)
        weights, counts = self._weights(student, targets, share)
        scored = Scored(targets, weights, self._importance(batch, student))
        if not training or self.settings.anchor_weight == 0.0 or not anchor_rows.has_anchor(batch):
            return Work(student, scored, counts)
        labels = batch["anchor_labels"]
        anchor_targets = sides.targets(labels, sides.predicts_from_labels(labels))
        factor = self.settings.anchor_weight * share.num_processes / batch["anchor_count"]
        anchor = Anchor(anchor_targets, torch.ones_like(anchor_targets) * factor)
        return Work(anchor_rows.joined(student, batch), scored._replace(anchor=anchor), counts)

    def _weights(
        self, student: Side, targets: Tensor, share: Share
    ) -> tuple[Tensor, Tensor | None]:
        """[N] float32 weights that make a sum over tokens the mean over an optimizer step."""
        if share.weights is None:
            own, counts = torch.ones(len(targets), device=targets.device), None
        else:
            own = sides.targets(share.weights, student.predicts)
            counts = own != 0
        num_items = own.sum() if share.num_items is None else share.num_items
        if num_items == 0 and counts is not None and len(targets):
            raise ValueError(
                "the weights of a step's scored tokens must not sum to 0: all are 0 "
                f"({KEY} of the batch and of the settings)"
            )
        if num_items == 0:
            raise ValueError(
                "a step needs a token to score, got none: all labels are -100 "
                "(the first token of a row is never scored)"
            )
        if isinstance(num_items, Tensor):
            num_items = num_items.to(own.device)
        return own * (share.num_averaged / num_items), counts

    def _importance(self, batch: Mapping[str, Any], student: Side) -> Importance | None:
        clip, behaviour = self.settings.importance_clip, batch.get(BEHAVIOUR)
        if clip is None or behaviour is None:
            return None
        if behaviour.shape != student.predicts.shape:
            raise ValueError(
                f"{BEHAVIOUR} must have the labels' shape {list(student.predicts.shape)}, got "
                f"{list(behaviour.shape)}"
            )
        return Importance(sides.targets(behaviour, student.predicts), clip)


KEPT = f"{sides.TEACHER_PREFIX}weighed"  # in a batch; the prefix hides it from the student

REASONING_SHARE, ENTROPY_FACTOR = "reasoning_share", "entropy_factor"

Ask = Callable[[], Signal]


def for_trainer(trainer: "DistillTrainer") -> "Weighing":
    """What the config asks for."""
    config = cast(TokenWeightsConfig, trainer.args.token_weights)
    around = config.by_class(), trainer.processing_class, config.reasoning
    weigh = TokenWeights(*around, config.around_reasoning())
    size = trainer._vocabulary.size or vocab_size(causal_lm(cast(nn.Module, trainer.model)))
    return Weighing(weigh, config.entropy, size)


@dataclass
class Weighed:
    """What is known of a micro-batch.

    weights: [B, T] float32 aligned with the labels, or None if every token counts as one. logged:
    by name, values of the N scored tokens. signal: the teacher's, or None if it was not asked or
    its signal was taken.
    """

    weights: Tensor | None
    logged: dict[str, Tensor]
    signal: Signal | None = None

    def take(self) -> Signal | None:
        """The signal, which is not kept any longer."""
        signal, self.signal = self.signal, None
        return signal


class Weighing:
    """Weights that need nothing but the batch, and those that need the teacher.

    Args:
        weigh: the weights of a batch without the teacher.
        entropy: a token counts 1 + entropy * H / ln V times, see `losses.entropy_share`.
        vocab: V of sparse signals, or None if it is not known.

    Memory:
        With entropy > 0 the signals of all micro-batches of a step are kept until each one's loss:
        of N scored tokens [N, H] hidden states, or [N, V] logits of a teacher that is read by them,
        or a sparse teacher's entries.
    """

    def __init__(self, weigh: TokenWeights, entropy: float, vocab: int | None) -> None:
        self.weigh, self.entropy, self.vocab = weigh, entropy, vocab

    @property
    def names(self) -> tuple[str, ...]:
        """Under which names means are logged."""
        reasoning = (REASONING_SHARE,) if self.weigh.reads_rows else ()
        return (*reasoning, ENTROPY_FACTOR) if self.entropy > 0 else reasoning

    def ahead(
        self,
        batches: Sequence[Any],
        place: Callable[[Any], Any],
        ask: Callable[[Any], Signal],
    ) -> list[Tensor | None]:
        """The weights of each micro-batch of a step; what was costly to find is kept in it.

        Args:
            batches: of a step. One that is given again, say of completions that are used for
                several steps, is weighed again.
            place: moves a batch to the teacher's device.
            ask: the teacher's signal of a placed batch.
        """
        found: list[Tensor | None] = []
        for batch in batches:
            if not self.names or not isinstance(batch, Mapping) or batch.get("labels") is None:
                found.append(self.weigh(batch))
                continue
            placed = place({name: value for name, value in batch.items() if name != KEPT})
            weighed = self._weighed(placed, ask(placed) if self.entropy > 0 else None)
            batch[KEPT] = weighed  # pyright: ignore[reportIndexIssue]
            found.append(weighed.weights)
        return found

    def known(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The weights that `ahead` has found, or those that need no teacher."""
        kept = batch.get(KEPT)
        return self.weigh(batch) if kept is None else kept.weights

    @staticmethod
    def was_asked(batch: Mapping[str, Any]) -> bool:
        """Whether the teacher has seen the batch and its signal waits there."""
        kept = batch.get(KEPT)
        return kept is not None and kept.signal is not None

    def of(self, batch: Mapping[str, Any], ask: Ask) -> tuple[Weighed, Signal]:
        """Of a placed batch; the teacher is asked now if it was not."""
        kept = batch.get(KEPT)
        signal = None if kept is None else kept.take()
        if signal is None:
            signal = ask()
            kept = None if self.entropy > 0 else kept
        return self._weighed(batch, signal) if kept is None else kept, signal

    def _weighed(self, batch: Mapping[str, Any], signal: Signal | None) -> Weighed:
        inside = self.weigh.in_reasoning(batch)
        weights = self.weigh(batch, inside)
        predicts = sides.predicts_from_labels(batch["labels"])
        logged: dict[str, Tensor] = {}
        if inside is not None:
            logged[REASONING_SHARE] = sides.targets(inside, predicts).float()
        made = Weighed(weights, logged, signal)
        if signal is None or not self.entropy > 0:
            return made
        factor = self._entropy_factor(signal, int(predicts.sum()))
        if weights is None:
            weights = (batch["labels"] != sides.IGNORE_INDEX).float()
        weights = weights.clone()
        weights[:, 1:][predicts[:, :-1]] *= factor
        return replace(made, weights=weights, logged=logged | {ENTROPY_FACTOR: factor})

    @torch.no_grad()
    def _entropy_factor(self, signal: Signal, num_tokens: int) -> Tensor:
        share = entropy_share(signal, self.vocab)
        if signal.paired is not None:  # where the teacher says nothing a token counts once
            everywhere = share.new_zeros(signal.paired.shape)
            share = everywhere.masked_scatter(signal.paired, share)
        if len(share) != num_tokens:
            raise ValueError(
                "token_weights.entropy needs the teacher's entropy at each of the student's "
                f"{num_tokens} scored tokens, got {len(share)}"
            )
        return (1.0 + self.entropy * share).float()
