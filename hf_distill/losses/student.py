"""What the student says of the scored tokens, as hidden states or as logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.cross_tokenizer import UniversalObjective
from hf_distill.losses.divergence import Objective, Terms, hard_sum
from hf_distill.losses.sampled_tokens import SampledObjective
from hf_distill.models.signals import Head, Signal

AnyObjective = Objective | SampledObjective | UniversalObjective


class Student(Protocol):
    """One of the two forms: what a loss asks of it."""

    def split(self, sizes: Sequence[int]) -> Sequence["Student"]:
        """The tokens in groups of so many."""
        ...

    def log_probs(self, targets: Tensor) -> Tensor:
        """[N] log-probabilities of the targets at temperature 1, without gradient."""
        ...

    def cross_entropy(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum [] with a gradient, per token [N]) of cross-entropies."""
        ...

    def terms(
        self,
        objective: AnyObjective,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor,
    ) -> Terms:
        """The objective's terms."""
        ...


@dataclass(frozen=True)
class StudentHidden:
    """Hidden states [N, H] and the head."""

    hidden: Tensor
    head: Head

    def split(self, sizes: Sequence[int]) -> list["StudentHidden"]:
        """The tokens in groups of so many."""
        return [StudentHidden(part, self.head) for part in self.hidden.split(list(sizes))]

    def log_probs(self, targets: Tensor) -> Tensor:
        """[N] log-probabilities of the targets at temperature 1, without gradient."""
        return chunks.log_probs(self.hidden, self.head, targets)

    def cross_entropy(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum [] with a gradient, per token [N]) of cross-entropies."""
        return chunks.cross_entropy(self.hidden, self.head, targets, weights)

    def terms(
        self,
        objective: AnyObjective,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor,
    ) -> Terms:
        """The objective's terms."""
        return objective.from_hidden(
            self.hidden, self.head, teacher, targets, weights, hard_weights
        )


@dataclass(frozen=True)
class StudentLogits:
    """Logits [N, V], and a hard loss that takes the place of the cross-entropy, or None."""

    logits: Tensor
    hard_loss: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list["StudentLogits"]:
        """The tokens in groups of so many."""
        return [StudentLogits(part, self.hard_loss) for part in self.logits.split(list(sizes))]

    @torch.no_grad()
    def log_probs(self, targets: Tensor) -> Tensor:
        """[N] log-probabilities of the targets at temperature 1, without gradient."""
        return chunks.gathered(self.logits, targets)

    def cross_entropy(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum [] with a gradient, per token [N]) of cross-entropies."""
        return hard_sum(self.logits, targets, weights, None)

    def terms(
        self,
        objective: AnyObjective,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor,
    ) -> Terms:
        """The objective's terms."""
        return objective.from_logits(
            self.logits, teacher, targets, weights, hard_weights, self.hard_loss
        )
