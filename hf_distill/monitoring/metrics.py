"""Metrics, summed where they arise and read once per log."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_distill.data.token_classes import CLASSES

logger = logging.getLogger(__name__)

MEANS = ("soft", "hard", "student_entropy", "teacher_entropy", "top1_agreement", "clipped")
LOSSES = frozenset(
    (
        *("soft", "hard", "perplexity", "hidden", "attention", "aux", "forgetting_hard"),
        *(f"soft_{x}" for x in CLASSES),
    )
)
"""The metrics of an evaluation, besides its loss, of which less is better."""

TOKENS = "tokens"  # the metric that is their number
HINT_NGRAM = 4  # tokens; shorter runs are shared by chance


def _total(sums: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Return the sums over all processes."""
    total: Any = accelerator.reduce(torch.tensor(sums, device=accelerator.device), reduction="sum")
    return total.tolist()


class CompletionMeter:
    """Measures the lengths of sampled completions since the last reading, over all processes.

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
        """Return the metrics, and start anew. Every process must call it."""
        count, length, ended = _total(self._sums, accelerator)
        self._sums = [0, 0, 0]
        if not count:
            return {}
        means = {"completion_length": length / count, "completion_ended": ended / count}
        return {**means, "completions": count}


def _ngrams(ids: Sequence[int], length: int = HINT_NGRAM) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(length)), strict=False))


class HintOverlapMeter:
    """Measures what share of completions is in hints since the last reading, over all processes.

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
        """Return the metric, and start anew. Every process must call it."""
        copied, count = _total(self._sums, accelerator)
        self._sums = [0, 0]
        return {"hint_overlap": copied / count} if count else {}


class ShareMeter:
    """Measures a named share: rows with a flag since the last reading, over all processes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._flagged: Tensor | int = 0
        self._count = 0

    def add(self, flags: Tensor) -> None:
        """Count rows, [B] bool; nothing waits for the device."""
        self._flagged, self._count = self._flagged + flags.sum(), self._count + len(flags)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metric, and start anew. Every process must call it."""
        flagged, count = _total([int(self._flagged), self._count], accelerator)
        self._flagged = self._count = 0
        return {self.name: flagged / count} if count else {}


UNSCORED = "unscored_batches"


class UnscoredMeter:
    """Counts batches without a token (or row) to score since the last reading, over all processes.

    Where there are some, `unscored_batches` is their number; the first time a warning says so too.

    Args:
        num_copies: processes that count the same rows (tensor parallelism).
    """

    def __init__(self, num_copies: int = 1) -> None:
        self._num_copies = num_copies
        self._seen = 0
        self._unscored: Tensor | int = 0
        self._warned = False

    def add(self, unscored: Tensor | bool) -> None:
        """Count a batch; a tensor [] is not waited for."""
        self._seen += 1
        self._unscored = self._unscored + unscored

    def start(self) -> None:
        """Forget what was counted."""
        self._seen, self._unscored = 0, 0

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metric, and start anew. Every process must call it."""
        totals = _total([int(self._unscored), self._seen], accelerator)
        unscored, seen = (total // self._num_copies for total in totals)
        self.start()
        if unscored and not self._warned and accelerator.is_main_process:
            logger.warning(
                "%d of %d batches had nothing to score: all their labels are -100 (the first token "
                "of a row is never scored), or their weights are 0. In training their loss is 0, "
                "an evaluation skips them; %s counts them from here on",
                unscored, seen, UNSCORED,
            )  # fmt: skip
        self._warned = self._warned or bool(unscored)
        return {UNSCORED: unscored} if unscored else {}


class TokenMeter:
    """Averages over the scored tokens since the last reading, over all processes.

    `soft` and `hard` are nats per token as they enter the loss (soft with its temperature scaling),
    the entropies are nats at the loss's temperature, `top1_agreement` and `clipped` are shares of
    the tokens, `tokens` is their number. With the classes of tokens, `soft_<class>` is the mean of
    soft over the tokens of a class, `share_<class>` the class's share of the summed soft loss.
    Other metrics have the names that a loss gives them. What was not measured is absent.

    Args:
        classes: [V] int64, indices into `CLASSES`, or None.
        num_copies: processes that count the same rows (tensor parallelism).
    """

    def __init__(self, classes: Tensor | None = None, num_copies: int = 1) -> None:
        self._classes, self._num_copies = classes, num_copies
        self._sums: dict[str, Tensor] = {}  # by name [2]: the sum, and how many
        self._of_classes: Tensor | None = None  # [2 * CLASSES]: sums of soft, numbers of tokens

    def start(self) -> None:
        """Forget what was counted: of a run or an evaluation that did not end, say."""
        self._sums, self._of_classes = {}, None

    def add(
        self,
        metrics: Mapping[str, Tensor],
        targets: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> None:
        """Count one micro-batch; it waits for the device, once, only if tokens are left out.

        Args:
            metrics: by name, values of tokens; a NaN is none.
            targets: [N] int64, if the metrics are those of a loss.
            counted: [N] bool, the tokens that count, or None for all.
        """
        values = {name: value.detach() for name, value in metrics.items()}
        if targets is not None:
            if counted is not None:
                of_tokens = {name for name, value in values.items() if len(value) == len(counted)}
                kept = counted.nonzero()[:, 0]
                values |= {name: values[name][kept] for name in of_tokens}
                targets = targets[kept]
            self._count(TOKENS, targets.new_ones(len(targets), dtype=torch.float32)[None])
            self._add_classes(values, targets)
        together = [name for name in MEANS if name in values]
        if together:
            stacked = torch.stack([values.pop(name) for name in together])
            for name, sums in zip(together, _sums(stacked), strict=True):
                self._keep(name, sums)
        for name, value in values.items():
            self._count(name, value[None])

    def _count(self, name: str, row: Tensor) -> None:
        self._keep(name, _sums(row)[0])

    def _keep(self, name: str, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _add_classes(self, values: Mapping[str, Tensor], targets: Tensor) -> None:
        if self._classes is None or "soft" not in values:
            return
        self._classes = self._classes.to(targets.device)  # once
        numbers = torch.arange(len(CLASSES), device=targets.device)
        dtype = sum_dtype(targets.device)
        member = (self._classes[targets] == numbers[:, None]).to(dtype)
        sums = torch.cat([member @ values["soft"].to(dtype), member.sum(1)])
        self._of_classes = sums if self._of_classes is None else self._of_classes + sums

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics, and start anew. Every process must call it."""
        names = self._names(accelerator)
        dtype, device = sum_dtype(accelerator.device), accelerator.device
        zero = torch.zeros(2, dtype=dtype, device=device)
        parts = [self._sums.get(name, zero) for name in names]
        if self._classes is not None:
            empty = torch.zeros(2 * len(CLASSES), dtype=dtype, device=device)
            parts.append(empty if self._of_classes is None else self._of_classes)
        self.start()
        if not parts:
            return {}
        total: Any = accelerator.reduce(torch.cat(parts), reduction="sum")
        sums = total.tolist()
        pairs = zip(names, sums[::2], sums[1::2], strict=False)
        found = {
            name: count / self._num_copies if name == TOKENS else value / count
            for name, value, count in pairs
            if count
        }
        return found | _by_class(sums[2 * len(names) :], found)

    def _names(self, accelerator: Accelerator) -> list[str]:
        """Return what some process has measured, in one order on all of them."""
        names = set(self._sums)
        if accelerator.num_processes > 1:
            names = set(gather_object(sorted(names)))
        known = [name for name in (*MEANS, TOKENS) if name in names]
        return known + sorted(names - {*known})


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return what many numbers are summed in: float64 where the device has it."""
    # MPS has no float64; float32 counts tokens exactly up to 2^24 between two readings
    return torch.float32 if device.type == "mps" else torch.float64


def _sums(rows: Tensor) -> Tensor:
    """Return [k, 2]: the sums of rows [k, n], and how many values each has that are no NaN."""
    dtype = sum_dtype(rows.device)
    return torch.stack([rows.nansum(1, dtype=dtype), (~rows.isnan()).sum(1, dtype=dtype)], dim=1)


def _by_class(split: Sequence[float], means: Mapping[str, float]) -> dict[str, float]:
    """Make metrics from the sums of soft of each class and the numbers of their tokens."""
    sums, counts = split[: len(CLASSES)], split[len(CLASSES) :]
    found: dict[str, float] = {}
    for name, soft, count in zip(CLASSES[: len(counts)], sums, counts, strict=True):
        if count and "soft" in means:
            found[f"soft_{name}"] = soft / count
            found[f"share_{name}"] = soft / sum(sums) if sum(sums) else 0.0
    return found
