"""How much each labelled token counts: the batch's own weights times those of the classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.alignment import IGNORE_INDEX
from hf_distill.token_classes import CLASSES, token_classes

KEY = "token_weights"


class TokenWeights:
    """The weights of a batch's tokens.

    Args:
        class_weights: one for each of `CLASSES`, or None if all are 1.
        tokenizer: what tells the classes; needed with class_weights.

    Raises:
        ValueError: there are class weights and no tokenizer.
    """

    def __init__(self, class_weights: Sequence[float] | None, tokenizer: Any) -> None:
        self._table: Tensor | None = None
        if class_weights is None:
            return
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                "class_weights need a tokenizer as processing_class, got "
                f"{'None' if tokenizer is None else type(tokenizer).__name__}"
            )
        by_class = torch.tensor(class_weights, dtype=torch.float32)
        # the last entry is for all ids that the tokenizer does not have
        beyond = by_class[[CLASSES.index("special")]]
        self._table = torch.cat([by_class[token_classes(tokenizer)], beyond])

    def __call__(self, batch: Any) -> Tensor | None:
        """[B, T] float32, aligned with the labels, zero where they are ignored.

        None if the batch has no labels, or if every token counts as one.

        Raises:
            ValueError: `token_weights` of the batch are not of the labels' shape, or one of a
                labelled token is negative, infinite or NaN.
        """
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            return None
        labels, given = batch["labels"], batch.get(KEY)
        if given is None and self._table is None:
            return None
        labelled = labels != IGNORE_INDEX
        weights = labelled.float() if given is None else self._checked(given, labelled)
        if self._table is None:
            return weights
        self._table = self._table.to(labels.device)
        return weights * self._table[labels.clamp(0, len(self._table) - 1)]

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


def total(batches: Sequence[Any], weights: Sequence[Tensor | None]) -> Tensor:
    """[] float32: the sum of the weights of all tokens that are scored (never a row's first).

    A batch without weights counts its labelled tokens.
    """
    sums = [
        (batch["labels"][:, 1:] != IGNORE_INDEX).sum() if each is None else each[:, 1:].sum()
        for batch, each in zip(batches, weights, strict=True)
    ]
    return torch.stack([x.float() for x in sums]).sum()
