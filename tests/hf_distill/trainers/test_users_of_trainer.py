"""What users of the Trainer do: evaluations of all kinds, names of labels, a second attempt."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_distill import DistillTrainer, OPSDTrainer
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.evaluating import (
    NO_TEACHER,
    SUM_ERROR,
    distill,
    held_out,
    opsd,
)

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def test_datasets_by_name_and_prefixes(tmp_path: Path) -> None:
    trainer = distill(tmp_path)
    alone = trainer.evaluate()["eval_loss"]
    both = trainer.evaluate({"a": held_out(), "b": held_out([])[:3]})
    assert both["eval_a_loss"] == alone
    assert both["eval_a_perplexity"] == math.exp(both["eval_a_hard"])
    assert both["eval_b_loss"] == pytest.approx(
        0.5 * both["eval_b_soft"] + 0.5 * both["eval_b_hard"], rel=SUM_ERROR
    )
    assert trainer.evaluate(held_out(), metric_key_prefix="final")["final_loss"] == alone
    predicted = trainer.predict(held_out())
    assert predicted.metrics["test_loss"] == pytest.approx(alone, rel=SUM_ERROR)
    assert trainer.predict(held_out(), metric_key_prefix="x").metrics["x_tokens"] > 0


def test_an_evaluation_at_the_start_and_during_training(tmp_path: Path) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "learning_rate": 0.0}
    trainer = distill(tmp_path, **given)
    trainer.train()
    losses = {log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert losses == {trainer.evaluate()["eval_loss"]}
    tokens = [log["tokens"] for log in models.steps(trainer)]
    quiet = distill(tmp_path, learning_rate=0.0)
    quiet.train()
    assert tokens == [log["tokens"] for log in models.steps(quiet)]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"include_for_metrics": ["inputs", "loss"], "batch_eval_metrics": True},
    ],
)
def test_metrics_of_the_user(tmp_path: Path, given: dict[str, Any]) -> None:
    seen: list[Any] = []

    def compute(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        seen.append(prediction)
        return {"calls": float(len(seen))}

    def best(logits: Any, labels: Any) -> Any:
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    changes = {"compute_metrics": compute, "preprocess_logits_for_metrics": best}
    trainer = distill(tmp_path, per_device_eval_batch_size=4, **changes, **given)
    metrics = trainer.evaluate()
    plain = distill(tmp_path).evaluate()["eval_loss"]
    assert metrics["eval_loss"] == pytest.approx(plain, rel=SUM_ERROR)
    assert metrics["eval_calls"] == len(seen) == (3 if given.get("batch_eval_metrics") else 1)
    rows = 0
    for one in seen:
        listed = isinstance(one.predictions, list)
        pairs = [(one.predictions, one.label_ids)]
        pairs = zip(one.predictions, one.label_ids, strict=True) if listed else pairs
        for predictions, labels in pairs:
            assert predictions.shape == labels.shape
            rows += len(labels)
        if "include_for_metrics" in given:
            assert one.inputs is not None
            assert len(one.losses) == len(one.label_ids)
            assert np.isnan(np.asarray(torch.as_tensor(one.losses))).sum() == 0
    assert rows == 9


class Positional(DistillTrainer):
    """Passes arguments on by position, as the Trainer's signature has them."""

    def evaluation_loop(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        given = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        return super().evaluation_loop(*given)


class PositionalOPSD(Positional, OPSDTrainer):
    pass


def test_evaluation_loop_by_position(tmp_path: Path) -> None:
    trainer = distill(tmp_path)
    trainer.__class__ = Positional
    assert {"eval_loss", "eval_soft"} <= trainer.evaluate().keys()
    other = opsd(tmp_path)
    other.__class__ = PositionalOPSD
    assert "late_loss" in other.evaluate(metric_key_prefix="late")


# --- names of labels


class Renamed(models.Pad):
    """Labels of another name."""

    def __call__(self, batch: Any) -> dict[str, Any]:
        made = super().__call__(batch)
        return {("next_ids" if name == "labels" else name): x for name, x in made.items()}


class Extra(models.Pad):
    """Something to compare predictions with."""

    def __call__(self, batch: Any) -> dict[str, Any]:
        made = super().__call__(batch)
        return made | {"answers": made["input_ids"] + 1}


@pytest.mark.parametrize("with_metrics", [False, True])
def test_labels_of_another_name(tmp_path: Path, with_metrics: bool) -> None:
    seen: list[Any] = []
    extra = {"compute_metrics": lambda x: seen.append(x.label_ids) or {}} if with_metrics else {}
    plain = distill(tmp_path, gradient_accumulation_steps=2)
    named = distill(
        tmp_path,
        collator=Renamed(),
        label_names=["next_ids"],
        gradient_accumulation_steps=2,
        **extra,
    )
    for trainer in (plain, named):
        trainer.train()
    assert models.difference(*(models.weights(x.model) for x in (plain, named))) == 0.0
    assert named.evaluate()["eval_loss"] == pytest.approx(
        plain.evaluate()["eval_loss"], rel=SUM_ERROR
    )
    if with_metrics:
        assert (seen[0] != -100).any()


@pytest.mark.parametrize("names", [["answers"], ["labels", "answers"]])
def test_other_labels_reach_the_users_metrics(tmp_path: Path, names: list[str]) -> None:
    seen: list[Any] = []
    changes = {"compute_metrics": lambda x: seen.append(x.label_ids) or {}, "collator": Extra()}
    trainer = distill(tmp_path, label_names=names, **changes)
    metrics = trainer.evaluate()
    plain = distill(tmp_path).evaluate()["eval_loss"]
    assert metrics["eval_loss"] == pytest.approx(plain, rel=SUM_ERROR)
    answers = seen[0] if names == ["answers"] else seen[0][1]
    assert answers.max() <= models.VOCAB
    assert (answers[0, :4] - 1).tolist() == held_out()[0]["input_ids"][:4]
    trainer.train()


# --- a run begins anew


def test_what_a_failed_attempt_measured_is_in_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto_find_batch_size` starts again with fewer rows, after steps that were not logged."""
    given = {"logging_steps": 2, "max_steps": 2, "auto_find_batch_size": True}
    given |= {"per_device_train_batch_size": 4, "learning_rate": 0.0}
    trainer = distill(tmp_path, **given)
    original, calls = DistillTrainer.compute_loss, []

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(DistillTrainer, "compute_loss", fails)
    trainer.train()
    size = trainer.state.train_batch_size
    assert size < 4
    monkeypatch.setattr(DistillTrainer, "compute_loss", original)
    plain = distill(tmp_path, **given | {"per_device_train_batch_size": size})
    plain.train()
    (log,), (want,) = models.steps(trainer), models.steps(plain)
    for name in ("loss", "soft", "hard", "tokens"):
        assert log[name] == want[name], name


def test_an_evaluation_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = distill(tmp_path, per_device_eval_batch_size=2)
    want = trainer.evaluate()

    class Fails(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("stopped")

    callback = Fails()
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.evaluate()
    trainer.remove_callback(callback)
    found = trainer.evaluate()
    for name in ("eval_loss", "eval_soft", "eval_hard", "eval_tokens"):
        assert found[name] == want[name], name


class OneMore(DistillTrainer):
    """Adds to the loss."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (found[0] + 1, found[1]) if return_outputs else found + 1


@pytest.mark.parametrize("settings", [{}, NO_TEACHER, {"compute_metrics": lambda _: {}}])
def test_what_a_subclass_adds_is_in_the_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain, more = (distill(tmp_path, **settings) for _ in range(2))
    more.__class__ = OneMore
    want = plain.evaluate()["eval_loss"] + 1
    assert more.evaluate()["eval_loss"] == pytest.approx(want, rel=SUM_ERROR)
