"""What a training or an evaluation has counted that did not end is in no later number."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_distill.monitoring.metrics import UNSCORED
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.evaluating import distill


class StopsTraining(TrainerCallback):
    """Ends a training behind its first step, before it logs."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


class StopsEvaluation(TrainerCallback):
    """Ends an evaluation behind its first batch."""

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_a_training_is_forgotten(tmp_path: Path) -> None:
    trainer, stops = distill(tmp_path, per_device_train_batch_size=2), StopsTraining()
    rows: Any = trainer.train_dataset
    for i in (0, 1):  # the rows of the first step
        rows[i] = rows[i] | {"labels": [-100] * len(rows[i]["labels"])}
    trainer.add_callback(stops)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stops)
    trainer.train()
    assert models.steps(trainer)[0][UNSCORED] == 1


def test_an_evaluation_is_forgotten(tmp_path: Path) -> None:
    trainer, stops = distill(tmp_path, per_device_eval_batch_size=1), StopsEvaluation()
    want = trainer.evaluate()
    trainer.add_callback(stops)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.remove_callback(stops)
    found = trainer.evaluate()
    of_time = ("runtime", "per_second")
    names = [name for name in want if not name.endswith(of_time)]
    assert {name: found[name] for name in names} == {name: want[name] for name in names}
