"""Values that follow training."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_distill import Schedule, TemperatureSchedule, progressive

SHAPES = {
    "linear": Schedule.linear,
    "cosine": Schedule.cosine,
    "exponential": Schedule.exponential,
}
ROUNDING = 1e-15  # of a sum and two products of numbers below 10


@pytest.mark.parametrize("value", [0.3, "0.3", " 0.3 ", "constant:0.3", Schedule.constant(0.3)])
def test_a_number_is_constant(value: float | str | Schedule) -> None:
    schedule = Schedule.parse(value)
    assert schedule == Schedule.constant(0.3)
    assert [schedule.at(step) for step in (0, 1, 10**6)] == [0.3] * 3
    assert schedule.bounds == (0.3, 0.3)
    assert not schedule.moves


def test_the_class_has_the_name_of_temperature_schedules_too() -> None:
    made = TemperatureSchedule.linear(start=4.0, end=1.0, steps=1000)
    assert made == Schedule.parse("linear:4.0->1.0@1000")
    assert TemperatureSchedule is Schedule


@pytest.mark.parametrize(
    "text", ["linear:0.9->0.1@4", " linear: 0.9 -> 0.1 @ 4 ", "linear:9e-1->1e-1@4"]
)
def test_linear_from_start_to_end(text: str) -> None:
    schedule = Schedule.parse(text)
    assert schedule == Schedule.linear(0.9, 0.1, 4)
    assert schedule.at(0) == 0.9
    assert [schedule.at(step) for step in (4, 5, 10**6)] == [0.1] * 3
    values = [schedule.at(step) for step in (1, 2, 3)]
    assert values == pytest.approx([0.7, 0.5, 0.3], abs=ROUNDING)
    assert schedule.bounds == (0.1, 0.9)
    assert schedule.moves


def test_cosine_is_level_at_both_ends() -> None:
    schedule = Schedule.parse("cosine:3->1@6")
    want = [2 + math.cos(math.pi * step / 6) for step in range(7)]
    assert [schedule.at(step) for step in range(7)] == pytest.approx(want, abs=ROUNDING)


@pytest.mark.parametrize("sign", [1, -1])
def test_exponential_has_one_factor(sign: int) -> None:
    schedule = Schedule.exponential(sign * 8.0, sign * 1.0, 3)
    values = [schedule.at(step) for step in range(4)]
    assert values == pytest.approx([sign * x for x in (8, 4, 2, 1)], rel=ROUNDING)


def test_piecewise_is_linear_between_its_points() -> None:
    schedule = Schedule.parse("piecewise:4.0@2,2.0@6,3.0@8")
    assert schedule == Schedule.piecewise({2: 4.0, 6: 2.0, 8: 3.0})
    assert schedule == Schedule.piecewise([(2, 4.0), (6, 2.0), (8, 3.0)])
    values = [schedule.at(step) for step in range(11)]
    assert values == [4.0, 4.0, 4.0, 3.5, 3.0, 2.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    assert schedule.bounds == (2.0, 4.0)


finite = st.floats(-1e300, 1e300)
positive = st.floats(1e-300, 1e300)


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    ends=st.tuples(positive, positive),
    steps=st.integers(1, 10**6),
    at=st.lists(st.integers(0, 10**6 + 2), min_size=2, max_size=8),
)
def test_the_ends_are_exact_and_between_them_nothing_turns(
    shape: str, ends: tuple[float, float], steps: int, at: list[int]
) -> None:
    schedule = SHAPES[shape](*ends, steps)
    assert schedule.at(0) == ends[0]
    assert schedule.at(steps) == schedule.at(steps + 1) == ends[1]
    near = [x for s in at for x in (s, s + 1)]  # neighbours: where rounding would show
    values = [schedule.at(step) for step in sorted(near)]
    assert values == sorted(values, reverse=ends[0] > ends[1])
    assert all(min(ends) <= value <= max(ends) for value in values)


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    start=finite.filter(bool),
    end=finite.filter(bool),
    steps=st.integers(1, 10**9),
)
def test_the_text_reads_back(shape: str, start: float, end: float, steps: int) -> None:
    end = math.copysign(end, start)
    schedule = SHAPES[shape](start, end, steps)
    assert Schedule.parse(str(schedule)) == schedule


@given(values=st.dictionaries(st.integers(0, 10**9), finite, min_size=1, max_size=5))
def test_the_text_of_points_reads_back(values: dict[int, float]) -> None:
    schedule = Schedule.piecewise(dict(sorted(values.items())))
    assert Schedule.parse(str(schedule)) == schedule
    assert {step: schedule.at(step) for step in values} == values


def test_texts_are_as_they_are_written_by_hand() -> None:
    for text in (
        "linear:4.0->1.0@1000",
        "cosine:4.0->1.0@1000",
        "exponential:4.0->1.0@1000",
        "piecewise:4.0@0,2.0@500,1.0@1000",
        "constant:2.0",
    ):
        assert str(Schedule.parse(text)) == text


def test_a_schedule_is_a_value() -> None:
    schedule = Schedule.linear(4, 1, 10)
    assert hash(schedule) == hash(Schedule.linear(4.0, 1.0, 10))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.shape = "cosine"


@pytest.mark.parametrize(
    "value",
    [
        "half",
        "linear:0->1",
        "linear:0->1@",
        "linear:0->1@-3",
        "linear:0->1@1.5",
        "linear:a->1@3",
        "0.1@3",
        "piecewise:",
        "piecewise:1.0@0,",
        "square:0->1@3",
        "constant:",
        "",
        None,
        True,
    ],
)
def test_other_forms_are_named(value: str | None) -> None:
    message = 'a schedule must be a number, "0.5", "linear:4.0->1.0@1000", .* or "constant:2.0", '
    with pytest.raises(ValueError, match=message) as error:
        Schedule.parse(value)
    assert f"got {value!r}: " in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.linear(math.nan, 1.0, 3), r"must be finite, got \[nan, 1.0\]"),
        (lambda: Schedule.linear(0.0, math.inf, 3), r"must be finite, got \[0.0, inf\]"),
        (lambda: Schedule.linear(1e308, -1e308, 3), "must be finite"),
        (lambda: Schedule.linear(0.0, 1.0, 0), "from 0.0 to 1.0 needs at least 1 step, got 0"),
        (lambda: Schedule.cosine(0.0, 1.0, -1), "from 0.0 to 1.0 needs at least 1 step, got -1"),
        (lambda: Schedule.linear(0.0, 1.0, 2.5), r"steps must be int and at least 0, got \[0, 2"),
        (lambda: Schedule.exponential(1.0, 0.0, 3), "one sign and not be 0, got 1.0 and 0.0"),
        (lambda: Schedule.exponential(-1.0, 2.0, 3), "one sign and not be 0, got -1.0 and 2.0"),
        (lambda: Schedule.exponential(1e-200, 2e-200, 3).at(-1), "must not be negative, got -1"),
        (lambda: Schedule.piecewise({}), "a piecewise schedule needs 1 points, got 0"),
        (lambda: Schedule.piecewise({4: 1.0, 2: 0.0}), r"steps must ascend, got \[4, 2\]"),
        (lambda: Schedule.piecewise([(4, 1.0), (4, 0.0)]), r"steps must ascend, got \[4, 4\]"),
        (lambda: Schedule.piecewise([(4.0, 0)]), r"must be int and at least 0, got \[4.0\]"),
        (lambda: Schedule.piecewise({-1: 1.0}), r"must be int and at least 0, got \[-1\]"),
        (
            lambda: Schedule.between("wave", 0, 1, 3),
            "shape between two values must be one of .*, got 'wave'",
        ),
        (lambda: Schedule("linear", ((1, 0.0), (2, 1.0))), "linear schedule starts at step 0, got"),
        (lambda: Schedule("linear", ((0, 0.0),)), "a linear schedule needs 2 points, got 1"),
        (lambda: Schedule.parse("linear:0->1@3").at(-1), "must not be negative, got -1"),
        (lambda: progressive(0), "needs at least 1 step, got 0"),
        (lambda: progressive(9, alpha=(1.0, 0.0), shape="exponential"), "not be 0, got 1.0 and 0"),
        (lambda: Schedule.exponential(-1.0, -0.0, 3), "one sign and not be 0, got -1.0 and -0.0"),
        (lambda: Schedule("wave", ((0, 1.0),)), "a schedule's shape must be one of .*, got 'wave'"),
        (lambda: progressive(9, shape="piecewise"), "must be one of .*, got 'piecewise'"),
    ],
)
def test_values_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_progressive_moves_temperature_and_alpha_in_step(shape: str) -> None:
    made = progressive(40, temperature=(6.0, 2.0), alpha=(0.9, 0.1), shape=shape)
    assert made.keys() == {"temperature", "alpha"}
    ways = []
    for step in range(42):
        temperature, alpha = (made[name].at(step) for name in ("temperature", "alpha"))
        ways.append(((6.0 - temperature) / 4.0, (0.9 - alpha) / 0.8))
    assert ways[0] == (0.0, 0.0)
    assert ways[40] == ways[41] == (1.0, 1.0)
    assert 0.05 < ways[10][0] < 0.3
    for one, other in ways:
        assert one == pytest.approx(other, abs=10 * ROUNDING)


def test_progressive_by_default() -> None:
    made = progressive(1000)
    texts = {name: str(schedule) for name, schedule in made.items()}
    assert texts == {"temperature": "linear:4.0->1.0@1000", "alpha": "linear:1.0->0.5@1000"}
