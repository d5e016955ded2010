"""Numbers that follow training: constant, or moving with the optimizer steps, also as texts.

A `Schedule` is a pure function of the step, so that a resumed run needs nothing but its step count.
As a text it is "linear:4.0->1.0@1000", "cosine:4.0->1.0@1000", "exponential:4.0->1.0@1000",
"piecewise:4.0@0,2.0@500,1.0@1000", "constant:2.0" or the bare number, "2.0".
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Union

FORMS = (
    'a number, "0.5", "linear:4.0->1.0@1000", "cosine:4.0->1.0@1000", '
    '"exponential:4.0->1.0@1000", "piecewise:4.0@0,2.0@500,1.0@1000" or "constant:2.0"'
)
_RANGE = re.compile(r"(.+)->(.+)@\s*(\d+)\s*")
_POINT = re.compile(r"(.+)@\s*(\d+)\s*")


def _linear(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _cosine(start: float, end: float, share: float) -> float:
    # (1 - cos(pi share)) / 2, each half from the side where it is small: it stays monotone
    if share <= 0.5:
        way = math.sin(math.pi / 2 * share) ** 2
    else:
        way = 1 - math.sin(math.pi / 2 * (1 - share)) ** 2
    return _linear(start, end, way)


def _exponential(start: float, end: float, share: float) -> float:
    size = math.exp(_linear(math.log(abs(start)), math.log(abs(end)), share))
    return math.copysign(size, start)


_BETWEEN: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "piecewise": _linear,
}
SHAPES = ("constant", *_BETWEEN)
TWO_POINTS = ("linear", "cosine", "exponential")


@dataclass(frozen=True)
class Schedule:
    """Gives a value for each optimizer step.

    Before its first point a schedule has the first value, behind its last point the last one, and
    at a point exactly that of the point; between two points it is monotone. It is made by
    `constant`, `linear`, `cosine`, `exponential`, `piecewise` or, from a number or a text, `parse`;
    `str` gives the text that `parse` reads.

    Args:
        shape: how it goes from a point to the next: "linear", "cosine" (half a wave: level at both
            ends) or "exponential" (the same factor at every step), of two points the first of which
            is at step 0; "piecewise", linear between any number of points; or "constant", of one
            point at step 0.
        points: (step, value) by ascending step; steps are int, >= 0.

    Raises:
        ValueError: the shape is unknown, the points are not the shape's, a value is not finite, or
            the values of "exponential" are not of one sign, or 0.
    """

    shape: str
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.shape not in SHAPES:
            raise ValueError(f"a schedule's shape must be one of {SHAPES}, got {self.shape!r}")
        points = tuple((step, float(value)) for step, value in self.points)
        object.__setattr__(self, "points", points)
        self._check_steps([step for step, _ in points])
        values = [value for _, value in points]
        low, high = min(values), max(values)
        if not (all(map(math.isfinite, values)) and math.isfinite(high - low)):
            raise ValueError(f"a schedule's values must be finite, got {values}")
        if self.shape == "exponential" and low <= 0.0 <= high:
            raise ValueError(
                "an exponential schedule's values must have one sign and not be 0, got "
                f"{values[0]} and {values[1]}"
            )

    def _check_steps(self, steps: list[int]) -> None:
        if any(not isinstance(x, int) or isinstance(x, bool) or x < 0 for x in steps):
            raise ValueError(f"a schedule's steps must be int and at least 0, got {steps}")
        if any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"a schedule's steps must ascend, got {steps}")
        count = {"constant": 1, "piecewise": max(1, len(steps))}.get(self.shape, 2)
        if len(steps) != count:
            raise ValueError(f"a {self.shape} schedule needs {count} points, got {len(steps)}")
        if self.shape != "piecewise" and steps[0] != 0:
            raise ValueError(f"a {self.shape} schedule starts at step 0, got {steps[0]}")

    @classmethod
    def constant(cls, value: float) -> "Schedule":
        """Make a schedule with the same value at every step."""
        return cls("constant", ((0, value),))

    @classmethod
    def between(cls, shape: str, start: float, end: float, steps: int) -> "Schedule":
        """Make a schedule from `start` at step 0 to `end` at step `steps`, >= 1, and on.

        Args:
            shape: "linear", "cosine" or "exponential".
            start: the value of the first step.
            end: the value from step `steps` on.
            steps: optimizer steps between the two.
        """
        if shape not in TWO_POINTS:
            raise ValueError(
                f"the shape between two values must be one of {TWO_POINTS}, got {shape!r}"
            )
        if isinstance(steps, int) and steps < 1:
            raise ValueError(f"a schedule from {start} to {end} needs at least 1 step, got {steps}")
        return cls(shape, ((0, start), (steps, end)))

    @classmethod
    def linear(cls, start: float, end: float, steps: int) -> "Schedule":
        """Change by the same amount at every step, from `start` to `end` in `steps` steps, >= 1."""
        return cls.between("linear", start, end, steps)

    @classmethod
    def cosine(cls, start: float, end: float, steps: int) -> "Schedule":
        """Follow half a cosine wave from `start` to `end` in `steps` steps, >= 1."""
        return cls.between("cosine", start, end, steps)

    @classmethod
    def exponential(cls, start: float, end: float, steps: int) -> "Schedule":
        """Change by the same factor at every step, from `start` to `end` in `steps` steps, >= 1.

        Both ends have one sign, and neither is 0.
        """
        return cls.between("exponential", start, end, steps)

    @classmethod
    def piecewise(cls, points: Mapping[int, float] | Iterable[tuple[int, float]]) -> "Schedule":
        """Draw straight lines between values at given steps: {0: 4.0, 500: 2.0, 1000: 1.0}.

        Args:
            points: from step to value, or pairs (step, value); steps ascend.
        """
        pairs: Any = points.items() if isinstance(points, Mapping) else points
        return cls("piecewise", tuple((step, value) for step, value in pairs))

    @classmethod
    def parse(cls, value: Union[float, str, "Schedule", None]) -> "Schedule":
        """Make a schedule from a number or its text (constant), a text, or a schedule.

        Raises:
            ValueError: it has another form.
        """
        if isinstance(value, Schedule):
            return value
        try:
            shape, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
            if not colon:
                return cls.constant(_number(value))
            return cls._from_text(shape.strip(), rest)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a schedule must be {FORMS}, got {value!r}: {error}") from error

    @classmethod
    def _from_text(cls, shape: str, text: str) -> "Schedule":
        if shape == "constant":
            return cls.constant(float(text))
        if shape == "piecewise":
            found = [_matched(_POINT, part) for part in text.split(",")]
            return cls(shape, tuple((int(step), float(value)) for value, step in found))
        start, end, steps = _matched(_RANGE, text)
        return cls.between(shape, float(start), float(end), int(steps))

    def __str__(self) -> str:
        """Return the text that `parse` makes into an equal schedule."""
        values = [repr(value) for _, value in self.points]
        if self.shape == "constant":
            return f"constant:{values[0]}"
        if self.shape == "piecewise":
            return f"piecewise:{','.join(f'{value!r}@{step}' for step, value in self.points)}"
        return f"{self.shape}:{values[0]}->{values[1]}@{self.points[1][0]}"

    def at(self, step: int) -> float:
        """Return the value of the optimizer step that comes after `step` of them, step >= 0."""
        if step < 0:
            raise ValueError(f"a schedule's step must not be negative, got {step}")
        if step <= self.points[0][0]:
            return self.points[0][1]
        for (first, start), (last, end) in pairwise(self.points):
            if step < last:
                value = _BETWEEN[self.shape](start, end, (step - first) / (last - first))
                return min(max(value, min(start, end)), max(start, end))  # rounding
        return self.points[-1][1]

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest value, both of which are taken."""
        values = [value for _, value in self.points]
        return min(values), max(values)

    @property
    def moves(self) -> bool:
        """Return whether there are two steps with different values."""
        return self.bounds[0] != self.bounds[1]


Value = float | str | Schedule | None
"""What a config's field takes: a number, a schedule or its text.

None is refused. It stands here because HfArgumentParser hands texts on only where a union has text
as its second member and None; of `float | str` it would accept numbers alone.
"""


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("a truth value is not a number")
    return float(value)


def _matched(form: re.Pattern[str], text: str) -> tuple[str, ...]:
    found = form.fullmatch(text)
    if found is None:
        raise ValueError(f"{text.strip()!r} is not read")
    return found.groups()


def progressive(
    steps: int,
    temperature: tuple[float, float] = (4.0, 1.0),
    alpha: tuple[float, float] = (1.0, 0.5),
    shape: str = "linear",
) -> dict[str, Any]:
    """Return config arguments of progressive distillation: temperature and alpha annealed together.

    It begins with the teacher's softened distribution alone, and ends with its sharp one beside the
    labels: `DistillConfig(output_dir="out", max_steps=1000, **progressive(1000))`.

    Args:
        steps: optimizer steps from the first values to the last, >= 1; later steps keep the last.
        temperature: at the first step and from step `steps` on, > 0.
        alpha: the same, in [0, 1].
        shape: of both schedules: "linear", "cosine", or "exponential" (alpha must not reach 0).

    Raises:
        ValueError: a value does not fit the shape; the ranges are checked by the config.
    """
    pairs = {"temperature": temperature, "alpha": alpha}
    return {name: Schedule.between(shape, *pair, steps) for name, pair in pairs.items()}
