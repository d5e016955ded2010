"""An alpha on a schedule where the hard loss is not the cross-entropy of tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_distill import DistillConfig, DistillTrainer
from tests.hf_distill.trainers import classifying, models
from tests.hf_distill.trainers.test_hard_loss import WithPenalty, of_class


def classifier(folder: Path, alpha: Any) -> DistillTrainer:
    return classifying.trainer(folder, alpha=alpha, learning_rate=0.0)


def own_loss(folder: Path, alpha: Any) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, alpha=alpha, learning_rate=0.0))
    student = of_class(WithPenalty)()
    return DistillTrainer(student, args, models.Pad(), models.rows(), teacher=models.llama(1))


def logs(trainer: DistillTrainer) -> list[dict[str, float]]:
    trainer.train()
    return models.steps(trainer)


@pytest.mark.parametrize("make", [classifier, own_loss])
@pytest.mark.parametrize("text", ["linear:1->0@2", "linear:0->1@2"])
def test_every_step_has_its_share_of_a_hard_loss_that_is_measured(
    tmp_path: Path, make: Callable[[Path, Any], DistillTrainer], text: str
) -> None:
    found = logs(make(tmp_path, text))
    plain = {alpha: logs(make(tmp_path, alpha)) for alpha in (0.0, 0.5, 1.0)}
    for step, log in enumerate(found):
        # alpha 1 throughout reads hidden states, a schedule logits: these are 1.5e-5 apart at most
        # (tests.teachers.asking.ROUNDING), and a divergence's gradient adds up to at most 2
        assert log["loss"] == pytest.approx(plain[log["alpha"]][step]["loss"], abs=3e-5)
        assert log["hard"] == plain[0.5][step]["hard"]
    assert sorted(log["alpha"] for log in found) == [0.0, 0.5, 1.0]
