"""Evaluation, checkpoints, adapters, several teachers: runs of classifiers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from hf_distill import DistillTrainer, ModelTeacher, RoutedTeacher, SelfTeacher
from tests.hf_distill.trainers import classifying, models
from tests.hf_distill.trainers.classifying import SUM_ERROR, by_hand, close, said

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


@pytest.mark.parametrize("with_metrics", [False, True])
def test_evaluation(tmp_path: Path, with_metrics: bool) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        best = prediction.predictions.argmax(-1)
        return {"accuracy": float((best == prediction.label_ids).mean())}

    extra = {"compute_metrics": accuracy} if with_metrics else {}
    trainer, data = classifying.trainer(tmp_path, **extra), classifying.rows(6, seed=1)
    metrics = trainer.evaluate()
    close(
        {name.removeprefix("eval_"): value for name, value in metrics.items()},
        by_hand(classifying.bert(), classifying.bert(1), data, 2.0),
    )
    # the Trainer's eval_loss weighs batches by rows: 4 and 2
    parts = [by_hand(classifying.bert(), classifying.bert(1), x, 2.0) for x in (data[:4], data[4:])]
    halves = [0.5 * part["soft"] + 0.5 * part["hard"] for part in parts]
    assert metrics["eval_loss"] == pytest.approx((4 * halves[0] + 2 * halves[1]) / 6, rel=SUM_ERROR)
    right = [int(said(classifying.bert(), row).argmax()) == row["label"] for row in data]
    assert metrics.get("eval_accuracy") == (np.mean(right) if with_metrics else None)


def test_predictions_are_logits_and_labels(tmp_path: Path) -> None:
    data = classifying.rows(6, seed=2)
    output = classifying.trainer(tmp_path).predict(data)
    want = torch.stack([said(classifying.bert(), row) for row in data])
    np.testing.assert_allclose(output.predictions, want.numpy(), rtol=0, atol=2e-5)
    assert output.label_ids.tolist() == [row["label"] for row in data]
    assert "test_soft" in output.metrics


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    dropout = {"hidden_dropout_prob": 0.2}

    def make() -> DistillTrainer:
        student = classifying.bert(0, **dropout)
        return classifying.trainer(tmp_path, student, SelfTeacher("ema", 0.5), **saving)

    whole = make()
    whole.train()
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert models.difference(models.weights(whole.model), models.weights(again.model)) == 0.0
    assert models.steps(again) == models.steps(whole)


def test_the_best_model_is_loaded_and_saved(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_soft"}
    # so fast that it gets worse
    settings = often | best | {"greater_is_better": False, "learning_rate": 0.3, "max_steps": 3}
    trainer = classifying.trainer(tmp_path, **settings)
    trainer.train()
    found = [logs["eval_soft"] for logs in trainer.state.log_history if "eval_soft" in logs]
    number = found.index(min(found)) + 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{number}")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{number}")
    assert models.difference(models.weights(saved), models.weights(trainer.model)) == 0.0
    assert number < 3


def adapted(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return get_peft_model(classifying.bert(), config)


@pytest.mark.parametrize("kind", ["model", "base"])
def test_lora(tmp_path: Path, kind: str) -> None:
    teacher = {"model": classifying.bert(1), "base": SelfTeacher("base")}[kind]
    before = models.weights(adapted())
    trainer = classifying.trainer(tmp_path, adapted(), teacher, max_steps=2, learning_rate=0.01)
    trainer.train()
    want = by_hand(
        classifying.bert(), classifying.bert(int(kind == "model")), classifying.rows(4), 2.0
    )
    logs = trainer.state.log_history
    close(logs[0] | {"soft": logs[0]["soft"] + 1}, want | {"soft": want["soft"] + 1})
    after = models.weights(trainer.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("lora_B" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    if kind == "base":
        # the adapters and the new head are not in the teacher, also when they are trained
        assert logs[1]["soft"] > 1e-3
        assert logs[1]["teacher_entropy"] != logs[1]["student_entropy"]
        row = classifying.rows(1)[0]
        batch = {k: torch.tensor([v]) for k, v in row.items() if k != "label"}
        batch["labels"] = torch.tensor([row["label"]])
        side = trainer.task.read(batch, None, 1).student
        signal = trainer.teacher.signal(trainer.model, side)
        want = said(classifying.bert(), row).float()
        torch.testing.assert_close(signal.logits[0], want, rtol=0, atol=1e-5)
    trainer.save_model(str(tmp_path / "end"))


def test_each_row_asks_its_own_teacher(tmp_path: Path) -> None:
    data = classifying.rows(8)
    for i, row in enumerate(data):
        row["domain"] = "ab"[i % 3 > 0]
    models_of = {"a": classifying.bert(1), "b": classifying.bert(2)}
    teacher = RoutedTeacher({k: ModelTeacher(v) for k, v in models_of.items()}, column="domain")
    settings = {"max_steps": 1, "per_device_train_batch_size": 8}
    trainer = classifying.trainer(tmp_path, teacher=teacher, data=data, **settings)
    trainer.train()
    parts = [
        by_hand(
            classifying.bert(), models_of[k].float(), [r for r in data if r["domain"] == k], 2.0
        )
        for k in "ab"
    ]
    want = sum(part["soft"] * part["rows"] for part in parts) / 8
    assert trainer.state.log_history[0]["soft"] == pytest.approx(want, rel=SUM_ERROR)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    def step(bf16: bool) -> tuple[dict[str, Tensor], float]:
        trainer = classifying.trainer(tmp_path, bf16=bf16, max_steps=1)
        trainer.train()
        logs = trainer.state.log_history[0]
        return models.weights(trainer.model), logs["loss"]

    (exact, loss), (rounded, loss_16) = step(False), step(True)
    assert loss_16 != loss
    assert loss_16 == pytest.approx(loss, rel=0.05)  # some twenty roundings of 2^-9
    assert {w.dtype for w in rounded.values()} == {torch.float32}
    assert models.difference(exact, rounded) < 3e-3  # one step of at most 1e-3


def test_limits_for_texts_are_off_unless_they_are_set(tmp_path: Path) -> None:
    def limits(**group: Any) -> Any:
        trainer = classifying.trainer(tmp_path, watchdog=group)
        return trainer.callback_handler.callbacks[0].limits

    plain = limits()
    assert plain.entropy_collapse is None
    assert plain.entropy_explosion is None
    assert plain.zero_gradient is not None
    assert limits(entropy_collapse=0.2).entropy_collapse == 0.2


def test_a_uniform_teacher_is_reported(tmp_path: Path) -> None:
    """The watchdog measures entropies against ln C, not against the vocabulary."""
    teacher = classifying.bert(1)
    nn.init.zeros_(teacher.classifier.weight)
    for each, fault in ((teacher, True), (classifying.bert(1), False)):
        trainer = classifying.trainer(tmp_path, teacher=each, max_steps=1)
        trainer.train()
        assert ("watchdog_teacher_uniform" in trainer.state.log_history[0]) == fault
