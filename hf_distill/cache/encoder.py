"""From rows of the data to rows of a shard, through the teacher.

Shapes: B rows, N scored tokens of a batch, V logits per token.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_distill.cache import fingerprints
from hf_distill.cache.codecs import Arrays, Codec
from hf_distill.cache.fingerprints import Collator, Data, SideRow
from hf_distill.cache.shard import Row
from hf_distill.data import batches
from hf_distill.data.hint_schedule import hint_schedule_of
from hf_distill.data.sides import Side
from hf_distill.losses import chunks
from hf_distill.models import pieces
from hf_distill.models.forward import Reader
from hf_distill.models.modes import evaluating
from hf_distill.models.probe_rows import PROBE_TOKENS
from hf_distill.models.signals import Signal


@dataclass(frozen=True)
class RowEncoder:
    """Makes the rows of shards; how a row's arrays come about is left to its kinds.

    Attributes:
        data: all rows.
        collator: of the training.
        codec: what is stored.
        seed: of draws.
        batch_size: rows that are asked for at once, at most.
        shard_rows: rows in a shard.
        vocab: logits per token.
        real_vocab: how many of them belong to the tokenizer.
    """

    data: Data
    collator: Collator
    codec: Codec
    seed: int
    batch_size: int
    shard_rows: int
    vocab: int
    real_vocab: int

    def __post_init__(self) -> None:
        """Check that rows are the same whenever they are made."""
        plan = hint_schedule_of(self.collator)
        if plan is not None:
            raise ValueError(
                f"a cache holds one answer for each row, and {plan.refusal()}: cache without that, "
                "or collator.at(step)"
            )

    @property
    def width(self) -> int:
        """Return how many values of a token the codec is given."""
        return self.vocab

    def codec_notes(self) -> dict[str, Any]:
        """Return what the manifest says of the codec besides its settings."""
        return {}

    def lay_down(self, cache: Path, is_new: bool, verify: str) -> None:
        """Write what the shards need beside them; only the main process does, before the first.

        Args:
            cache: the folder.
            is_new: whether there are no shards yet.
            verify: see `cache_teacher`.
        """

    def pick_up(self, cache: Path) -> None:
        """Read what has been laid down; every process does, before its first shard."""

    @abstractmethod
    def probe(self) -> None:
        """Prepare a process; each calls this once, before the first shard."""

    @abstractmethod
    def _encode(self, rows: Sequence[SideRow], keys: Sequence[tuple[int, int]]) -> list[Arrays]:
        """Return the arrays of some rows that score tokens; keys are (seed, row)."""

    def rows(self, number: int) -> range:
        """Return the numbers of a shard's rows."""
        first = number * self.shard_rows
        return range(first, min(first + self.shard_rows, len(self.data)))

    def wait(self) -> None:
        """Do what the other processes need of this one, which has no shard while they have one."""
        self._take_part(self._calls_of_others(0))

    def _calls_of_others(self, calls: int) -> int:
        """Return how often others still ask the teacher after this process's calls for a shard."""
        return 0

    def _take_part(self, calls: int) -> None:
        """Ask the teacher with others, and keep nothing."""

    def shard(self, number: int) -> list[Row]:
        """Return what is stored of a shard's rows."""
        numbers = self.rows(number)
        given = [self.data[i] for i in numbers]
        made = list(fingerprints.collated(self.collator, given, numbers.start))
        for i, row in zip(numbers, made, strict=True):
            if max(row.ids, default=0) >= self.real_vocab:
                raise ValueError(
                    f"row {i} of the data: ids must be below {self.real_vocab}, those of the "
                    f"teacher and the tokenizer; got {max(row.ids)}"
                )
        empty = {k: np.zeros(0, v) for k, v in self.codec.arrays(self.vocab).items()}
        stored: list[Mapping[str, np.ndarray]] = [empty] * len(made)
        scored = [i for i, row in enumerate(made) if len(row.positions)]
        scored.sort(key=lambda i: (-int(made[i].positions[-1]), i))  # little padding, largest first
        batches = [
            scored[start : start + self.batch_size]
            for start in range(0, len(scored), self.batch_size)
        ]
        others = self._calls_of_others(len(batches))
        for chosen in batches:
            keys = [(self.seed, numbers[i]) for i in chosen]
            for i, arrays in zip(
                chosen, self._encode([made[i] for i in chosen], keys), strict=True
            ):
                stored[i] = {name: arrays[name] for name in empty}
        self._take_part(others)
        parts = zip(numbers, made, stored, strict=True)
        return [Row(i, row.hash, row.positions, arrays) for i, row, arrays in parts]


@dataclass(frozen=True)
class SignalEncoder(RowEncoder):
    """Makes rows from logits, or from hidden states and a head."""

    @abstractmethod
    def signal(self, rows: Sequence[SideRow]) -> Signal:
        """Return what the teacher says of the scored tokens of some rows."""

    @torch.no_grad()
    def _encode(self, rows: Sequence[SideRow], keys: Sequence[tuple[int, int]]) -> list[Arrays]:
        signal = self.signal(rows)
        lengths = [len(row.positions) for row in rows]
        made, start = [], 0
        for group in _groups(lengths, max(1, chunks.CHUNK_ENTRIES // self.vocab)):
            stop = start + sum(lengths[group])
            logits = _logits(signal, slice(start, stop))
            try:
                made += self.codec.encode(logits, lengths[group], keys[group], self.real_vocab)
            except ValueError as error:
                numbers = [row for _, row in keys[group]]
                raise ValueError(f"rows {numbers} of the data: {error}") from error
            start = stop
        return made


@dataclass(frozen=True)
class Encoder(SignalEncoder):
    """Makes rows by running a model.

    Attributes:
        model: the teacher, on `device`.
        device: of the batches.
        reader: runs the model.
        in_pieces: whether processes, with rows of their own, must call the model together.
    """

    model: nn.Module
    device: torch.device
    reader: Reader
    in_pieces: bool = False

    def _probed(self) -> dict[str, Tensor]:
        """Return inputs that are the same in every process."""
        ids = torch.arange(min(PROBE_TOKENS, self.real_vocab), device=self.device)
        return {"input_ids": ids[None]}

    def probe(self) -> None:
        """Find out how the model is read, from the same ids in every process."""
        with evaluating(self.model):
            self.reader.reads_hidden(self.model, self._probed())

    def _calls_of_others(self, calls: int) -> int:
        return pieces.most(calls) - calls if self.in_pieces else 0

    @torch.no_grad()
    def ask_probe(self) -> Signal:
        """Return what the model says of the same ids in every process."""
        inputs = self._probed()
        side = Side(inputs, torch.ones_like(inputs["input_ids"], dtype=torch.bool))
        with evaluating(self.model):
            return self.reader.signal(self.model, side)

    def _take_part(self, calls: int) -> None:
        for _ in range(calls):
            self.ask_probe()

    def _side(self, rows: Sequence[SideRow]) -> Side:
        """Return a batch up to the tokens that predict the last scored ones."""
        ids = [row.ids[: row.positions[-1]] for row in rows]
        inputs = {
            "input_ids": batches.pad(ids, 0),
            "attention_mask": batches.pad([[1] * len(x) for x in ids], 0),
        }
        predicts = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for flags, row in zip(predicts, rows, strict=True):
            flags[torch.from_numpy(row.positions.astype(np.int64)) - 1] = True
        moved = {name: x.to(self.device) for name, x in inputs.items()}
        return Side(moved, predicts.to(self.device))

    @torch.no_grad()
    def signal(self, rows: Sequence[SideRow]) -> Signal:
        """Return what the model says of the scored tokens of some rows."""
        with evaluating(self.model):
            return self.reader.signal(self.model, self._side(rows))


def _groups(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Yield whole rows, as many at a time as have `limit` tokens, but at least one."""
    start = total = 0
    for i, length in enumerate(lengths):
        if i > start and total + length > limit:
            yield slice(start, i)
            start, total = i, 0
        total += length
    yield slice(start, len(lengths))


def _logits(signal: Signal, at: slice) -> Tensor:
    """Return [n, V] logits of the tokens in a slice."""
    if signal.hidden is not None:
        return replace(signal, hidden=signal.hidden[at]).dense()
    return signal.dense()[at]


def sums_of(rows: Sequence[Row]) -> dict[str, float]:
    """Sum over tokens what the codec knows about them."""
    sums: dict[str, float] = {}
    if "entropy" in rows[0].arrays:
        sums["entropy"] = float(sum(row.arrays["entropy"].sum(dtype=np.float64) for row in rows))
    if "log_tail" in rows[0].arrays:
        masses = [np.exp(row.arrays["log_tail"].astype(np.float64)).sum() for row in rows]
        sums["tail_mass"] = float(sum(masses))
    return sums
