"""The settings of a config that may follow training."""

import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from hf_distill.schedules import Schedule, Value
from metal_ops.spec import ENDS

WITH_BETA = frozenset(kind for kind, _ in ENDS)


class Range(NamedTuple):
    """Says what every value of a setting must be: a test, and its words."""

    holds: Callable[[float], bool]
    words: str


_SHARE = Range(lambda x: 0.0 <= x <= 1.0, "in [0, 1]")
RANGES = {
    "temperature": Range(lambda x: 0.0 < x < math.inf, "positive and finite"),
    "alpha": _SHARE,
    "beta": _SHARE,
    "hidden_weight": Range(lambda x: x >= 0.0, "at least 0"),
    "contrast_weight": _SHARE,
}
"""The fields of the configs that take a `Value`, in the order of the log."""


def schedules_of(args: Any) -> list[str]:
    """Return the names of those fields that a config has."""
    return [name for name in RANGES if hasattr(args, name)]


LAST_STEP = sys.maxsize  # where every schedule has reached its last value


def checked_value(name: str, value: Value) -> Value:
    """Return the value as a config keeps it: as given, but a number's text as the number.

    Args:
        name: of a field in `RANGES`.
        value: a number, a schedule or its text.

    Raises:
        ValueError: it is neither, or a value that it takes is out of range.
    """
    try:
        schedule = Schedule.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for bound in schedule.bounds:
        if not RANGES[name].holds(bound):
            of = f" of {str(value)!r}" if schedule.moves else ""
            raise ValueError(f"{name} must be {RANGES[name].words}, got {bound}{of}")
    is_number = isinstance(value, str) and ":" not in value
    return schedule.at(0) if is_number else value


def check_schedules_are_read(args: Any) -> None:
    """Check that what moves is read.

    Raises:
        ValueError: beta moves and the divergence has none, or hidden_weight without layers.
    """
    found = moving_schedules(args)
    if "beta" in found and args.divergence not in WITH_BETA:
        raise ValueError(
            f"a schedule of beta needs a divergence that reads it, one of {sorted(WITH_BETA)}, "
            f"got {args.divergence!r} and {str(args.beta)!r}"
        )
    if "hidden_weight" in found and args.hidden_layers is None:
        raise ValueError(
            f"a schedule of hidden_weight needs hidden_layers, got {str(args.hidden_weight)!r} and "
            "None"
        )


def check_teacher_is_given(args: Any, has_teacher: bool) -> None:
    """Check that a run without a teacher asks for no soft loss at any step.

    Raises:
        ValueError: there is no teacher, and alpha is somewhere above 0 or a setting moves.
    """
    if has_teacher:
        return
    if bounds(args, "alpha")[1] > 0:
        raise ValueError(f"alpha {args.alpha} > 0 needs a teacher; pass teacher= or alpha=0")
    for name, schedule in moving_schedules(args).items():
        raise ValueError(
            f"a schedule of {name} needs a teacher; without one this is a Trainer, got {schedule}"
        )


def schedules(args: Any) -> dict[str, Schedule]:
    """Return the schedule of every field in `RANGES`, numbers included."""
    return {name: Schedule.parse(getattr(args, name)) for name in schedules_of(args)}


OF_BUILT_IN = ("temperature", "beta")  # what a loss of the user's own does not read


def moving_schedules(args: Any, own_loss: bool = False) -> dict[str, Schedule]:
    """Return the schedules of more than one value, of those that are read.

    Args:
        args: a `DistillConfig`.
        own_loss: whether the loss is the user's and not one that the config names.
    """
    read = {x: y for x, y in schedules(args).items() if not (own_loss and x in OF_BUILT_IN)}
    return {name: schedule for name, schedule in read.items() if schedule.moves}


def bounds(args: Any, name: str) -> tuple[float, float]:
    """Return the least and the largest value that a field takes."""
    return Schedule.parse(getattr(args, name)).bounds


def value_at(args: Any, name: str, step: int) -> float:
    """Return a field's value after so many optimizer steps."""
    return Schedule.parse(getattr(args, name)).at(step)


def values_at(args: Any, step: int) -> dict[str, float]:
    """Return the value of every field in `RANGES` after so many optimizer steps."""
    return {name: schedule.at(step) for name, schedule in schedules(args).items()}


def extreme_values(args: Any) -> Iterator[dict[str, float]]:
    """Yield values that stand for all that fields in `RANGES` take: their ends, and between."""
    ends = (
        (low, (low + high) / 2, high) if low < high else (low,)
        for low, high in (schedule.bounds for schedule in schedules(args).values())
    )
    names = schedules_of(args)
    return (dict(zip(names, values, strict=True)) for values in product(*ends))


def logged_values(args: Any, step: int, own_loss: bool = False) -> dict[str, float]:
    """Return what is logged after `step` optimizer steps: what moves, as the last step used it."""
    moving = moving_schedules(args, own_loss)
    return {name: schedule.at(max(0, step - 1)) for name, schedule in moving.items()}
