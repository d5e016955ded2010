"""Batches without labels: a loss of 0 in training, nothing in an evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_distill.monitoring.metrics import UNSCORED
from hf_distill.trainers.evaluation import Evaluation
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.evaluating import (
    NO_TEACHER,
    RUNS,
    SUM_ERROR,
    classify,
    distill,
    func,
    held_out,
)

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


@pytest.mark.parametrize(
    ("run", "size"),
    [("kd", 1), ("kd", 2), ("kd-logits", 2), ("kd-weights", 1), ("no-teacher", 1)],
)
def test_rows_without_labels_count_for_nothing(tmp_path: Path, run: str, size: int) -> None:
    make, settings, _ = RUNS[run]
    rows, gone = held_out([]), held_out([1, 2, 3, 8])
    kept = [row for row, other in zip(rows, gone, strict=True) if row == other]
    settings = settings | {"per_device_eval_batch_size": size}
    found = make(tmp_path, held_out=gone, **settings).evaluate()
    want = make(tmp_path, held_out=kept, **settings).evaluate()
    names = {"eval_loss", "eval_soft", "eval_hard", "eval_tokens"} & want.keys()
    assert {name: found[name] for name in names} == pytest.approx(
        {name: want[name] for name in names}, rel=SUM_ERROR
    )
    if settings.get("has_teacher", True):
        assert found[f"eval_{UNSCORED}"] == (4 if size == 1 else 2)
        assert f"eval_{UNSCORED}" not in want


def test_an_evaluation_without_any_label_has_no_loss(tmp_path: Path) -> None:
    metrics = distill(tmp_path, held_out=held_out(list(range(9)))).evaluate()
    assert math.isnan(metrics["eval_loss"])
    assert not {"eval_soft", "eval_hard", "eval_perplexity"} & metrics.keys()


def mean_of_labels(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss as many write it: it is NaN where a batch has no label."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def test_a_users_loss_may_be_nan_where_nothing_is_labelled(tmp_path: Path) -> None:
    settings = NO_TEACHER | {"compute_loss_func": mean_of_labels}
    metrics = distill(tmp_path, per_device_eval_batch_size=1, **settings).evaluate()
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("counts", [(3, 0), (0, 3), (0, 0)])
def test_a_batch_is_scored_if_one_of_its_parts_is(counts: tuple[int, int]) -> None:
    evaluation = Evaluation()
    with evaluation.batch(None):
        evaluation.parts = lambda loss: [(loss, count) for count in counts]
        assert bool(evaluation.add(torch.tensor(2.0)).isnan()) == (counts == (0, 0))


LOSSES: dict[str, dict[str, Any]] = {
    "kl": {},
    "soft-alone": {"alpha": 1.0},
    "hard-alone": {"alpha": 0.0},
    "topk": {"support": "union", "top_k": 3},
    "k3": {"divergence": "k3"},
    "policy_gradient": {"divergence": "policy_gradient"},
    "uld": {"divergence": "uld"},
    "taid": {"taid": {}},
    "hidden": {"hidden_layers": "last"},
    "smoothing": {"label_smoothing_factor": 0.1},
    "users": {"compute_loss_func": func},
    "gpt2": {"family": "gpt2"},
    "no-teacher": NO_TEACHER,
    "no-teacher-gpt2": NO_TEACHER | {"family": "gpt2"},
    "no-teacher-users": NO_TEACHER | {"compute_loss_func": func},
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_without_labels_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: str, accumulated: int
) -> None:
    """As in the Trainer the run goes on; gradients are 0, not NaN."""
    settings = LOSSES[loss] | {"gradient_accumulation_steps": accumulated, "optim": "sgd"}
    trainer = distill(tmp_path, per_device_train_batch_size=2, **settings)
    rows: Any = trainer.train_dataset
    unlabelled = range(2 * accumulated, 4 * accumulated)  # the rows of the second step
    for i in unlabelled:
        rows[i] = rows[i] | {"labels": [-100] * len(rows[i]["labels"])}
    weights: list[Any] = []

    class Keep(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            weights.append(models.weights(model))

    trainer.add_callback(Keep())
    trainer.train()
    logs = models.steps(trainer)
    assert logs[1]["loss"] == 0.0
    assert logs[1]["grad_norm"] == 0.0
    assert models.difference(weights[0], weights[1]) == 0.0
    assert models.difference(weights[1], weights[2]) > 0.0
    assert all(math.isfinite(log["loss"]) for log in logs)
    if trainer.teacher is not None:
        assert [log.get(UNSCORED) for log in logs] == [None, accumulated, None]
        text = f"{accumulated} of {accumulated} batches had nothing to score: all their labels are"
        assert caplog.text.count(text) == 1


def test_one_micro_batch_without_labels_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        trainer = distill(tmp_path, max_steps=1, **changes)
        rows: Any = trainer.train_dataset
        for i in (2, 3):
            rows[i] = rows[i] | {"labels": [-100] * len(rows[i]["labels"])}
        trainer.train()
        return models.weights(trainer.model)

    apart = run(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert models.difference(apart, run()) <= 2e-6  # see test_equivalence.py


@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_classifiers_step_without_labels_at_alpha_0(tmp_path: Path, has_teacher: bool) -> None:
    settings = {"optim": "sgd", "logging_nan_inf_filter": False}  # which logs 0 for NaN
    trainer = classify(tmp_path, alpha=0.0, has_teacher=has_teacher, **settings)
    data: Any = trainer.train_dataset
    for i in range(4):
        data[i]["label"] = -100
    before = models.weights(trainer.model)
    trainer.args.max_steps = 1
    trainer.train()
    assert models.steps(trainer)[0]["loss"] == 0.0
    assert models.difference(before, models.weights(trainer.model)) == 0.0
