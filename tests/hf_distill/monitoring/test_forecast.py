"""The numbers of a forecast from measured rows, and the sentence that they give."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_distill.data.token_classes import CLASSES, NUMBER, PUNCTUATION, SPECIAL, WORD
from hf_distill.monitoring.forecast import Estimate, Forecast, ForecastRow, make_forecast
from hf_distill.monitoring.forecast_plot import plot_rollouts

CLASS = [SPECIAL, PUNCTUATION, NUMBER, WORD, WORD, WORD]  # of ids 0 to 5
SECONDS = {"sample": 8.0, "student": 2.0, "teacher": 4.0}


def row(**changes: Any) -> ForecastRow:
    given: dict[str, Any] = {
        "has_hint": True,
        "scores": (0.0, 1.0),
        "reference": None,
        "lengths": (4, 4),
        "ids": [3, 1, 2, 4],
        "signal": [0.1, 0.2, 0.3, 0.4],
        "ratio": [1.0, 0.0, 0.0, 0.0],
        "wrong_ratio": [0.0, 1.0, 0.0, 0.0],
    }
    return ForecastRow(**given | changes)


def made(*rows: ForecastRow, **given: Any) -> Forecast:
    return make_forecast(rows, CLASS, **{"seconds": SECONDS, "step_rows": 3} | given)


def test_scores_and_gap_are_of_rows_with_hints() -> None:
    bare = row(has_hint=False, scores=(1.0, 1.0))
    found = made(row(), row(scores=(1.0, 1.0)), row(scores=(0.0, 0.0)), bare)
    assert (found.rows, found.hinted_rows) == (4, 3)
    assert (found.unaided, found.hinted) == pytest.approx((1 / 3, 2 / 3))
    assert found.gap is not None
    assert found.gap.mean == pytest.approx(1 / 3)
    assert found.gap.low == 0.0 < found.gap.mean < found.gap.high
    assert found.reference_gap is None


def test_the_interval_is_that_of_a_mean() -> None:
    """Against the normal approximation, for many values."""
    values = [float(i % 5) for i in range(200)]
    found = Estimate.of(values)
    assert found is not None
    half = 1.96 * (2.0 / 200) ** 0.5  # the variance of 0 to 4 is 2
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=0.2 * half)
    assert Estimate.of([]) is None
    assert Estimate.of([3.0]) == (3.0, 3.0, 3.0)


def test_shares_of_the_signal() -> None:
    """The word 3 is in all rollouts, the words 4 and 5 in a quarter of them."""
    found = made(row(), *[row(ids=[3, 1, 2, 5 if i else 3]) for i in range(3)])
    total = dict.fromkeys(CLASSES, 0.0) | {"punctuation": 0.2, "number": 0.3, "word": 0.5}
    assert found.by_class == pytest.approx(total)
    # punctuation and the word 3; 5 is in two of four rollouts and counts as style as well
    assert found.style_share == pytest.approx((4 * (0.2 + 0.1) + 3 * 0.4) / 4)
    few = made(row(), row())
    assert few.style_share == pytest.approx(0.2)
    assert made(row(signal=[0.0] * 4)).style_share is None


@pytest.mark.parametrize(
    ("ratio", "wrong", "share"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),  # equal hints
        ([1.0, 2.0], [-2.0, -4.0], 0.0),  # the same direction
        ([1.0, 0.0], [0.0, 1.0], 1.0),
        ([1.0, 1.0], [1.0, 0.0], 0.5),
        ([1.0, 1.0], [0.0, 0.0], 1.0),  # a wrong hint moves nothing
        ([0.0, 0.0], [1.0, 0.0], None),
        ([1.0, 1.0], None, None),
    ],
)
def test_content_share(ratio: list[float], wrong: Any, share: float | None) -> None:
    given = {"ids": [3, 4], "signal": [0.1, 0.1], "ratio": ratio, "wrong_ratio": wrong}
    found = made(row(**given)).content_share
    assert found == (None if share is None else pytest.approx(share, abs=1e-12))


def test_cost_of_a_step() -> None:
    found = made(row(), row())
    assert found.seconds == {"sample": 4.0, "student": 1.0, "teacher": 2.0}
    assert found.step_seconds == 3 * (4.0 + 2.0 + 3 * 1.0)
    assert made(row(), seconds={}).step_seconds is None


GAIN = Estimate(0.3, 0.1, 0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Expect a gain: with the hint score is +0.3 (+0.1 to +0.5); no setting"),
        ({"gap": Estimate(-0.3, -0.5, -0.1)}, "Expect harm: with the hint score is -0.3"),
        ({"gap": Estimate(0.1, -0.1, 0.3)}, "Expect little: with the hint score is +0.1"),
        ({"hinted_rows": 0}, "Expect nothing: no row's teacher is told anything"),
        ({"gap": None}, "Nothing says what to expect"),
        (
            {"gap": None, "reference_gap": GAIN},
            "with the hint the log-probability of the data's completions is +0.3",
        ),
        (
            {"lengths": (10.0, 6.0)},
            "Do not count on a gain: with the hint score is +0.3 (+0.1 to +0.5), but completions "
            "with it have 60% of the length",
        ),
        ({"content_share": 0.2}, "But 80% of its effect is that of any hint"),
        ({"style_share": 0.7}, "But 70% of the signal lies on style tokens; change token_weights"),
    ],
)
def test_the_sentence(changes: dict[str, Any], words: str) -> None:
    good = replace(made(row()), gap=GAIN, style_share=0.1, content_share=0.9, lengths=(10, 9))
    found = replace(good, **changes)
    assert words in found.sentence
    assert found.table()[-1] == found.sentence
    assert found.to_dict()["sentence"] == found.sentence


def test_metrics_leave_out_what_is_not_known() -> None:
    assert "forecast_gap" not in made(row(scores=None)).metrics()
    found = made(row()).metrics()
    assert found["forecast_gap"] == 1.0
    assert found["forecast_length"] == 4.0
    assert "forecast_reference_gap" not in found


def test_a_forecast_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row, got 0"):
        make_forecast([], CLASS, SECONDS, 1)


def test_the_picture(tmp_path: Path) -> None:
    texts, path = [["So", " 12", "\n", "$x$"], ["a" * 200]], tmp_path / "forecast.png"
    plot_rollouts(texts, [[0.1, 0.4, 0.0, 0.2], [0.3]], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 4096
    with pytest.raises(ValueError, match=r"got \[1\] tokens and \[2\] signals"):
        plot_rollouts([["a"]], [[0.1, 0.2]], path)
