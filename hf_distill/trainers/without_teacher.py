"""The loss of a trainer without a teacher: the student's own, counted as with one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_distill.data import packed_rows, token_weights
from hf_distill.data.sides import IGNORE_INDEX, at_least_one_item
from hf_distill.losses.hard_loss import ignores_count, probe_labels
from hf_distill.models.structure import (
    Kind,
    causal_lm,
    check_kind,
    is_classifier,
    kind_of,
    output_head,
)
from hf_distill.trainers.classification import compares_classes
from hf_distill.trainers.evaluation import Evaluation
from hf_distill.trainers.tasks import ignore_rows_from

Compute = Callable[[Mapping[str, Any], Any], tuple[Tensor, Any]]
"""The Trainer's loss and outputs of a batch, given what sums are divided by, or None."""


class ModelLoss:
    """Computes the mean of the student's loss over a step's labelled tokens or rows.

    The Trainer leaves it to the model what the loss is divided by. Of models whose loss counts the
    first label of a row, or is a mean over each micro-batch, it would not be this mean.

    Args:
        model: the student, with its adapters.
        label_name: the batch's key of the labels.
        accepts_count: whether its forward takes `num_items_in_batch`.
        has_users_loss: whether there is a `compute_loss_func` or label smoothing now.
        sharded: whether parameters lie in pieces, so that the model cannot be probed.
    """

    def __init__(
        self,
        model: nn.Module,
        label_name: str,
        *,
        accepts_count: bool,
        has_users_loss: Callable[[], bool],
        sharded: bool,
    ) -> None:
        self._model, self._label_name, self._has_users_loss = model, label_name, has_users_loss
        self._of_rows = is_classifier(causal_lm(model))
        # a classifier's loss is a mean over the rows of a micro-batch in every model
        self._counts = accepts_count and not self._of_rows
        self._to_probe = self._counts and not sharded

    def labelled(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return [] how many tokens or rows of a batch have labels, or None where it has none."""
        labels = batch.get(self._label_name)
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        if self._of_rows:
            return (labels != IGNORE_INDEX).sum()
        shifted = batch.get("shift_labels")
        return ((labels[..., 1:] if shifted is None else shifted) != IGNORE_INDEX).sum()

    def count(self, batches: Sequence[Any], device: torch.device) -> Tensor | None:
        """Return [] how many labelled tokens or rows a step has, or None where a batch has none."""
        found = [self.labelled(x) if isinstance(x, Mapping) else None for x in batches]
        if not found or any(each is None for each in found):
            return None
        return torch.stack([cast(Tensor, each).to(device) for each in found]).sum()

    def __call__(
        self,
        compute: Compute,
        inputs: Mapping[str, Any],
        num_items: Tensor | int | None,
        evaluation: Evaluation,
    ) -> tuple[Tensor, Any]:
        """Return the batch's part of the loss, and the outputs.

        Args:
            compute: the Trainer's own.
            inputs: the batch.
            num_items: the count of the step; of an evaluation it is the batch's.
            evaluation: sums what it computes.

        Raises:
            ValueError: the batch has weights of tokens, which the model cannot read.
        """
        if token_weights.KEY in inputs:
            raise ValueError(
                f"{token_weights.KEY} need a teacher; without one the model computes the loss"
            )
        if evaluation.active and self.labelled(inputs) is not None:
            labels, rows = inputs[self._label_name], packed_rows.row_numbers(inputs)
            labels = ignore_rows_from(evaluation.num_rows, labels, rows)
            inputs = {**inputs, self._label_name: labels}
            num_items = self.labelled(inputs)
        own = self.labelled(inputs)
        if own is None:
            return compute(inputs, num_items)
        self._probe(inputs)
        count = at_least_one_item(own if num_items is None else num_items)
        if self._counts or self._has_users_loss():
            loss, outputs = compute(inputs, count)
        else:
            mean, outputs = compute(inputs, None)
            loss = torch.where(own > 0, mean, 0.0) * (own / count)
        if evaluation.active:
            evaluation.parts = lambda mean: [(mean * own, own)]
        return loss, outputs

    def _probe(self, inputs: Mapping[str, Any]) -> None:
        labels = inputs[self._label_name]
        given = {name: value for name, value in inputs.items() if name != self._label_name}
        asked = probe_labels(given, labels) if self._to_probe else None
        if asked is not None:
            self._to_probe, self._counts = False, not ignores_count(self._model, *asked)


def find_counted_labels(lm: nn.Module, names: Sequence[str]) -> str | None:
    """Find the labels of a model whose loss is a mean over labelled tokens or rows; else None."""
    if len(names) != 1:
        return None
    if is_classifier(lm):
        return names[0] if compares_classes(cast(Any, lm).config) else None
    if output_head(lm) is None or kind_of(lm) != Kind.CAUSAL:
        return None
    try:
        check_kind(lm, "student")
    except ValueError:
        return None  # of another task: its loss is what the Trainer makes of it
    return names[0]
