"""Every training of a trainer is what a new trainer's would be."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, integrations
from transformers import trainer as module
from transformers.trainer_utils import HPSearchBackend

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    SelfTeacher,
)
from hf_distill.monitoring.watchdog import Watchdog
from hf_distill.teachers import RoutedTeacher, Teacher, UpdateTeacher
from tests.hf_distill.teachers.asking import FAR, SIDE, scored_logits
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def fresh() -> Any:
    return models.llama()


def narrow(seed: int = 1) -> Any:
    """A teacher of another width, so that hidden layers need projections."""
    return models.llama(seed, hidden_size=16, intermediate_size=24)


# name: (settings, teacher); each keeps something of its own from step to step
DISTILL: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "a schedule": ({"alpha": "linear:1->0@3"}, lambda: models.llama(1)),
    "taid": ({"taid": {"t_start": 0.2, "step_size": 0.3}}, lambda: models.llama(1)),
    "hidden layers": ({"hidden_layers": "last"}, lambda: models.llama(1)),
    "projections": ({"hidden_layers": "last"}, narrow),
    "ema": ({}, lambda: SelfTeacher("ema", ema_decay=0.5)),
    "base": ({}, lambda: SelfTeacher("base")),
    "routed": (
        {"remove_unused_columns": False},
        lambda: RoutedTeacher(
            {"a": SelfTeacher("ema", ema_decay=0.5), "b": models.llama(1)}, "who"
        ),
    ),
}


def rows() -> list[dict[str, Any]]:
    return [row | {"who": "ab"[i % 2]} for i, row in enumerate(models.rows())]


class Collate:
    """Also of rows with a column of texts."""

    def __call__(self, batch: Any) -> Any:
        return models.Pad()([{k: v for k, v in row.items() if k != "who"} for row in batch])


def distil(folder: Path, kind: str, **changes: Any) -> DistillTrainer:
    settings, teacher = DISTILL[kind]
    own = {"model_init", "model", "optimizers", "optimizer_cls_and_kwargs"} & changes.keys()
    given = {name: changes.pop(name) for name in own}
    options = {"learning_rate": 0.05, "max_grad_norm": 0.0, **settings, **changes}
    config = DistillConfig(**models.options(folder, **options))
    return DistillTrainer(
        args=config, data_collator=Collate(), train_dataset=rows(), teacher=teacher(), **given
    )


def opsd(folder: Path, teacher: str, **changes: Any) -> OPSDTrainer:
    given = {name: changes.pop(name) for name in {"model_init", "model"} & changes.keys()}
    options = {"learning_rate": 0.05, "teacher": teacher, "on_policy": False, "max_grad_norm": 0.0}
    config = OPSDConfig(**models.options(folder, **(options | changes)))
    tokenizer = models.tokenizer()
    return OPSDTrainer(
        args=config,
        data_collator=HintCollator(tokenizer),
        train_dataset=models.problems(),
        processing_class=tokenizer,
        **given,
    )


def run(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [{k: v for k, v in log.items() if k != "teacher_drift"} for log in models.steps(trainer)]


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
    trainer = opsd(tmp_path, **({"model_init": fresh} | changes))
    assert run(trainer) == run(trainer)


@pytest.mark.parametrize("kind", [x for x in DISTILL if x != "projections"])
def test_a_second_training_is_that_of_a_new_trainer(tmp_path: Path, kind: str) -> None:
    """It goes on from the weights of the first. (With SGD: the Trainer keeps its optimizer.)"""
    trainer = distil(tmp_path, kind, model=models.llama(), optim="sgd")
    first = run(trainer)
    model = models.copied(trainer.model)  # pyright: ignore[reportArgumentType]
    second = run(trainer)
    assert second != first
    assert second == run(distil(tmp_path, kind, model=model, optim="sgd"))


def test_projections_go_on_as_the_students_weights_do(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "projections", model=models.llama())
    trainer.train()
    assert trainer._layers is not None
    assert trainer._layers.projections is not None
    projections = trainer._layers.projections
    before = models.weights(projections)
    trainer.train()
    assert trainer._layers.projections is projections
    assert models.difference(models.weights(projections), before) > 0
    assert not any("hidden_projection" in name for name, _ in trainer.model.named_parameters())  # pyright: ignore[reportOptionalMemberAccess]


def test_a_new_model_has_new_projections(tmp_path: Path) -> None:
    trainer = distil(tmp_path, "projections", model_init=fresh)
    for _ in range(2):
        trainer.train()
        assert trainer._layers is not None
        assert trainer._layers.projections is not None
        trained = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}  # pyright: ignore[reportOptionalMemberAccess]
        assert {id(p) for p in trainer._layers.projections.parameters()} <= trained


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


# the projections of hidden layers in an optimizer of the user's


def test_an_optimizer_of_the_users_gets_the_projections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = models.llama()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        trainer = distil(tmp_path, "projections", model=student, optimizers=(optimizer, None))
        before = models.weights(trainer._layers.projections)  # pyright: ignore
        trainer.train()
    assert models.difference(models.weights(trainer._layers.projections), before) > 0  # pyright: ignore
    assert "1 projections of hidden layers were added to the optimizer" in caplog.text
    trainer.train()
    assert len(optimizer.param_groups) == 2


def test_the_class_of_an_optimizer_gets_the_projections(tmp_path: Path) -> None:
    given = (torch.optim.SGD, {"lr": 0.05})
    trainer = distil(tmp_path, "projections", model=models.llama(), optimizer_cls_and_kwargs=given)
    before = models.weights(trainer._layers.projections)  # pyright: ignore
    trainer.train()
    assert models.difference(models.weights(trainer._layers.projections), before) > 0  # pyright: ignore


def test_a_scheduler_of_the_users_has_no_rate_for_projections(tmp_path: Path) -> None:
    student = models.llama()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    both = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = distil(tmp_path, "projections", model=student, optimizers=both)
    with pytest.raises(ValueError, match="have projections, which must be trained"):
        trainer.train()
    same_width = distil(tmp_path, "hidden layers", model=student, optimizers=both)
    same_width.train()  # has none


# searches for hyperparameters


class Trial(dict[str, Any]):
    """A trial of chosen values, which needs no Optuna."""

    params = property(dict)
    number = 0


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[float]]]:
    """Runs trials with given values as the Trainer's backend does; returns the objectives."""

    monkeypatch.setattr(integrations, "hp_params", dict)

    def go(trainer: Any, trials: list[dict[str, Any]], **kwargs: Any) -> list[float]:
        found = []

        class Backend:
            ensure_available = staticmethod(lambda: None)
            default_hp_space = staticmethod(dict)

            @staticmethod
            def run(owner: Any, n_trials: int, direction: str, **_: Any) -> Any:
                for values in trials:
                    owner.objective = None
                    owner.train(trial=Trial(values))
                    found.append(owner.compute_objective(owner.evaluate()))

        known = {HPSearchBackend.OPTUNA: Backend}
        monkeypatch.setattr(module, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", known)
        trainer.eval_dataset = trainer.train_dataset
        trainer.hyperparameter_search(backend="optuna", n_trials=len(trials), **kwargs)
        return found

    return go


SEARCHED = {
    "a schedule": [
        {"alpha": 1.0},
        {"alpha": "linear:1->0@3"},
        {"alpha": "0.25"},
        {"alpha": "cosine:0->1@3"},
    ],
    "taid": [{"taid": {"t_start": 0.5}}, {"taid": None}, {"taid": {"t_start": 0.1}}],
    "hidden layers": [
        {"hidden_weight": 2.0},
        {"hidden_layers": "uniform"},
        {"hidden_layers": None},
    ],
    "projections": [{"hidden_layers": "uniform"}, {"hidden_layers": [1]}],
    "ema": [{"learning_rate": 0.2}, {"temperature": "linear:1->4@3"}],
    "base": [{"divergence": "jsd", "beta": 0.3}, {"divergence": "reverse_kl", "beta": 0.5}],
}


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_trial_is_the_run_of_its_values(tmp_path: Path, search: Any, kind: str) -> None:
    trainer = distil(tmp_path, kind, model_init=fresh)
    logs = []
    train = trainer.train

    def kept(*args: Any, **kwargs: Any) -> None:
        train(*args, **kwargs)
        logs.append(list(models.steps(trainer)))

    trainer.train = kept  # pyright: ignore[reportAttributeAccessIssue]
    objectives = search(trainer, SEARCHED[kind])
    settings: dict[str, Any] = {}
    for values, log, objective in zip(SEARCHED[kind], logs, objectives, strict=True):
        settings |= values
        alone = distil(tmp_path, kind, model=models.llama(), **settings)
        alone.eval_dataset = alone.train_dataset
        alone.train()
        assert models.steps(alone) == log
        assert objective == alone.evaluate()["eval_loss"]


def test_a_trial_changes_the_teacher_that_the_config_names(tmp_path: Path, search: Any) -> None:
    trainer = opsd(tmp_path, "ema", model_init=fresh)
    trials = [{"self_teacher": {"ema_decay": 0.9}}, {"teacher": "base"}]
    search(trainer, trials)
    assert isinstance(trainer.teacher, SelfTeacher)
    assert (trainer.teacher.kind, trainer.teacher.ema_decay) == ("base", 0.9)


def test_a_trial_with_a_wrong_value_is_an_error(tmp_path: Path, search: Any) -> None:
    trainer = distil(tmp_path, "ema", model_init=fresh)
    with pytest.raises(ValueError, match="alpha must be in"):
        search(trainer, [{"alpha": 1.5}])


def test_the_objective_is_what_the_user_measures(tmp_path: Path, search: Any) -> None:
    """Not the sum of the metrics that are added to an evaluation."""
    trainer = distil(tmp_path, "ema", model_init=fresh)
    trainer.compute_metrics = lambda _: {"mine": 3.0, "other": 4.0}
    assert search(trainer, [{}]) == [7.0]
