"""Sequence classifiers through DistillTrainer, beside formulas and plain Trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_distill import DistillTrainer, ModelTeacher, RoutedTeacher, SelfTeacher, routed
from tests.trainers import classifying, models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after steps of 1e-3; measured: at most 2.4e-7
BUG_FACTOR = 100
SUM_ERROR = 1e-5  # relative, of a float32 mean over rows; measured: 6e-7


def said(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """[C] logits in float64 of one row, without padding."""
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if type(model).__name__.startswith(("Bert", "Roberta")) else []
    with torch.no_grad():
        return model.double()(**{name: torch.tensor([row[name]]) for name in names}).logits[0]


def by_hand(
    student: nn.Module, teacher: nn.Module, data: list[dict[str, Any]], temperature: float
) -> dict[str, float]:
    """soft over all rows, hard over the labelled ones, agreement; in probability space."""
    soft, hard, same = [], [], []
    for row in data:
        z, w = said(student, row), said(teacher, row)
        q, p = (z / temperature).softmax(-1), (w / temperature).softmax(-1)
        soft.append(temperature**2 * float((p * (p / q).log()).sum()))
        same.append(float(z.argmax() == w.argmax()))
        if row.get("label", -100) != -100:
            hard.append(-float(z.softmax(-1)[row["label"]].log()))
    found = {"soft": np.mean(soft), "top1_agreement": np.mean(same), "rows": len(data)}
    return found | ({"hard": np.mean(hard)} if hard else {})


def close(logs: dict[str, Any], want: dict[str, float]) -> None:
    assert {name: logs[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)


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


class Weighted(type(classifying.bert())):
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
        batch = {k: torch.tensor([v]) for k, v in classifying.rows(1)[0].items() if k != "label"}
        side = trainer._classification._read(batch).side
        signal = trainer.teacher.signal(trainer.model, side)
        want = said(classifying.bert(), classifying.rows(1)[0]).float()
        torch.testing.assert_close(signal.logits[0], want, rtol=0, atol=1e-5)
    trainer.save_model(str(tmp_path / "end"))


def test_each_row_asks_its_own_teacher(tmp_path: Path) -> None:
    data = classifying.rows(8)
    for i, row in enumerate(data):
        row["domain"] = "ab"[i % 3 > 0]
    models_of = {"a": classifying.bert(1), "b": classifying.bert(2)}
    teacher = RoutedTeacher({k: ModelTeacher(v) for k, v in models_of.items()}, column="domain")
    collator = routed(classifying.collator(), teacher)
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "data_collator": collator}
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
