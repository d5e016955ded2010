"""The order of rows when completions are used for several optimizer steps."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Every window of indices `repeats` times in a row, in an order shuffled anew each epoch.

    A window is what one optimizer step takes on all processes; an incomplete last one is left out.
    """

    def __init__(self, num_rows: int, window: int, repeats: int, seed: int, shuffle: bool) -> None:
        if num_rows < window:
            raise ValueError(
                f"steps_per_rollout {repeats} > 1 needs at least one optimizer step of rows "
                f"({window}), got {num_rows}"
            )
        self.num_rows, self.window, self.repeats = num_rows, window, repeats
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.window * self.window * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.arange(self.num_rows)
        if self.shuffle:
            order = torch.randperm(self.num_rows, generator=generator)
        for start in range(0, self.num_rows - self.window + 1, self.window):
            for _ in range(self.repeats):
                yield from order[start : start + self.window].tolist()
