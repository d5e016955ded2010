"""How much a scored token counts: by a batch's own weights, its class and its place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.data import packed_rows
from hf_distill.data.position_weights import POSITIONS, PositionWeights
from hf_distill.data.reasoning_spans import ReasoningSpans
from hf_distill.data.sides import IGNORE_INDEX
from hf_distill.data.token_classes import CLASSES, token_classes


@dataclass
class TokenWeightsConfig:
    """Says how much a token counts: by its text's class, its place, and the teacher's entropy.

    The factors are multiplied. `hf_distill.data.token_classes` has the classes,
    `hf_distill.data.reasoning_spans` and `hf_distill.data.position_weights` the places, and
    `hf_distill.losses.drift` what student and teacher say of the tokens before.

    Raises:
        ValueError: a number is out of range or not finite, or markers are not two different texts.
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
            "at the token, at temperature 1 and in nats, and V is the number of logits. Below 0 "
            "unsure tokens count less, but at least entropy_floor times."
        },
    )
    entropy_floor: float = field(
        default=0.1,
        metadata={
            "help": "The least that a token counts where entropy is below 0. It must be greater "
            "than 0 and at most 1."
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
    position: str = field(
        default="none",
        metadata={
            "help": "Says which end of a row's scored tokens counts more: early, late or none. The "
            "weights go from 1 down to position_floor."
        },
    )
    position_floor: float = field(
        default=0.25,
        metadata={
            "help": "The least that a token counts by its position, in [0, 1]. It requires "
            "position."
        },
    )
    position_middle: float = field(
        default=0.3,
        metadata={
            "help": "The share of the row's scored tokens at which the weight is halfway, in "
            "[0, 1]. It requires position."
        },
    )
    position_width: float = field(
        default=0.1,
        metadata={
            "help": "How softly the weight changes there, as a share of the row's scored tokens, "
            "greater than 0. It requires position."
        },
    )
    skip_first: int = field(
        default=0,
        metadata={
            "help": "The number of each row's first scored tokens that do not count, at least 0."
        },
    )
    drift: float = field(
        default=0.0,
        metadata={
            "help": "In training the soft loss of a token counts 1 + drift * (1 - D_t / D) times, "
            "where D_t is how far student and teacher have drifted apart before the token and D "
            "how far over the whole row (IW-OPD). It must be at least 0."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        for name in (*CLASSES, "reasoning", "drift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"token_weights.{name} must be at least 0 and finite, got {value}")
        if not math.isfinite(self.entropy):
            raise ValueError(f"token_weights.entropy must be finite, got {self.entropy}")
        if not 0.0 < self.entropy_floor <= 1.0:
            raise ValueError(
                f"token_weights.entropy_floor must be in (0, 1], got {self.entropy_floor}"
            )
        self._check_positions()
        given = self.markers
        is_pair = isinstance(given, list | tuple) and len(given) == 2
        if not is_pair or not all(isinstance(x, str) and x for x in given) or given[0] == given[1]:
            raise ValueError(
                f"token_weights.markers must be two different texts, not empty, got {given!r}"
            )

    def _check_positions(self) -> None:
        if self.position not in POSITIONS:
            raise ValueError(
                f"token_weights.position must be one of {POSITIONS}, got {self.position!r}"
            )
        for name in ("position_floor", "position_middle"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"token_weights.{name} must be in [0, 1], got {getattr(self, name)}"
                )
        if not (math.isfinite(self.position_width) and self.position_width > 0):
            raise ValueError(
                f"token_weights.position_width must be positive, got {self.position_width}"
            )
        if not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise ValueError(
                f"token_weights.skip_first must be an int of at least 0, got {self.skip_first!r}"
            )

    def by_class(self) -> list[float] | None:
        """Return the weights in the order of `CLASSES`, or None if all are 1."""
        weights = [getattr(self, name) for name in CLASSES]
        return None if all(weight == 1.0 for weight in weights) else weights

    def around_reasoning(self) -> tuple[str, str] | None:
        """Return the markers, or None if reasoning counts like the rest."""
        return None if self.reasoning == 1.0 else (self.markers[0], self.markers[1])

    def by_position(self) -> PositionWeights:
        """Return what weighs tokens by their places in a row."""
        shape = self.position_floor, self.position_middle, self.position_width
        return PositionWeights(self.position, *shape, self.skip_first)

    def active(self) -> bool:
        """Return whether some tokens count more than others."""
        by_place = self.by_class() is not None or self.around_reasoning() is not None
        by_said = self.entropy != 0.0 or self.drift > 0.0
        return by_place or by_said or self.by_position().active


KEY = "token_weights"


class TokenWeights:
    """Computes the weights of a batch's tokens, as far as the batch and its texts say.

    Args:
        by_class: a weight for each of `CLASSES`, or None if all are 1.
        tokenizer: what tells classes and markers; needed with one of them.
        reasoning: the weight of tokens between the markers.
        markers: opening and closing, or None if tokens between them count like the others.
        positions: weighs tokens by their places in a row.

    Attributes:
        weighs_places: whether a token's weight depends on its class or its place.
        positions: see above.

    Raises:
        ValueError: there are classes or markers and no tokenizer.
    """

    def __init__(
        self,
        by_class: Sequence[float] | None,
        tokenizer: Any,
        reasoning: float = 1.0,
        markers: tuple[str, str] | None = None,
        positions: PositionWeights | None = None,
    ) -> None:
        self._table: Tensor | None = None
        self._blocks: ReasoningSpans | None = None
        self._reasoning = reasoning
        self.positions = positions or PositionWeights()
        reads_texts = by_class is not None or markers is not None
        self.weighs_places = reads_texts or self.positions.active
        if not reads_texts:
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
        rows = packed_rows.row_numbers(batch)
        if rows is not None:  # a block that is not closed ends with its row
            real = packed_rows.pad_rows(torch.ones_like(rows), rows, 0)
            inside = self._blocks(packed_rows.pad_rows(ids, rows, 0), real)
            return packed_rows.pack_again(inside, rows)
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
        if given is None and not self.weighs_places:
            return None
        labelled = labels != IGNORE_INDEX
        weights = labelled.float() if given is None else self._checked(given, labelled)
        if self._table is not None:
            self._table = self._table.to(labels.device)
            weights = weights * self._table[labels.clamp(0, len(self._table) - 1)]
        if self.positions.active:
            weights = weights * self.by_position(batch, labels)
        inside = self.in_reasoning(batch) if in_reasoning is None else in_reasoning
        if inside is None:
            return weights
        return torch.where(inside, weights * self._reasoning, weights)

    def by_position(self, batch: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return [B, T] float32 factors of places, those of each row of a packed sequence."""
        rows = packed_rows.row_numbers(batch)
        if rows is None:
            return self.positions(labels)
        found = self.positions(packed_rows.pad_rows(labels, rows, IGNORE_INDEX))
        return packed_rows.pack_again(found, rows)

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
