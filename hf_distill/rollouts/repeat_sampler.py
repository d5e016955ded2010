"""The order of rows when completions are used for several optimizer steps."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Yields each window of indices `repeats` times in a row, in an order shuffled each epoch.

    A window is what one optimizer step takes on all processes: each of its rows `copies` times, one
    beside the other; an incomplete last window is left out.

    Raises:
        ValueError: there are fewer rows than a window needs.
    """

    def __init__(
        self,
        num_rows: int,
        window: int,
        repeats: int,
        seed: int,
        shuffle: bool,
        copies: int = 1,
    ) -> None:
        distinct = window // copies
        if num_rows < distinct:
            raise ValueError(
                f"completions that are repeated need at least one optimizer step of rows "
                f"({distinct}), got {num_rows}"
            )
        self.num_rows, self.distinct, self.repeats, self.copies = (
            num_rows,
            distinct,
            repeats,
            copies,
        )
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as the Trainer does before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.distinct * self.distinct * self.copies * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.arange(self.num_rows)
        if self.shuffle:
            order = torch.randperm(self.num_rows, generator=generator)
        for start in range(0, self.num_rows - self.distinct + 1, self.distinct):
            window = order[start : start + self.distinct].repeat_interleave(self.copies).tolist()
            for _ in range(self.repeats):
                yield from window
