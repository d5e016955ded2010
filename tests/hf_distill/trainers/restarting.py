"""Trainers that keep something of their own from step to step, to train several times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    SelfTeacher,
)
from hf_distill.teachers import RoutedTeacher
from tests.hf_distill.trainers import models


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
