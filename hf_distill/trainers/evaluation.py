"""The loss of an evaluation: one mean over all that it scores, of all batches and processes.

The Trainer takes the mean of the batches' losses, each as often as it has rows: a token of a short
batch counts more than one of a long batch, and the result depends on the batch size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hf_distill.data.packed_rows import row_numbers
from hf_distill.monitoring.metrics import sum_dtype

Part = tuple[Tensor, Tensor | int]
"""A sum over some tokens or rows of a batch, and what it is divided by."""

NUM_PARTS = 2  # a classifier's loss is a mean over rows and one over labelled rows


class Evaluation:
    """Holds what an evaluation sums, and the batch that it is at.

    Attributes:
        active: whether a batch of an evaluation is being computed.
        num_rows: how many of its rows count, or None for all; see `rows_that_count`.
        parts: of the batch's loss [], set by who computes it; None where nobody says, and the loss
            is what the Trainer makes of it.
    """

    def __init__(self) -> None:
        self.active = False
        self.num_rows: int | None = None
        self.parts: Callable[[Tensor], Sequence[Part]] | None = None
        self._sums: Tensor | None = None

    @contextmanager
    def batch(self, num_rows: int | None) -> Iterator[None]:
        """Inside the block a batch is computed, of which so many rows count."""
        self.active, self.num_rows = True, num_rows
        try:
            yield
        finally:
            self.active, self.num_rows, self.parts = False, None, None

    def add(self, loss: Tensor) -> Tensor:
        """Count a batch's loss []; nothing waits for the device.

        Returns:
            The loss, or NaN where the batch has nothing to score, as in the Trainer.
        """
        loss = loss.detach()
        if self.parts is None:
            return loss
        scored: Any = False
        for i, (total, count) in enumerate(self.parts(loss)):
            total = total.detach().to(sum_dtype(total.device))
            count = torch.as_tensor(count).to(total)
            # what has nothing to be divided by is no loss, whatever it says
            pair = torch.stack([torch.where(count > 0, total, 0.0), count])
            if self._sums is None:
                self._sums = pair.new_zeros(NUM_PARTS, 2)
            self._sums[i] += pair
            scored = scored | (count > 0)
        return torch.where(scored, loss, torch.nan)

    def start(self) -> None:
        """Forget what was summed: of an evaluation that did not end, say."""
        self._sums = None

    def read(self, accelerator: Accelerator) -> float | None:
        """Return the loss, and start anew. Every process must call it.

        Returns:
            NaN where nothing was scored, None where no batch has a loss.
        """
        own, self._sums = self._sums, None
        device = accelerator.device
        sums = torch.zeros(NUM_PARTS + 1, 2, dtype=sum_dtype(device), device=device)
        if own is not None:
            sums[:NUM_PARTS], sums[NUM_PARTS] = own, 1.0
        reduced: Any = accelerator.reduce(sums, reduction="sum")
        *parts, (has_batches, _) = reduced.tolist()
        if not has_batches:
            return None
        means = [total / count for total, count in parts if count > 0]
        return sum(means) if means else math.nan


def rows_that_count(accelerator: Accelerator, inputs: Mapping[str, Any]) -> int | None:
    """Return how many of a batch's first rows are not there to fill it, or None for all.

    Processes get as many batches, of as many rows: the last ones are filled with rows that were
    evaluated before. `Accelerator.gather_for_metrics` drops these again.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    loader: Any = state.active_dataloader
    packed = row_numbers(inputs)
    num_rows = find_batch_size(inputs) if packed is None else int(packed.max()) + 1
    usual = loader.total_batch_size // accelerator.num_processes
    cuts = isinstance(loader, DataLoaderDispatcher)  # the last batch into equal parts
    if num_rows is None or not (num_rows == usual or (cuts and num_rows < usual)):
        return None  # its rows are not those of the loader, which has packed them, say
    before = accelerator.process_index * num_rows
    return min(max(state.remainder - before, 0), num_rows)


def perplexity(cross_entropy: float) -> float:
    """Return the exponential of nats per token, infinite where that overflows."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf
