"""Numbers that follow training: a constant, or a text such as "linear:0.0->1.0@100"."""

import math
import re
from dataclasses import dataclass
from typing import Union

FORMS = '0.5, "0.5" or "linear:0.0->1.0@100"'
_NUMBER = r"\s*([^\s>@:]+)\s*"
_LINEAR = re.compile(rf"linear:{_NUMBER}->{_NUMBER}@\s*(\d+)\s*")


@dataclass(frozen=True)
class Schedule:
    """A value for each optimizer step: linear from `start` to `end` over `steps`, then `end`.

    Args:
        start: the value before the first step.
        end: the value from step `steps` on.
        steps: optimizer steps between them, >= 0; 0 is the constant `end`, which `start` must be.

    Raises:
        ValueError: a value is not finite, or steps is out of range.
    """

    start: float
    end: float
    steps: int = 0

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"a schedule's values must be finite, got {self.start} and {self.end}")
        if self.steps < 0 or (self.steps == 0 and self.start != self.end):
            raise ValueError(
                f"a schedule from {self.start} to {self.end} needs at least 1 step, "
                f"got {self.steps}"
            )

    @staticmethod
    def parse(value: Union[float, str, "Schedule"]) -> "Schedule":
        """A schedule from a number, a text or a schedule.

        Args:
            value: a number, or its text, is constant; "linear:A->B@N" goes from A to B in N
                optimizer steps.

        Raises:
            ValueError: the text has another form.
        """
        if isinstance(value, Schedule):
            return value
        try:
            if isinstance(value, str) and (found := _LINEAR.fullmatch(value.strip())):
                start, end, steps = found.groups()
                return Schedule(float(start), float(end), int(steps))
            return Schedule(float(value), float(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a schedule must be like {FORMS}, got {value!r}: {error}") from error

    def at(self, step: int) -> float:
        """The value after `step` optimizer steps, step >= 0."""
        if step < 0:
            raise ValueError(f"a schedule's step must not be negative, got {step}")
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value."""
        return min(self.start, self.end), max(self.start, self.end)
