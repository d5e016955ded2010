"""The best model is that of the least loss, if the metric that decides is a loss."""

import logging
from pathlib import Path

import pytest

from hf_distill import DistillConfig, OPSDConfig
from hf_distill.monitoring.metrics import LOSSES
from tests.hf_distill.trainers import models


@pytest.mark.parametrize("kind", [DistillConfig, OPSDConfig])
@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_less_of_a_loss_is_better(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type[DistillConfig],
    prefix: str,
    name: str,
) -> None:
    with caplog.at_level(logging.INFO):
        args = kind(**models.options(tmp_path, metric_for_best_model=f"{prefix}{name}"))
    assert args.greater_is_better is False
    assert f"greater_is_better is False: metric_for_best_model '{prefix}{name}' is" in caplog.text


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("eval_hard", True, True),  # the user's choice stays
        ("soft", True, True),
        ("hard", False, False),
        ("eval_loss", None, False),
        ("accuracy", None, True),
        ("eval_top1_agreement", None, True),
        ("eval_hard_questions", None, True),
        (None, None, None),
    ],
)
def test_other_choices_are_the_trainers(
    tmp_path: Path, name: str | None, given: bool | None, taken: bool | None
) -> None:
    settings = {"metric_for_best_model": name, "greater_is_better": given}
    assert DistillConfig(**models.options(tmp_path, **settings)).greater_is_better is taken
