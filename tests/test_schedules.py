"""Values that follow training."""

import math

import pytest

from hf_distill import Schedule


@pytest.mark.parametrize("value", [0.3, "0.3", " 0.3 ", Schedule(0.3, 0.3)])
def test_a_number_is_constant(value: float | str | Schedule) -> None:
    schedule = Schedule.parse(value)
    assert [schedule.at(step) for step in (0, 1, 10**6)] == [0.3] * 3
    assert schedule.bounds == (0.3, 0.3)


@pytest.mark.parametrize(
    "text", ["linear:0.9->0.1@4", " linear: 0.9 -> 0.1 @ 4 ", "linear:9e-1->1e-1@4"]
)
def test_linear_from_start_to_end(text: str) -> None:
    schedule = Schedule.parse(text)
    assert schedule == Schedule(0.9, 0.1, 4)
    assert schedule.at(0) == 0.9
    assert [schedule.at(step) for step in (4, 5, 10**6)] == [0.1] * 3
    # the values between are one sum and one product of numbers below 1
    assert [schedule.at(step) for step in (1, 2, 3)] == pytest.approx([0.7, 0.5, 0.3], abs=1e-15)
    assert schedule.bounds == (0.1, 0.9)


@pytest.mark.parametrize(
    "value",
    ["half", "linear:0->1", "linear:0->1@", "linear:0->1@-3", "linear:a->1@3", "0.1@3", "", None],
)
def test_other_forms_are_named(value: str | None) -> None:
    message = 'a schedule must be like 0.5, "0.5" or "linear:0.0->1.0@100", got '
    with pytest.raises(ValueError, match=message) as error:
        Schedule.parse(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan, 1.0, 3), "values must be finite, got nan and 1.0"),
        ((0.0, math.inf, 3), "values must be finite, got 0.0 and inf"),
        ((0.0, 1.0, 0), "from 0.0 to 1.0 needs at least 1 step, got 0"),
        ((0.0, 1.0, -1), "from 0.0 to 1.0 needs at least 1 step, got -1"),
    ],
)
def test_values_out_of_range(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_steps_are_not_negative() -> None:
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        Schedule.parse("linear:0->1@3").at(-1)
