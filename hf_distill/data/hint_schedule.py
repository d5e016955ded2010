"""How many rows get their hints, and how long hints may be, at each optimizer step."""

import copy
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.schedules import Schedule

DIGITS = 6  # of a scheduled length: 63.9999999 tokens are 64

Value = float | str | Schedule


@dataclass(frozen=True)
class HintDropout:
    """Says which rows of an optimizer step lose their hints.

    A row's fate follows from its ids and these numbers alone. No random state is read or moved, and
    the order, the batches and the processes of the rows do not matter. Equal rows of a batch are
    drawn for one by one.

    Args:
        share: expected share of the rows, in [0, 1].
        seed: of the training.
        step: optimizer steps taken.
    """

    share: float
    seed: int
    step: int

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Return for each row of token ids whether its hints are dropped."""
        seen: Counter[tuple[int, ...]] = Counter()
        found = []
        for ids in map(tuple, rows):
            drawn = random.Random(f"hint {self.seed} {self.step} {seen[ids]} {ids}").random()
            found.append(drawn < self.share)
            seen[ids] += 1
        return found


@dataclass(frozen=True)
class HintSchedule:
    """Holds a collator's settings that can depend on the optimizer step.

    Attributes:
        dropout: share of the rows whose hints are dropped.
        length: tokens that hints may add, or None for no limit.
    """

    dropout: Schedule
    length: Schedule | None

    @staticmethod
    def of(hint_dropout: Value, max_hint_length: Value | None, truncation: str) -> "HintSchedule":
        """Make the plan of a `HintCollator`.

        Raises:
            ValueError: a value is out of range, or a length changes that hints are not cut to.
        """
        plan = HintSchedule(
            Schedule.parse(hint_dropout),
            None if max_hint_length is None else Schedule.parse(max_hint_length),
        )
        low, high = plan.dropout.bounds
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"hint_dropout must stay in [0, 1], got {hint_dropout}")
        if plan.length is not None and plan.length.bounds[0] < 0:
            raise ValueError(f"max_hint_length must not be negative, got {max_hint_length}")
        if plan.length_changes and truncation != "hint":
            raise ValueError(
                "a max_hint_length that changes needs truncation 'hint', else a hint that passes "
                f"at one step stops the training at another; got {max_hint_length} with truncation "
                f"{truncation!r}"
            )
        return plan

    @property
    def drops(self) -> bool:
        """Return whether hints are dropped at some step."""
        return self.dropout.bounds[1] > 0

    @property
    def length_changes(self) -> bool:
        """Return whether the length is not the same at all steps."""
        return self.length is not None and self.length.bounds[0] < self.length.bounds[1]

    @property
    def depends_on_step(self) -> bool:
        """Return whether the same rows give other batches at other steps."""
        return self.drops or self.length_changes

    def length_at(self, step: int) -> int | None:
        """Return how many tokens hints may add after `step` optimizer steps; None is no limit."""
        return None if self.length is None else math.floor(round(self.length.at(step), DIGITS))

    def draw(self, step: int, seed: int) -> HintDropout | None:
        """Return which rows of a training step lose their hints; None if no step drops any."""
        return HintDropout(self.dropout.at(step), seed, step) if self.drops else None

    def values(self, step: int, training: bool) -> dict[str, float]:
        """Return what is logged of a step: what is not fixed. Evaluation drops no hints."""
        found: dict[str, float] = {}
        if training and self.drops:
            found["hint_dropout"] = self.dropout.at(step)
        if self.length_changes and (length := self.length_at(step)) is not None:
            found["max_hint_length"] = length
        return found

    def refusal(self) -> str:
        """Say why rows cannot be made without a step."""
        said = [f"hint_dropout {_range(self.dropout)}"] if self.drops else []
        if self.length is not None and self.length_changes:
            said.append(f"max_hint_length {_range(self.length)}")
        return f"what the teacher reads depends on the optimizer step ({', '.join(said)})"


def _range(schedule: Schedule) -> str:
    low, high = schedule.bounds
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def hint_schedule_of(collator: Any) -> HintSchedule | None:
    """Find the plan of a `HintCollator`, or of one inside a collator; None if rows need no step.

    Args:
        collator: a collator that wraps another has it as its attribute `collator`.
    """
    while collator is not None:
        plan = getattr(collator, "hint_plan", None)
        if isinstance(plan, HintSchedule):
            return plan
        collator = getattr(collator, "collator", None)
    return None


def collator_at_step(collator: Any, step: int, seed: int | None) -> Any:
    """Return a collator with a plan as it is at an optimizer step: see `HintCollator.at`."""
    if isinstance(getattr(collator, "hint_plan", None), HintSchedule):
        return collator.at(step, seed)
    outer = copy.copy(collator)
    outer.collator = collator_at_step(collator.collator, step, seed)
    return outer
