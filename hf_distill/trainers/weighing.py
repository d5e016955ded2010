"""How much the tokens of an optimizer step count, before any of its losses is computed.

The mean over a step divides by the sum of the weights of all its micro-batches. Weights that depend
on the teacher's entropies are known only once the teacher has seen them all, so it is run when the
step's tokens are counted, and what it said is kept with each micro-batch for its loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hf_distill import alignment
from hf_distill.heads import Signal, causal_lm, vocab_size
from hf_distill.losses import entropy_share
from hf_distill.token_weights import TokenWeights
from hf_distill.trainers.groups import TokenWeightsConfig

if TYPE_CHECKING:
    from hf_distill.trainers.distill import DistillTrainer

KEPT = f"{alignment.TEACHER_PREFIX}weighed"  # in a batch; the prefix hides it from the student
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
        predicts = alignment.predicts_from_labels(batch["labels"])
        logged: dict[str, Tensor] = {}
        if inside is not None:
            logged[REASONING_SHARE] = alignment.targets(inside, predicts).float()
        made = Weighed(weights, logged, signal)
        if signal is None or not self.entropy > 0:
            return made
        factor = self._entropy_factor(signal, int(predicts.sum()))
        if weights is None:
            weights = (batch["labels"] != alignment.IGNORE_INDEX).float()
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
