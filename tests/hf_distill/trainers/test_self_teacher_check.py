"""At the first step of any trainer a self-teacher is compared with the student, once."""

import contextlib
import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from hf_distill import DistillConfig, DistillTrainer, RoutedTeacher, SelfTeacher
from hf_distill.models.signals import Signal
from hf_distill.monitoring.self_teacher_check import SelfTeacherCheck, SelfTeacherError
from hf_distill.teachers import initial_adapters
from tests.hf_distill.trainers import models
from tests.tiny_models import class_rows, llama_classifier

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def untrained() -> nn.Module:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(models.llama(), config)


def trainer(folder: Path, student: Any, teacher: Any, **changes: Any) -> DistillTrainer:
    config = DistillConfig(**models.options(folder, **changes))
    routed = isinstance(teacher, RoutedTeacher)
    rows = [row | ({"who": "a"} if routed else {}) for row in models.rows()]
    if routed:
        config.remove_unused_columns = False
    return DistillTrainer(student, config, models.Pad(), rows, teacher=teacher)


@pytest.mark.parametrize("routed", [False, True])
def test_adapters_that_are_not_off_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routed: bool
) -> None:
    teacher: Any = SelfTeacher("base")
    if routed:
        teacher = RoutedTeacher({"a": teacher, "b": models.llama(1)}, "who")
    run = trainer(tmp_path, untrained(), teacher)
    monkeypatch.setattr(initial_adapters, "adapters_off", lambda _: contextlib.nullcontext())
    with pytest.raises(SelfTeacherError, match="must not change with the student's adapter"):
        run.train()


def test_also_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    student = get_peft_model(llama_classifier(), LoraConfig(task_type=TaskType.SEQ_CLS, **options))
    config = DistillConfig(**models.options(tmp_path))
    rows = class_rows(8, 0)
    run = DistillTrainer(
        student,
        config,
        train_dataset=rows,
        teacher=SelfTeacher("base"),
        processing_class=models.tokenizer(),
    )
    monkeypatch.setattr(initial_adapters, "adapters_off", lambda _: contextlib.nullcontext())
    with pytest.raises(SelfTeacherError, match="must not change with the student's adapter"):
        run.train()


class Elsewhere(SelfTeacher):
    """A teacher that is not the student."""

    def signal(self, student: nn.Module, side: Any) -> Signal:
        return Signal(logits=super().signal(student, side).dense() * 2)


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_teacher_that_is_not_the_student_is_an_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SelfTeacherError, match="teacher: on the same rows it must say what"):
        trainer(tmp_path, models.llama(), Elsewhere(kind)).train()


def test_an_entry_that_the_student_masks_is_no_fault(tmp_path: Path) -> None:
    student, masked = models.llama(), torch.tensor([models.PAD])  # which is no label
    student.lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, masked, -torch.inf))
    trainer(tmp_path, student, SelfTeacher("base"), alpha=1.0).train()


def test_a_trained_adapter_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        trainer(tmp_path, models.lora(models.llama()), SelfTeacher("base")).train()
    said = [x for x in caplog.messages if x.startswith("adapter:")]
    assert len(said) == 1
    assert "on the same rows the student and its teacher" in said[0]


@pytest.mark.parametrize("kind", ["base", "ema", "lora_scale"])
def test_the_check_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Not the weights, nor what is drawn for dropout."""

    def run() -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        student = models.lora(models.llama(attention_dropout=0.3), lora_dropout=0.3)
        made = trainer(tmp_path, student, SelfTeacher(kind))
        made.train()
        return models.weights(student), models.steps(made)

    with caplog.at_level(logging.INFO, logger="hf_distill"):
        weights, logs = run()
    said = [x for x in caplog.messages if x.endswith("nats from the student")]
    assert len(said) == 1
    monkeypatch.setattr(SelfTeacherCheck, "look", lambda *_: None)
    without, others = run()
    assert models.difference(weights, without) == 0
    assert logs == others


def test_a_resumed_run_is_not_at_its_start(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    trainer(tmp_path, models.llama(), SelfTeacher("base"), **saving).train()
    again = trainer(tmp_path, models.llama(), SelfTeacher("base"), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3


def test_evaluation_before_training_is_not_its_start(tmp_path: Path) -> None:
    made = trainer(tmp_path, models.llama(), Elsewhere("base"))
    made.evaluate(cast(Any, models.rows()))
    with pytest.raises(SelfTeacherError):
        made.train()
