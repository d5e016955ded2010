"""Batches that are filled up to a number of tokens, rather than of rows."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SHOWN_ROWS = 2000  # of which the progress of measuring is shown
IDS = ("input_ids", "teacher_input_ids")


def _ids(batch: Any) -> list[Tensor]:
    found = [batch.get(name) for name in IDS] if isinstance(batch, Mapping) else []
    found = [x for x in found if isinstance(x, Tensor) and x.ndim == 2]
    if not found:
        raise ValueError(
            "max_tokens_per_batch needs batches with input_ids [rows, tokens], the data collator "
            f"makes {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    return found


def row_lengths(dataset: Any, collate: Callable[[list[Any]], Any]) -> list[int]:
    """Return how many tokens each row has on its longer side, made by the collator alone.

    Args:
        dataset: with a length.
        collate: of the training.
    """
    numbers = range(len(dataset))
    shown = tqdm(numbers, desc="counting tokens", disable=len(dataset) < SHOWN_ROWS)
    with torch.random.fork_rng(devices=[]):  # collators may draw
        return [max(x.shape[1] for x in _ids(collate([dataset[i]]))) for i in shown]


def packs(dataset: Any, collate: Callable[[list[Any]], Any]) -> bool:
    """Return whether a collator puts several rows into one sequence."""
    if len(dataset) < 2:
        return False
    with torch.random.fork_rng(devices=[]):
        return len(_ids(collate([dataset[0], dataset[1]]))[0]) == 1


class _Epoch:
    """Holds the epoch, where Accelerate looks for it: in a batch sampler's sampler."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class TokenBatchSampler(BatchSampler):
    """Yields batches of at most so many tokens and rows, for all processes in turn.

    Which rows make a batch is decided once, so that each epoch has as many batches; their order is
    another in each epoch. The number of batches is a multiple of the processes': the last batches
    of an epoch are cut in two for that, or, if `drop_last`, left out. Steps of several processes
    hold the rows of as many batches of one.

    Args:
        lengths: tokens of each row.
        max_tokens: of a batch, >= 1.
        max_rows: of a batch, >= 1.
        packed: whether a batch has as many tokens as its rows together; else it is as wide as its
            longest row, and padding counts.
        num_processes: that take a batch each.
        seed: of the order.
        shuffle: whether rows, and batches in each epoch, are in random order.
        drop_last: whether to leave out batches that not all processes have.

    Raises:
        ValueError: a row has more tokens than a batch may have.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        max_rows: int,
        packed: bool,
        num_processes: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        if lengths[longest] > max_tokens:
            raise ValueError(
                f"no row may have more tokens than a batch, got {lengths[longest]} in row "
                f"{longest} of the data and max_tokens_per_batch={max_tokens}: raise it, or "
                "shorten the rows"
            )
        self.batch_size, self.drop_last, self.sampler = None, drop_last, _Epoch()
        self._seed, self._shuffle, self._num_processes = seed, shuffle, num_processes
        order = list(range(len(lengths)))
        if shuffle:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(lengths), generator=generator).tolist()
        self.batches = _filled(order, lengths, max_tokens, max_rows, packed)
        tokens = sum(lengths)
        logger.info(
            "%d batches of at most %d tokens%s and %d rows: %.1f rows and %.0f tokens on average",
            *(len(self.batches), max_tokens, "" if packed else " with padding", max_rows),
            *(len(lengths) / max(len(self.batches), 1), tokens / max(len(self.batches), 1)),
        )

    def __len__(self) -> int:
        return len(self._for_all(self.batches))

    def __iter__(self) -> Iterator[list[int]]:
        ordered = self.batches
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed + self.sampler.epoch)
            order = torch.randperm(len(ordered), generator=generator).tolist()
            ordered = [ordered[i] for i in order]
        yield from self._for_all(ordered)

    def _for_all(self, batches: Sequence[list[int]]) -> list[list[int]]:
        """Return a multiple of the processes' batches, the last ones left out or cut in two."""
        surplus = len(batches) % self._num_processes
        if self.drop_last:
            return list(batches[: len(batches) - surplus])
        found = list(batches)
        while len(found) % self._num_processes:
            at = max((i for i, x in enumerate(found) if len(x) > 1), default=None)
            if at is None:
                break  # Accelerate takes the first batches again
            half = len(found[at]) // 2
            found[at : at + 1] = found[at][:half], found[at][half:]
        return found


def _filled(
    order: Sequence[int], lengths: Sequence[int], max_tokens: int, max_rows: int, packed: bool
) -> list[list[int]]:
    """Return batches of rows that follow each other, each filled until the next row is too much."""
    batches: list[list[int]] = []
    tokens = longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        tokens += lengths[row]
        size = len(batches[-1]) + 1 if batches else 1
        if not batches or size > max_rows or (tokens if packed else longest * size) > max_tokens:
            batches.append([])
            tokens = longest = lengths[row]
        batches[-1].append(row)
    return batches
