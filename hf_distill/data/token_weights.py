"""How much a scored token counts: by a batch's own weights, its class and its place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.data.reasoning_spans import ReasoningSpans
from hf_distill.data.sides import IGNORE_INDEX
from hf_distill.data.token_classes import CLASSES, token_classes


@dataclass
class TokenWeightsConfig:
    """Says how much a token counts: by its text's class, its place, and the teacher's entropy.

    The factors are multiplied. `hf_distill.data.token_classes` has the classes,
    `hf_distill.data.reasoning_spans` the places.

    Raises:
        ValueError: a number is negative or not finite, or markers are not two different texts.
    """

    special: float = field(
        default=1.0, metadata={"help": "The weight of special tokens, at least 0."}
    )
    number: float = field(
        default=1.0,
        metadata={"help": "The weight of tokens that contain a digit and no letter, at least 0."},
    )
    punctuation: float = field(
        default=1.0,
        metadata={
            "help": "The weight of tokens that contain neither a letter nor a digit, at least 0."
        },
    )
    space: float = field(
        default=1.0, metadata={"help": "The weight of tokens that are only whitespace, at least 0."}
    )
    word: float = field(
        default=1.0, metadata={"help": "The weight of all other tokens, at least 0."}
    )
    entropy: float = field(
        default=0.0,
        metadata={
            "help": "A token counts 1 + entropy * H / ln V times, where H is the teacher's entropy "
            "at the token, at temperature 1 and in nats, and V is the number of logits. It must be "
            "at least 0."
        },
    )
    reasoning: float = field(
        default=1.0, metadata={"help": "The weight of the tokens between the markers, at least 0."}
    )
    markers: list[str] = field(
        default_factory=lambda: ["<think>", "</think>"],
        metadata={
            "help": "The two texts that enclose reasoning. They must differ, and they do not count "
            "as reasoning themselves."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        for name in (*CLASSES, "entropy", "reasoning"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"token_weights.{name} must be at least 0 and finite, got {value}")
        given = self.markers
        is_pair = isinstance(given, list | tuple) and len(given) == 2
        if not is_pair or not all(isinstance(x, str) and x for x in given) or given[0] == given[1]:
            raise ValueError(
                f"token_weights.markers must be two different texts, not empty, got {given!r}"
            )

    def by_class(self) -> list[float] | None:
        """Return the weights in the order of `CLASSES`, or None if all are 1."""
        weights = [getattr(self, name) for name in CLASSES]
        return None if all(weight == 1.0 for weight in weights) else weights

    def around_reasoning(self) -> tuple[str, str] | None:
        """Return the markers, or None if reasoning counts like the rest."""
        return None if self.reasoning == 1.0 else (self.markers[0], self.markers[1])

    def active(self) -> bool:
        """Return whether some tokens count more than others."""
        by_place = self.by_class() is not None or self.around_reasoning() is not None
        return by_place or self.entropy > 0.0


KEY = "token_weights"


class TokenWeights:
    """Computes the weights of a batch's tokens, as far as the batch and its texts say.

    Args:
        by_class: a weight for each of `CLASSES`, or None if all are 1.
        tokenizer: what tells classes and markers; needed with one of them.
        reasoning: the weight of tokens between the markers.
        markers: opening and closing, or None if tokens between them count like the others.

    Attributes:
        reads_texts: whether a token's weight depends on its class or its place.

    Raises:
        ValueError: there are classes or markers and no tokenizer.
    """

    def __init__(
        self,
        by_class: Sequence[float] | None,
        tokenizer: Any,
        reasoning: float = 1.0,
        markers: tuple[str, str] | None = None,
    ) -> None:
        self._table: Tensor | None = None
        self._blocks: ReasoningSpans | None = None
        self._reasoning = reasoning
        self.reads_texts = by_class is not None or markers is not None
        if by_class is None and markers is None:
            return
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"{KEY} of classes and of reasoning need a tokenizer as processing_class, got "
                f"{'None' if tokenizer is None else type(tokenizer).__name__}"
            )
        if by_class is not None:
            weights = torch.tensor(by_class, dtype=torch.float32)
            # the last entry is for all ids that the tokenizer does not have
            beyond = weights[[CLASSES.index("special")]]
            self._table = torch.cat([weights[token_classes(tokenizer)], beyond])
        self._blocks = None if markers is None else ReasoningSpans(tokenizer, *markers)

    @property
    def reads_rows(self) -> bool:
        """Return whether a token's weight depends on the row it stands in."""
        return self._blocks is not None

    def in_reasoning(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return [B, T] bool: which tokens are in it; None if reasoning counts like the rest.

        The whole row is read: a block may begin in the prompt, whose tokens have no labels.

        Raises:
            ValueError: the batch has no input_ids of the labels' shape.
        """
        if self._blocks is None:
            return None
        ids, mask, labels = (batch.get(x) for x in ("input_ids", "attention_mask", "labels"))
        if ids is None or labels is None or ids.shape != labels.shape:
            got = "none" if ids is None else f"shape {list(ids.shape)}"
            raise ValueError(f"weights of reasoning need input_ids as the labels, got {got}")
        return self._blocks(ids, mask if mask is not None and mask.ndim == 2 else None)

    def __call__(self, batch: Any, in_reasoning: Tensor | None = None) -> Tensor | None:
        """Return [B, T] float32, aligned with the labels, zero where they are ignored.

        It returns None if the batch has no labels, or if every token counts as one.

        Args:
            batch: of the trainer.
            in_reasoning: what the method of this name says of it, if it was asked before.

        Raises:
            ValueError: `token_weights` of the batch are not of the labels' shape, or one of a
                labelled token is negative, infinite or NaN; or as `in_reasoning`.
        """
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            return None
        labels, given = batch["labels"], batch.get(KEY)
        if given is None and self._table is None and self._blocks is None:
            return None
        labelled = labels != IGNORE_INDEX
        weights = labelled.float() if given is None else self._checked(given, labelled)
        if self._table is not None:
            self._table = self._table.to(labels.device)
            weights = weights * self._table[labels.clamp(0, len(self._table) - 1)]
        inside = self.in_reasoning(batch) if in_reasoning is None else in_reasoning
        if inside is None:
            return weights
        return torch.where(inside, weights * self._reasoning, weights)

    @staticmethod
    def _checked(given: Tensor, labelled: Tensor) -> Tensor:
        if given.shape != labelled.shape:
            raise ValueError(
                f"{KEY} must have the labels' shape {list(labelled.shape)}, got {list(given.shape)}"
            )
        weights = given.float().masked_fill(~labelled, 0.0)
        bad = ~(weights.isfinite() & (weights >= 0))
        if bool(bad.any()):
            raise ValueError(
                f"{KEY} must be at least 0 and finite, got {weights[bad][0].item()} in row "
                f"{int(bad.nonzero()[0, 0])} of the batch"
            )
        return weights


def total_weight(batches: Sequence[Any], weights: Sequence[Tensor | None]) -> Tensor:
    """Return [] float32: the sum of the weights of all scored tokens (never a row's first).

    A batch without weights counts its labelled tokens.
    """
    sums = [
        (batch["labels"][:, 1:] != IGNORE_INDEX).sum() if each is None else each[:, 1:].sum()
        for batch, each in zip(batches, weights, strict=True)
    ]
    return torch.stack([x.float() for x in sums]).sum()
