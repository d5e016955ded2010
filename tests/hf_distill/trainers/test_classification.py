"""Sequence classifiers through DistillTrainer, beside formulas and plain Trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_distill import DistillTrainer
from hf_distill.models.forward import Reader
from tests.hf_distill.trainers import classifying, models
from tests.hf_distill.trainers.classifying import SUM_ERROR, by_hand, close, said

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after steps of 1e-3; measured: at most 2.4e-7
BUG_FACTOR = 100


def mixed(alpha: float, want: dict[str, float]) -> Any:
    return pytest.approx(alpha * want["soft"] + (1 - alpha) * want["hard"], rel=SUM_ERROR)


@pytest.mark.parametrize("family", classifying.FAMILIES)
def test_loss_and_metrics_are_those_computed_by_hand(tmp_path: Path, family: str) -> None:
    make, data = classifying.FAMILIES[family], classifying.rows(unlabelled=1)
    settings = {"alpha": 0.3, "temperature": 3.0, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = classifying.trainer(tmp_path, make(), make(1), data, **settings)
    trainer.train()
    logs, want = trainer.state.log_history[0], by_hand(make(), make(1), data[:8], 3.0)
    close(logs, want)
    assert logs["loss"] == mixed(0.3, want)
    assert not {"tokens", "clipped", "teacher_drift"} & logs.keys()


def test_a_teacher_gets_inputs_that_the_student_does_not_take(tmp_path: Path) -> None:
    student, teacher, data = classifying.distilbert(), classifying.bert(1), classifying.rows(4)
    trainer = classifying.trainer(tmp_path, student, teacher, data, max_steps=1)
    trainer.train()
    want = by_hand(classifying.distilbert(), classifying.bert(1), data, 2.0)
    close(trainer.state.log_history[0], want)
    for row in data:
        row["token_type_ids"] = [0] * len(row["input_ids"])
    blind = by_hand(classifying.distilbert(), classifying.bert(1), data, 2.0)
    assert abs(blind["soft"] - want["soft"]) > 100 * SUM_ERROR * want["soft"]


def test_a_classifier_is_shown_what_its_forward_names() -> None:
    reader, batch = Reader("student", "few logits"), classifying.collator()(classifying.rows(2))
    labels, kept = batch.pop("labels"), {"input_ids", "attention_mask"}
    assert reader.forward_inputs(classifying.distilbert(), batch).keys() == kept
    assert reader.forward_inputs(classifying.bert(), batch).keys() == set(batch)
    given = {**batch, "other": labels}
    anything = classifying.bert()
    anything.__class__ = TakesAnything
    assert reader.forward_inputs(anything, given).keys() == given.keys()


class TakesAnything(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class MicroBatchMean(DistillTrainer):
    """The classical bug: every micro-batch divided by its own number of rows."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, None)
        return loss / self.args.gradient_accumulation_steps


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_accumulation_does_not_change_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float
) -> None:
    """8 rows in one batch, and as 5 and 3; in the first micro-batch more labels are missing."""
    data = classifying.rows(8)
    data[0]["label"] = data[1]["label"] = -100

    def run(rows: int, steps: int) -> dict[str, Tensor]:
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        return classifying.trained(tmp_path, data=data, alpha=alpha, **settings)

    one, two = run(8, 1), run(5, 2)
    monkeypatch.setattr(classifying, "DistillTrainer", MicroBatchMean)
    bug = run(5, 2)
    assert models.difference(one, two) <= TOLERANCE
    assert models.difference(one, bug) > BUG_FACTOR * TOLERANCE


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


HARD = {
    "own": ({}, {}),
    "smoothed": ({"label_smoothing_factor": 0.3}, {}),
    "function": ({}, {"compute_loss_func": doubled}),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("family", classifying.FAMILIES)
def test_alpha_zero_is_trainer(tmp_path: Path, family: str, hard: str) -> None:
    make, (settings, extra) = classifying.FAMILIES[family], HARD[hard]
    args = TrainingArguments(**models.options(tmp_path, **settings))
    plain = Trainer(make(), args, classifying.collator(), classifying.rows(), **extra)
    plain.train()

    def run(alpha: float) -> dict[str, Tensor]:
        return classifying.trained(tmp_path, make(), make(1), alpha=alpha, **settings, **extra)

    want = models.weights(plain.model)
    assert models.difference(want, run(0.0)) <= TOLERANCE
    assert models.difference(want, run(0.05)) > BUG_FACTOR * TOLERANCE


@pytest.mark.parametrize("hard", HARD)
def test_mixed_with_another_hard_loss(tmp_path: Path, hard: str) -> None:
    settings, extra = HARD[hard]
    settings = settings | {"max_steps": 1, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 5}
    data = classifying.rows(8, unlabelled=1)
    trainer = classifying.trainer(tmp_path, data=data, alpha=0.4, **settings, **extra)
    trainer.train()
    want = by_hand(classifying.bert(), classifying.bert(1), data, 2.0)
    rows = [row for row in data if row["label"] != -100]
    log_q = torch.stack([said(classifying.bert(), row) for row in rows]).log_softmax(-1)
    smooth = float(0.7 * want["hard"] - 0.3 * log_q.mean())
    want["hard"] = {"own": want["hard"], "smoothed": smooth, "function": 2 * want["hard"]}[hard]
    assert trainer.state.log_history[0]["loss"] == mixed(0.4, want)


class Weighted(BertForSequenceClassification):
    """Its own loss counts classes differently."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if labels is not None:
            counts = torch.tensor([5.0, 1.0, 0.2], dtype=outputs.logits.dtype)
            outputs.loss = (
                counts[labels] * F.cross_entropy(outputs.logits, labels, reduction="none")
            ).mean()
        return outputs


def test_the_models_own_loss_is_the_hard_one(tmp_path: Path) -> None:
    def make() -> nn.Module:
        student = classifying.bert()
        student.__class__ = Weighted
        return student

    data = classifying.rows(8)
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = classifying.trainer(tmp_path, make(), None, data, alpha=0.4, **settings)
    trainer.train()
    want = by_hand(classifying.bert(), classifying.bert(1), data, 2.0)
    counts = [(5.0, 1.0, 0.2)[row["label"]] for row in data]
    logits = torch.stack([said(classifying.bert(), row) for row in data])
    labels = torch.tensor([row["label"] for row in data])
    hard = (torch.tensor(counts) * F.cross_entropy(logits, labels, reduction="none")).mean()
    assert abs(float(hard) - want["hard"]) > 0.1
    assert trainer.state.log_history[0]["loss"] == mixed(0.4, want | {"hard": float(hard)})


def test_schedules(tmp_path: Path) -> None:
    """Each step has its own share and temperature; hard is logged at alpha 1 too."""
    data = classifying.rows(8)
    moving = {"alpha": "linear:0.2->1.0@1", "temperature": "linear:3.0->2.0@1"}
    settings = {"max_steps": 2, "learning_rate": 0.0} | moving
    trainer = classifying.trainer(tmp_path, data=data, **settings)
    trainer.train()
    first, second = models.steps(trainer)
    parts = ((data[:4], 3.0), (data[4:], 2.0))
    want = [by_hand(classifying.bert(), classifying.bert(1), *part) for part in parts]
    assert first["loss"] == mixed(0.2, want[0])
    assert second["loss"] == pytest.approx(want[1]["soft"], rel=SUM_ERROR)
    close(second, want[1])


def test_taid(tmp_path: Path) -> None:
    """The target of the first step is t_start of the way to the teacher."""
    settings = {"alpha": 1.0, "taid": {"t_start": 0.4}, "max_steps": 1}
    trainer = classifying.trainer(tmp_path, **settings)
    trainer.train()
    values = []
    for row in classifying.rows()[:4]:
        z, w = said(classifying.bert(), row) / 2, said(classifying.bert(1), row) / 2
        q, p = z.softmax(-1), (0.6 * z + 0.4 * w).softmax(-1)
        values.append(4 * float((p * (p / q).log()).sum()))
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(np.mean(values), rel=SUM_ERROR)
    assert "taid_teacher_kl" in logs


@pytest.mark.parametrize("lacking", ["column", "value"])
def test_alpha_one_needs_no_labels(tmp_path: Path, lacking: str) -> None:
    data, shown = classifying.rows(8, unlabelled=4), classifying.rows(8)
    if lacking == "column":
        data = [{k: v for k, v in row.items() if k != "label"} for row in data]
    settings = {"alpha": 1.0, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = classifying.trainer(tmp_path, data=data, **settings)
    trainer.train()
    want = by_hand(classifying.bert(), classifying.bert(1), data, 2.0)
    logs = trainer.state.log_history[0]
    close(logs, want)
    assert logs["loss"] == pytest.approx(want["soft"], rel=SUM_ERROR)
    assert "hard" not in logs
    # labels change nothing at alpha 1
    labelled = classifying.trained(tmp_path, data=shown, **settings)
    assert models.difference(models.weights(trainer.model), labelled) == 0.0
    metrics = trainer.evaluate(data)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_soft"], rel=SUM_ERROR)
    output = trainer.predict(data)
    assert output.predictions.shape == (8, classifying.CLASSES)


def test_a_step_without_labels_learns_from_the_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = classifying.rows(4, unlabelled=4) + classifying.rows(4)
    trainer = classifying.trainer(tmp_path, data=data, alpha=0.4, max_steps=2, learning_rate=0.0)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(0.4 * first["soft"], rel=SUM_ERROR)
    assert "hard" not in first
    close(second, by_hand(classifying.bert(), classifying.bert(1), data[4:], 2.0))
    assert caplog.text.count("a step has no labelled row: its hard loss is 0") == 1
