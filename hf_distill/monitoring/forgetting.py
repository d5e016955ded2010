"""What a student forgets: how likely it still finds rows of another kind than it is trained on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

FORGETTING = "forgetting_hard"

LogProbs = Callable[[dict[str, Tensor]], Tensor]
"""From a batch with labels [B, T], on the device, to log-probabilities [B, T], NaN elsewhere."""


class Forgetting:
    """Measures the cross-entropy of held-out rows.

    Args:
        dataset: rows with a length, which are not trained on.
        collate: makes batches of them, with labels [B, T].
        batch_size: rows of a batch.

    Raises:
        ValueError: the dataset has no rows, or no length.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[Sequence[Any]], dict[str, Tensor]], batch_size: int
    ) -> None:
        has_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not has_rows or not len(dataset):
            raise ValueError(
                "forgetting_dataset must have rows to look up, got a "
                f"{type(dataset).__name__}{' of none' if has_rows else ''}"
            )
        self._dataset, self._collate, self._batch_size = dataset, collate, batch_size

    def measure(
        self, log_probs: LogProbs, place: Callable[[Any], Any], accelerator: Accelerator, ranks: int
    ) -> dict[str, float]:
        """Return the mean cross-entropy of the labelled tokens in nats. Every process must call it.

        Args:
            log_probs: of the student.
            place: moves a batch to the device.
            accelerator: sums over processes.
            ranks: processes with rows of their own; the others read what one of these reads.
        """
        rank = accelerator.process_index // (accelerator.num_processes // ranks)
        size, count = self._batch_size, len(self._dataset)
        sums = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
        # each process runs as often as the others: models in pieces need it
        for start in range(0, math.ceil(count / ranks), size):
            numbers = [i * ranks + rank for i in range(start, start + size)]
            rows = [self._dataset[i] for i in numbers if i < count]
            found = log_probs(place(self._collate(rows or [self._dataset[0]])))
            known = ~found.isnan() & bool(rows)
            total = torch.where(known, -found, 0.0).sum()
            sums += torch.stack([total.float(), known.sum().float()])
        total, tokens = self._sums(accelerator, sums)
        return {FORGETTING: total / tokens} if tokens else {}

    @staticmethod
    def _sums(accelerator: Accelerator, sums: Tensor) -> list[float]:
        reduced: Any = accelerator.reduce(sums, reduction="sum")
        return reduced.tolist()
