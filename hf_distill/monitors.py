"""Metrics, summed where they arise and read once per log."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill.token_classes import CLASSES
from metal_ops.functional import LinearTerms

MEANS = ("soft", "hard", "student_entropy", "teacher_entropy", "top1_agreement", "clipped")
HINT_NGRAM = 4  # tokens; shorter runs are shared by chance


def _total(sums: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Sums over all processes."""
    total: Any = accelerator.reduce(torch.tensor(sums, device=accelerator.device), reduction="sum")
    return total.tolist()


class CompletionMeter:
    """Lengths of sampled completions since the last reading, over all processes.

    `completion_length` is the mean in tokens, `completion_ended` the share that stopped at an end
    token, `completions` their number.
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
        means = {"completion_length": length / count, "completion_ended": ended / count}
        return {**means, "completions": count}


def _ngrams(ids: Sequence[int], length: int = HINT_NGRAM) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(length)), strict=False))


class HintOverlapMeter:
    """How much of the completions stands in the hints, since the last reading, over all processes.

    `hint_overlap` is the share of the completions' 4-grams of token ids that are in the row's hint
    and not in its prompt, which is all that the student sees. Rows whose hint has no 4-gram of its
    own are not counted.
    """

    def __init__(self) -> None:
        self._sums = [0, 0]

    def add(
        self,
        completions: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]],
        hints: Sequence[Sequence[int]],
    ) -> None:
        """Count rows of token ids: the completion, the student's prompt, the hint."""
        for completion, prompt, hint in zip(completions, prompts, hints, strict=True):
            own = set(_ngrams(hint)) - set(_ngrams(prompt))
            if own:
                found = _ngrams(completion)
                self._sums[0] += sum(x in own for x in found)
                self._sums[1] += len(found)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The metric; starts anew. Every process must call it."""
        copied, count = _total(self._sums, accelerator)
        self._sums = [0, 0]
        return {"hint_overlap": copied / count} if count else {}


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


def _by_class(split: Sequence[float]) -> dict[str, float]:
    """Metrics from the sums of soft of each class and the numbers of their tokens."""
    sums, counts = split[: len(CLASSES)], split[len(CLASSES) :]
    found: dict[str, float] = {}
    for name, soft, count in zip(CLASSES[: len(counts)], sums, counts, strict=True):
        if count:
            found[f"soft_{name}"] = soft / count
            found[f"share_{name}"] = soft / sum(sums) if sum(sums) else 0.0
    return found


class TokenMeter:
    """Means over all tokens since the last reading, over all processes.

    `soft` and `hard` are nats per token as they enter the loss (soft with its temperature scaling),
    the entropies are nats at the loss's temperature, `top1_agreement` and `clipped` are shares of
    the tokens, `tokens` is their number. With the classes of tokens, `soft_<class>` is the mean of
    soft over the tokens of a class, `share_<class>` the class's share of the summed soft loss.

    Args:
        classes: [V] int64, indices into `CLASSES`, or None.
    """

    def __init__(self, classes: Tensor | None = None) -> None:
        self._classes = classes
        self._sums: Tensor | None = None

    def _num_sums(self) -> int:
        return len(MEANS) + 1 + (0 if self._classes is None else 2 * len(CLASSES))

    def add(self, terms: LinearTerms, targets: Tensor) -> None:
        """Count one micro-batch of scored tokens, [N] int64; no synchronisation with the device."""
        assert terms.stats is not None
        rows = torch.stack([terms.soft, terms.hard, *terms.stats]).detach()
        # MPS has no float64; float32 counts tokens exactly up to 2^24 between two readings
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        count = torch.full((1,), rows.shape[1], dtype=dtype, device=rows.device)
        sums = [rows.sum(1, dtype=dtype), count]
        if self._classes is not None:
            self._classes = self._classes.to(rows.device)  # once
            numbers = torch.arange(len(CLASSES), device=rows.device)
            member = (self._classes[targets] == numbers[:, None]).to(dtype)
            sums += [member @ terms.soft.detach().to(dtype), member.sum(1)]
        total = torch.cat(sums)
        self._sums = total if self._sums is None else self._sums + total

    def read(self, accelerator: Accelerator, unused: tuple[str, ...] = ()) -> dict[str, float]:
        """The metrics, without those named `unused`; starts anew. Every process must call it."""
        empty = self._sums is None
        sums = torch.zeros(self._num_sums(), device=accelerator.device) if empty else self._sums
        self._sums = None
        total: Any = accelerator.reduce(sums, reduction="sum")
        sums, (tokens, *split) = total[: len(MEANS)].tolist(), total[len(MEANS) :].tolist()
        if not tokens:
            return {}
        means = {k: v / tokens for k, v in zip(MEANS, sums, strict=True) if k not in unused}
        return {**means, "tokens": tokens, **_by_class(split)}


class MeanMeter:
    """Means of values, by name, since the last reading, over all processes.

    Args:
        names: of the means; a name without values is left out of a reading.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count values [n], by name; a NaN is none. No synchronisation with the device."""
        for name, each in values.items():
            dtype = torch.float32 if each.device.type == "mps" else torch.float64
            pair = torch.stack([each.nansum(dtype=dtype), (~each.isnan()).sum(dtype=dtype)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means; starts anew. Every process must call it."""
        if not self.names:
            return {}
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        zero = torch.zeros(2, dtype=dtype, device=accelerator.device)
        pairs = torch.stack([self._sums.pop(name, zero) for name in self.names])
        total: Any = accelerator.reduce(pairs, reduction="sum")
        found = zip(self.names, total.tolist(), strict=True)
        return {name: value / count for name, (value, count) in found if count}
