"""Metrics, summed where they arise and read once per log."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from metal_ops.functional import LinearTerms

MEANS = ("soft", "hard", "student_entropy", "teacher_entropy", "top1_agreement", "clipped")


def _total(sums: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Sums over all processes."""
    total: Any = accelerator.reduce(torch.tensor(sums, device=accelerator.device), reduction="sum")
    return total.tolist()


class CompletionMeter:
    """Lengths of sampled completions since the last reading, over all processes.

    `completion_length` is the mean in tokens, `completion_ended` the share that stopped at an end
    token; a falling share is how a collapsing self-teacher shows first.
    """

    def __init__(self) -> None:
        self._sums = [0, 0, 0]

    def add(self, completions: Sequence[Sequence[int]], end_ids: Sequence[int]) -> None:
        """Count completions."""
        ended = sum(completion[-1] in end_ids for completion in completions)
        counts = (len(completions), sum(map(len, completions)), ended)
        self._sums = [a + b for a, b in zip(self._sums, counts, strict=True)]

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics; starts anew. Every process must call it."""
        count, length, ended = _total(self._sums, accelerator)
        self._sums = [0, 0, 0]
        if not count:
            return {}
        return {"completion_length": length / count, "completion_ended": ended / count}


class ShareMeter:
    """The share of rows with a flag since the last reading, over all processes, under a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sums = [0, 0]

    def add(self, flags: Tensor) -> None:
        """Count rows, [B] bool."""
        counts = (int(flags.sum()), len(flags))
        self._sums = [a + b for a, b in zip(self._sums, counts, strict=True)]

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The metric; starts anew. Every process must call it."""
        flagged, count = _total(self._sums, accelerator)
        self._sums = [0, 0]
        return {self.name: flagged / count} if count else {}


class TokenMeter:
    """Means over all tokens since the last reading, over all processes.

    `soft` and `hard` are nats per token as they enter the loss (soft with its temperature scaling),
    the entropies are nats at the loss's temperature, `top1_agreement` and `clipped` are shares of
    the tokens, `tokens` is their number.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, terms: LinearTerms) -> None:
        """Count one micro-batch; no synchronisation with the device."""
        rows = torch.stack([terms.soft, terms.hard, *terms.stats]).detach()
        # MPS has no float64; float32 counts tokens exactly up to 2^24 between two readings
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        count = torch.full((1,), rows.shape[1], dtype=dtype, device=rows.device)
        sums = torch.cat([rows.sum(1, dtype=dtype), count])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, accelerator: Accelerator, unused: tuple[str, ...] = ()) -> dict[str, float]:
        """The metrics, without those named `unused`; starts anew. Every process must call it."""
        empty = self._sums is None
        sums = torch.zeros(len(MEANS) + 1, device=accelerator.device) if empty else self._sums
        self._sums = None
        total: Any = accelerator.reduce(sums, reduction="sum")
        *sums, tokens = total.tolist()
        if not tokens:
            return {}
        means = {k: v / tokens for k, v in zip(MEANS, sums, strict=True) if k not in unused}
        return {**means, "tokens": tokens}
