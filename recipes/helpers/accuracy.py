"""Accuracy of a model on a task: greedy completions, graded, with a 95 % interval."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from helpers.math_tasks import Row, Task
from hf_distill import HintCollator
from hf_distill.data import unpad
from hf_distill.rollouts import generate

Z_95 = 1.959964  # standard normal quantile of 97.5 %


@dataclass(frozen=True)
class Accuracy:
    """Holds a share of right answers.

    Args:
        right: number of right answers.
        total: number of problems, at least 1.
        mean_length: tokens of a completion.
        ended: share of completions that ended by themselves.
    """

    right: int
    total: int
    mean_length: float
    ended: float

    @property
    def share(self) -> float:
        """Return the share, in [0, 1]."""
        return self.right / self.total

    def interval(self) -> tuple[float, float]:
        """Return the share's 95 % interval: Wilson's score interval, which stays inside [0, 1]."""
        n, p = self.total, self.share
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
        return centre - half, centre + half

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:6.1%} ({self.right}/{self.total}, 95 % {low:.1%} to {high:.1%})"

    def to_dict(self) -> dict[str, object]:
        """Return what JSON can hold."""
        return {**asdict(self), "share": self.share, "interval_95": self.interval()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Accuracy":
        """Read what `to_dict` gave."""
        return cls(**{x.name: values[x.name] for x in fields(cls)})


def measure(
    model: nn.Module,
    task: Task,
    rows: list[Row],
    collator: HintCollator,
    *,
    hinted: bool,
    max_completion_length: int,
    batch_size: int,
    description: str,
) -> Accuracy:
    """Measure greedy accuracy on rows, with or without the hint in the context.

    Every process takes its share of the rows; all get the same result. Rows are sorted by length,
    so that a batch has little padding.
    """
    state = PartialState()
    name = "teacher_prompt" if hinted else "prompt"
    batch = collator.contexts(rows)
    prompts = unpad(batch[f"{name}_ids"], batch[f"{name}_mask"])
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))[
        state.process_index :: state.num_processes
    ]
    tokenizer, graded = collator.tokenizer, []
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for chunk in tqdm(chunks, desc=description, leave=False, disable=not state.is_main_process):
        completions = generate(
            model,
            [prompts[i] for i in chunk],
            pad_token_id=collator.pad_token_id,
            eos_token_id=collator.eos_token_id,
            max_completion_length=max_completion_length,
            temperature=0.0,
            seed=0,
        )
        for i, ids in zip(chunk, completions, strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            ended = len(ids) < max_completion_length or ids[-1] == collator.eos_token_id
            graded.append((task.is_right(text, rows[i]), len(ids), ended))
    graded = gather_object(graded)
    right, lengths, ended = (sum(values) for values in zip(*graded, strict=True))
    total = len(graded)
    return Accuracy(int(right), total, lengths / total, ended / total)
