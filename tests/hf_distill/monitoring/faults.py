"""Training runs in which a model, a teacher or a setting is broken, and healthy ones."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.hinted_rows import AllHints
from hf_distill.teachers import SelfTeacher, UpdateTeacher
from tests.hf_distill.trainers import models

SETTINGS = {"max_steps": 12, "learning_rate": 3e-3, "adam_epsilon": 1e-8}
WINDOW = {"watchdog": {"window": 2}}


def distil(folder: Path, model: nn.Module, teacher: Any, **changes: Any) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, **SETTINGS | WINDOW | changes))
    return DistillTrainer(model, args, models.Pad(), models.rows(), teacher=teacher)


def opsd(
    folder: Path,
    model: nn.Module,
    taught_by: Any = None,
    kind: type[OPSDTrainer] = OPSDTrainer,
    collator: type[HintCollator] = HintCollator,
    rows: Any = None,
    **changes: Any,
) -> OPSDTrainer:
    own = {"max_completion_length": 8, "rollout": {"temperature": 1.0}}
    args = OPSDConfig(**models.options(folder, **SETTINGS | WINDOW | own | changes))
    tokenizer = models.tokenizer()
    data = rows or models.problems()
    return kind(
        model, args, collator(tokenizer), data, processing_class=tokenizer, teacher=taught_by
    )


def scaled_head(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    return model


def sharp(seed: int = 0) -> nn.Module:
    """A model that is less uniform than a random one, as a trained one is."""
    return scaled_head(models.llama(seed), 3.0)


def biased(bias: float) -> nn.Module:
    """A model whose end token is more or less likely by a bias."""
    model = scaled_head(models.phi(), 3.0)
    with torch.no_grad():
        model.lm_head.bias[models.EOS] = bias
    return model


def zeroed_teacher(folder: Path) -> DistillTrainer:
    return distil(folder, sharp(), scaled_head(sharp(1), 0.0))


def zeroed_teacher_of_a_new_model(folder: Path) -> DistillTrainer:
    return distil(folder, scaled_head(models.llama(), 0.05), scaled_head(sharp(1), 0.0))


def new_teacher(folder: Path) -> DistillTrainer:
    """Its weights were not loaded; the student's were."""
    return distil(folder, sharp(), scaled_head(models.llama(1), 0.05))


def the_same_teacher_of_a_signed_loss(folder: Path) -> DistillTrainer:
    return distil(folder, sharp(), sharp(), alpha=1.0, divergence="policy_gradient")


def the_same_teacher(folder: Path) -> DistillTrainer:
    return distil(folder, sharp(), sharp(), alpha=1.0)


class Forgetful(HintCollator):
    """Its teacher gets no hint."""

    def _all_hints(self, row: Any, completion: Any, place: Any) -> AllHints:
        return AllHints([], [])


def lost_hint(folder: Path) -> OPSDTrainer:
    return opsd(folder, sharp(), collator=Forgetful)


def frozen_adapter(folder: Path) -> DistillTrainer:
    """Only A is trained, and B is zero: the adapter's gradient is zero."""
    model = models.lora(sharp())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_().requires_grad_(False)
    return distil(folder, model, sharp(1))


class Detached(DistillTrainer):
    """The loss's gradient is lost on the way."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss.detach() + 0 * model.lm_head.weight.sum()


def detached_loss(folder: Path) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, **SETTINGS | WINDOW))
    return Detached(sharp(), args, models.Pad(), models.rows(), teacher=sharp(1))


def average_never_updated(folder: Path) -> OPSDTrainer:
    trainer = opsd(folder, sharp(), teacher="ema")
    trainer.remove_callback(UpdateTeacher)
    return trainer


class InBfloat16(TrainerCallback):
    def __init__(self, averages: dict[str, torch.Tensor]) -> None:
        self.averages = averages

    def on_train_begin(self, *args: Any, **_: Any) -> None:
        rounded = {name: tensor.bfloat16() for name, tensor in self.averages.items()}
        self.averages.update(rounded)


def average_in_16_bits(folder: Path) -> OPSDTrainer:
    """The step of 1 - ema_decay is lost in the rounding."""
    slow = {"self_teacher": {"ema_decay": 0.9999}, "learning_rate": 1e-3}
    trainer = opsd(folder, sharp(), teacher="ema", **slow)
    trainer.add_callback(InBfloat16(trainer.teacher._held.values))
    return trainer


def average_without_decay(folder: Path) -> OPSDTrainer:
    return opsd(folder, sharp(), teacher="ema", self_teacher={"ema_decay": 0.0})


class AdaptersOn(SelfTeacher):
    """The student is its own base, adapters and all."""

    def signal(self, student: nn.Module, side: Any) -> Any:
        return self._reader.signal(student, side)


class Unchecked(OPSDTrainer):
    """Without the check before training, which would see it."""

    def _before_training(self) -> None:
        self._start_check.skip()


def adapters_stay_on(folder: Path) -> OPSDTrainer:
    return opsd(folder, models.lora(sharp()), AdaptersOn("base"), Unchecked)


class MergeOnce(TrainerCallback):
    """Writes the adapter into the base after a few steps, and leaves it on."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            for layer in model.modules():
                if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
                    with torch.no_grad():
                        layer.base_layer.weight += layer.get_delta_weight("default")


def adapter_written_into_the_base(folder: Path) -> OPSDTrainer:
    trainer = opsd(folder, models.lora(sharp()))
    trainer.add_callback(MergeOnce())
    return trainer


def shared_weights(folder: Path) -> DistillTrainer:
    """Teacher and student are two models on one storage of their heads."""
    student, teacher = sharp(), sharp(1)
    trainer = distil(folder, student, teacher)
    teacher.lm_head.weight.data = student.lm_head.weight.data
    return trainer


LONG = {"learning_rate": 0.05, "max_steps": 10, "per_device_train_batch_size": 16}


SLOWLY = {"learning_rate": 2e-3, "max_completion_length": 16}


def never_ends(folder: Path) -> OPSDTrainer:
    """The teacher gives the end token no probability."""
    return opsd(folder, biased(9.0), biased(-20.0), **LONG | SLOWLY)


def ends_at_once(folder: Path, **changes: Any) -> OPSDTrainer:
    return opsd(folder, biased(-1.0), biased(20.0), **LONG | changes)


HINT = "think first , 1 and 2 get 3 + 4 , done ."


def recited(steps: int) -> nn.Module:
    """A model that has been taught the hint for a while."""
    tokenizer = models.tokenizer()
    ids = torch.tensor([tokenizer(HINT)["input_ids"]])
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in models.problems()]
    model = models.llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        row = torch.cat([torch.tensor([prompts[step % len(prompts)]]), ids], 1)
        labels = row.clone()
        labels[:, : -ids.shape[1]] = -100
        model(input_ids=row, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def recites_the_hint(folder: Path) -> OPSDTrainer:
    """The teacher knows one hint by heart, whatever it is asked, and the student learns it."""
    rows = [row | {"hint": HINT} for row in models.problems()]
    settings = {"learning_rate": 1e-2, "max_steps": 16, "max_completion_length": 12}
    return opsd(
        folder,
        recited(10),
        recited(80),
        rows=rows,
        per_device_train_batch_size=16,
        **settings,
    )


def flat_teacher(folder: Path) -> DistillTrainer:
    settings = {"temperature": 1.0, "learning_rate": 1e-2}
    return distil(folder, scaled_head(sharp(), 2.0), models.llama(), **settings)


def samples_too_hot(folder: Path) -> OPSDTrainer:
    """A live teacher, and a student that imitates its own samples at a temperature of 5."""
    settings = {"teacher": "live", "alpha": 0.3, "rollout": {"temperature": 5.0}}
    return opsd(folder, scaled_head(sharp(), 2.0), learning_rate=1e-2, **settings)


def tight_clip(folder: Path) -> DistillTrainer:
    clip = {"bound": 1e-4, "level": "token"}
    return distil(folder, sharp(), sharp(1), clip=clip)


def live_teacher(folder: Path) -> OPSDTrainer:
    return opsd(folder, sharp(), teacher="live", max_steps=4)


SHORT = {"max_steps": 20}
MANY = SHORT | {"per_device_train_batch_size": 16}


def distilled(folder: Path, **changes: Any) -> DistillTrainer:
    return distil(folder, sharp(), sharp(1), **SHORT | changes)


def distilled_lora(folder: Path, **changes: Any) -> DistillTrainer:
    return distil(folder, models.lora(sharp()), sharp(1), **SHORT | changes)


def base(folder: Path, **changes: Any) -> OPSDTrainer:
    return opsd(folder, sharp(), **MANY | changes)


def base_lora(folder: Path, **changes: Any) -> OPSDTrainer:
    return opsd(folder, models.lora(sharp()), **MANY | changes)


def ema(folder: Path, **changes: Any) -> OPSDTrainer:
    return opsd(folder, sharp(), **MANY | {"teacher": "ema"} | changes)


def live_that_hardly_moves(folder: Path, **changes: Any) -> OPSDTrainer:
    """A hundredth of the learning rate of `live_teacher`."""
    return opsd(folder, sharp(), **MANY | {"teacher": "live", "learning_rate": 3e-5} | changes)


def clipped(folder: Path, **changes: Any) -> DistillTrainer:
    clip = {"bound": 8.0, "level": "token"}
    return distil(folder, sharp(), sharp(1), **SHORT | {"clip": clip} | changes)


def starts_as_its_teacher(folder: Path, **changes: Any) -> DistillTrainer:
    """The first divergence is 0; the hard loss takes the student away."""
    return distil(folder, sharp(), sharp(), **SHORT | changes)


def uneven_rows(folder: Path, **changes: Any) -> DistillTrainer:
    """A certain teacher, whose entropy differs tenfold from one batch of the data to the next."""
    certain = scaled_head(sharp(1), 200.0)
    return distil(folder, sharp(), certain, temperature=1.0, **{"learning_rate": 1e-4} | changes)


def new_models(folder: Path, **changes: Any) -> DistillTrainer:
    """Weights as they are initialised on both sides: both are nearly uniform."""
    student, teacher = (scaled_head(models.llama(seed), 0.05) for seed in (0, 1))
    return distil(folder, student, teacher, **SHORT | changes)


def new_models_on_policy(folder: Path, **changes: Any) -> OPSDTrainer:
    student, teacher = (scaled_head(models.llama(seed), 0.05) for seed in (0, 1))
    return opsd(folder, student, teacher, **SHORT | changes)


def certain_teacher(folder: Path, **changes: Any) -> DistillTrainer:
    """A student that knows nothing becomes as certain of the data as its teacher is."""
    student = scaled_head(models.llama(), 0.05)
    settings = {"temperature": 1.0, "learning_rate": 1e-2, "alpha": 1.0, "max_steps": 120}
    return distil(folder, student, scaled_head(sharp(1), 10.0), **settings | changes)


def less_certain_teacher(folder: Path, **changes: Any) -> DistillTrainer:
    """A student that is too certain learns to be less so."""
    settings = {"temperature": 1.0, "learning_rate": 3e-3, "alpha": 1.0, "max_steps": 40}
    return distil(folder, scaled_head(sharp(), 10.0), sharp(1), **settings | changes)


def signed_loss(folder: Path, **changes: Any) -> DistillTrainer:
    """Its soft loss is negative where the teacher gives the data's tokens less than the student."""
    student = distil(folder, sharp(), sharp(1), alpha=0.0, **SHORT)
    student.train()  # a student that knows the data better than its teacher
    changes = {"divergence": "policy_gradient", "learning_rate": 1e-4} | changes
    return distil(folder, student.model, sharp(1), **SHORT | changes)


HEALTHY = (
    distilled,
    distilled_lora,
    base,
    base_lora,
    ema,
    live_that_hardly_moves,
    clipped,
    starts_as_its_teacher,
    uneven_rows,
    new_models,
    new_models_on_policy,
    certain_teacher,
    less_certain_teacher,
    signed_loss,
)


def reported(trainer: DistillTrainer, caplog: pytest.LogCaptureFixture) -> set[str]:
    """The faults that a run warns of; each must be a metric of the log of the same step."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    logs = {x["step"]: x for x in trainer.state.log_history if "loss" in x}
    named = set()
    for record in caplog.records:
        if record.name == "hf_distill.monitoring.watchdog":
            step, fault = record.getMessage().removeprefix("watchdog, step ").split(": ")[:2]
            assert logs[int(step)][f"watchdog_{fault}"] >= 1
            named.add(fault)
    metrics = {name for x in logs.values() for name in x if name.startswith("watchdog_")}
    assert metrics == {f"watchdog_{fault}" for fault in named}
    return named
