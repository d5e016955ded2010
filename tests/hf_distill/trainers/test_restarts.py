"""Every training of a trainer is what a new trainer's would be."""

import logging
import multiprocessing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from hf_distill import DistillConfig, DistillTrainer, SelfTeacher
from hf_distill.monitoring.watchdog import Watchdog
from hf_distill.teachers import Teacher, UpdateTeacher
from tests.hf_distill.teachers.asking import FAR, SIDE, scored_logits
from tests.hf_distill.trainers import evaluating, models
from tests.hf_distill.trainers.restarting import DISTILL, distil, fresh, opsd, run

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def projections_of(trainer: DistillTrainer) -> nn.Module:
    assert trainer._layers is not None
    assert trainer._layers.projections is not None
    return trainer._layers.projections


@pytest.mark.parametrize("kind", DISTILL)
def test_with_model_init_every_training_is_the_same(tmp_path: Path, kind: str) -> None:
    trainer = distil(tmp_path, kind, model_init=fresh)
    first, second = run(trainer), run(trainer)
    assert first == second
    assert first == run(distil(tmp_path, kind, model=models.llama()))
    assert first[0] != first[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "ema", "self_teacher": {"ema_decay": 0.5}},
        {"teacher": "base"},
        {
            "teacher": "lora_scale",
            "self_teacher": {"lora_scale": "linear:0->1@3"},
            "model_init": lambda: models.lora(models.llama()),
        },
        {"teacher": "base", "on_policy": True, "max_completion_length": 4},
        {
            "teacher": "base",
            "on_policy": True,
            "max_completion_length": 4,
            "rollout": {"steps_per_rollout": 2},
            "max_steps": 3,
        },
    ],
)
def test_self_distillation_begins_anew_with_model_init(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    trainer = opsd(tmp_path, **cast(Any, {"model_init": fresh} | changes))
    assert run(trainer) == run(trainer)


@pytest.mark.parametrize("kind", [x for x in DISTILL if x != "projections"])
def test_a_second_training_is_that_of_a_new_trainer(tmp_path: Path, kind: str) -> None:
    """It goes on from the weights of the first. (With SGD: the Trainer keeps its optimizer.)"""
    trainer = distil(tmp_path, kind, model=models.llama(), optim="sgd")
    first = run(trainer)
    model = models.copied(cast(nn.Module, trainer.model))
    second = run(trainer)
    assert second != first
    assert second == run(distil(tmp_path, kind, model=model, optim="sgd"))


def test_projections_go_on_as_the_students_weights_do(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "projections", model=models.llama())
    trainer.train()
    projections = projections_of(trainer)
    before = models.weights(projections)
    trainer.train()
    assert projections_of(trainer) is projections
    assert models.difference(models.weights(projections), before) > 0
    assert not any(
        "hidden_projection" in name for name, _ in cast(nn.Module, trainer.model).named_parameters()
    )


def test_a_new_model_has_new_projections(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "projections", model_init=fresh)
    for _ in range(2):
        trainer.train()
        trained = {id(p) for g in cast(Any, trainer.optimizer).param_groups for p in g["params"]}
        assert {id(p) for p in projections_of(trainer).parameters()} <= trained


def test_adapters_keep_the_base_that_they_were_added_to(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"}
    student = get_peft_model(models.llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    trainer = opsd(tmp_path, "base", model=student)
    for _ in range(2):
        trainer.train()
        assert trainer.teacher is not None
        said = trainer.teacher.signal(student, SIDE).dense()
        torch.testing.assert_close(said, scored_logits(models.llama()), rtol=0, atol=1e-4)
        assert (scored_logits(student) - said).abs().max() > FAR


class Mine(TrainerCallback):
    """A user's callback."""


def test_callbacks_are_replaced_in_their_places(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "taid", model_init=fresh)
    trainer.add_callback(Mine())
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    trainer.args.watchdog.action = "off"  # pyright: ignore
    after = list(trainer.callback_handler.callbacks)
    assert [type(x) for x in after] == [type(x) for x in before]
    assert isinstance(after[0], Watchdog)
    assert after[0] is not before[0]
    trainer.train()
    kinds = [type(x) for x in trainer.callback_handler.callbacks]
    assert Watchdog not in kinds
    assert kinds.count(UpdateTeacher) == kinds.count(Mine) == 1


def test_a_callback_that_the_user_has_removed_stays_away(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "ema", model_init=fresh)
    trainer.remove_callback(Watchdog)
    trainer.train()
    assert Watchdog not in [type(x) for x in trainer.callback_handler.callbacks]


def test_a_student_that_has_moved_since_is_set_up_again(tmp_path: Path) -> None:
    """With fp16_full_eval and bf16_full_eval the Trainer places it when training begins."""
    trainer = distil(tmp_path, "ema", model=models.llama())
    before = trainer._run
    trainer._device = torch.device("meta")
    trainer.train()
    assert trainer._run is not before


def test_a_resumed_training_has_the_frozen_copy_of_the_first(tmp_path: Path) -> None:
    """The checkpoint does not hold it, and the weights are no longer those of the start."""
    whole = distil(tmp_path, "base", model=models.llama(), save_strategy="steps", save_steps=1)
    whole.train()
    want = models.steps(whole)
    whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert models.steps(whole) == want


def test_also_where_it_begins_with_another_student(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = distil(tmp_path, "base", model=models.llama(), **saving)
    whole.train()
    made = iter([models.llama(1), models.llama()])  # at first, and for the training
    resumed = distil(tmp_path, "base", model_init=lambda: next(made), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert models.steps(resumed) == models.steps(whole)


class Counting(Teacher):
    """A user's teacher: it is prepared for each training, with its student."""

    def __init__(self) -> None:
        self.students: list[nn.Module] = []
        self.inner = SelfTeacher("live")

    def prepare(self, accelerator: Any, student: nn.Module, refusal: str | None) -> None:
        self.students.append(student)
        self.inner.prepare(accelerator, student, refusal)

    def signal(self, student: nn.Module, side: Any) -> Any:
        return self.inner.signal(student, side)


def test_a_teacher_is_prepared_for_the_student_of_each_training(tmp_path: Path) -> None:
    teacher, config = Counting(), DistillConfig(**models.options(tmp_path))
    trainer = DistillTrainer(models.llama(), config, models.Pad(), models.rows(), teacher=teacher)
    trainer.train()
    assert teacher.students == [trainer.model]
    trainer.train()
    assert teacher.students == [trainer.model] * 2


def test_a_smaller_batch_after_one_that_did_not_fit_begins_anew(tmp_path: Path) -> None:
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    trainer = distil(tmp_path, "ema", model=models.llama(), learning_rate=0.0, **settings)
    step, calls = trainer.training_step, []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer._run)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = full  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert calls[0] is calls[1] is not calls[2]
    (first, *_) = models.steps(trainer)
    assert first["soft"] == 0.0


def test_workers_end_with_each_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    before = {*multiprocessing.active_children()}
    trainer = evaluating.distill(tmp_path, **settings)
    for _ in range(2):
        trainer.train()
        assert {*multiprocessing.active_children()} == before


# the projections of hidden layers in an optimizer of the user's


def test_an_optimizer_of_the_users_gets_the_projections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = models.llama()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        trainer = distil(tmp_path, "projections", model=student, optimizers=(optimizer, None))
        before = models.weights(projections_of(trainer))
        trainer.train()
    assert models.difference(models.weights(projections_of(trainer)), before) > 0
    assert "1 projections of hidden layers were added to the optimizer" in caplog.text
    trainer.train()
    assert len(optimizer.param_groups) == 2


def test_the_class_of_an_optimizer_gets_the_projections(tmp_path: Path) -> None:
    given = (torch.optim.SGD, {"lr": 0.05})
    trainer = distil(tmp_path, "projections", model=models.llama(), optimizer_cls_and_kwargs=given)
    before = models.weights(projections_of(trainer))
    trainer.train()
    assert models.difference(models.weights(projections_of(trainer)), before) > 0


def test_a_scheduler_of_the_users_has_no_rate_for_projections(tmp_path: Path) -> None:
    student = models.llama()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    both = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = distil(tmp_path, "projections", model=student, optimizers=both)
    with pytest.raises(ValueError, match="have projections, which must be trained"):
        trainer.train()
    same_width = distil(tmp_path, "hidden layers", model=student, optimizers=both)
    same_width.train()  # has none


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_resumed_run_has_the_base_of_its_adapters(tmp_path: Path, start: str) -> None:
    """The adapter is made anew, and then gets the checkpoint's weights."""

    def student() -> Any:
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": start}
        return get_peft_model(models.llama(), LoraConfig(task_type="CAUSAL_LM", **options))

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = opsd(tmp_path / "whole", "base", model=student(), **saving)
    whole.train()
    again = opsd(tmp_path / "again", "base", model=student(), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 3
    one, other = (models.weights(cast(nn.Module, x.model)) for x in (whole, again))
    assert models.difference(one, other) == 0
