"""The trials of one adapter: what its self-teachers say, and a step with it as the student."""

import tempfile
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill import DistillConfig, DistillTrainer, SelfTeacher
from tests.sweeps import adapter_setups, reference, running, tiny_configs
from tests.sweeps.cells import (
    CLEAR,
    GRADIENT,
    LOGITS,
    LOSS,
    RIGHT,
    WRONG,
    Cell,
    as_json,
    furthest,
    measured,
    relative,
    tried,
    worst,
)

COLUMNS = ("base", "student", "ema", "live", "scale", "step")
STEPS = 4
RATE = 3e-2  # so large that three steps change logits by far more than rounding


@torch.no_grad()
def scored(model: nn.Module, together: bool = False) -> Tensor:
    """[N, V] logits of the sweep's scored tokens without padding, as in evaluation."""
    was_training = model.training
    model.eval()
    found = reference.scored_logits(model, together)
    model.train(was_training)
    return found


def apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


class Subject:
    """An adapter on a base model.

    Attributes:
        name: of the adapter.
        base: the type of the model.
    """

    def __init__(self, name: str, base: str) -> None:
        self.name, self.base = name, base
        self.original = tiny_configs.model(base)
        self.logits = scored(self.original)

    def student(self) -> Any:
        """A model with a new adapter."""
        return adapter_setups.adapted(running.copied(self.original), self.name, self.base)

    @cached_property
    def adds_loss(self) -> bool:
        """Whether the adapter adds a term of its own to the model's loss, as AdaLoRA does."""
        return reference.has_own_loss(self.student())

    @cached_property
    def mixes_rows(self) -> bool:
        """Whether the adapter reads the other rows of a batch: no row is then right alone."""
        student = self.student()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return apart(scored(student, together=True), scored(student)) > LOGITS


def _said(subject: Subject, teacher: SelfTeacher) -> list[tuple[Tensor, Tensor]]:
    """At each of some steps what a self-teacher says, and what the student would say alone."""
    adapted, said = subject.student(), []
    signal = teacher.signal

    def noted(student: nn.Module, side: Any) -> Any:
        found = signal(student, side)
        said.append((found.dense().detach().clone(), scored(adapted, subject.mixes_rows)))
        return found

    teacher.signal = noted
    with tempfile.TemporaryDirectory() as folder:
        given = running.options(folder, max_steps=STEPS, learning_rate=RATE)
        collator, data = reference.Pad(adapted), reference.rows()
        running.train(
            DistillTrainer(adapted, DistillConfig(**given), collator, data, teacher=teacher)
        )
    return said[:1] + said[-1:]


def base(subject: Subject) -> Cell:
    """The base teacher is the untouched model, before the first step and after three."""
    off = [apart(got, subject.logits) for got, _ in _said(subject, SelfTeacher("base"))]
    return measured(max(off), LOGITS, " / ".join(f"{x:.0e}" for x in off))


def student(subject: Subject) -> Cell:
    """How far the new student is from the untouched model; there is no right or wrong."""
    return Cell(RIGHT, f"{apart(scored(subject.student()), subject.logits):.0e}")


def ema(subject: Subject) -> Cell:
    """An average that forgets at once is the student."""
    off = [apart(*pair) for pair in _said(subject, SelfTeacher("ema", ema_decay=0.0))]
    return measured(max(off), LOGITS)


def live(subject: Subject) -> Cell:
    """The live teacher is the student."""
    return measured(max(apart(*pair) for pair in _said(subject, SelfTeacher("live"))), LOGITS)


def scale(subject: Subject) -> Cell:
    """Adapters without effect leave the untouched model."""
    off = [
        apart(got, subject.logits)
        for got, _ in _said(subject, SelfTeacher("lora_scale", lora_scale=0.0))
    ]
    return measured(max(off), LOGITS)


def step(subject: Subject) -> Cell:
    """Loss and gradients of a first step with another model as the teacher."""
    mine, other = subject.student(), tiny_configs.model(subject.base, 1)
    collator = reference.Pad(mine)
    first = running.distill(mine, other, collator, reference.ALPHA)
    student = subject.student()
    if reference.is_random(student, other):
        with torch.no_grad():
            expected = float(reference.distillation(student, other, reference.ALPHA))
        off = relative(running.evaluated(student, other, collator, reference.ALPHA), expected)
        return measured(off, LOSS, f"evaluated {off:.0e}")
    given = student, other, reference.ALPHA, subject.mixes_rows, subject.adds_loss
    loss, gradients = reference.distillation_step(*given)
    off = relative(first.loss if first.loss is not None else float("nan"), loss)
    far = furthest(first.gradients, gradients)
    text = f"{off:.0e} / {far:.0e}"
    return worst(measured(off, LOSS, text), measured(far, GRADIENT, text))


TRIALS = {"base": base, "student": student, "ema": ema, "live": live, "scale": scale, "step": step}


def plain(subject: Subject) -> None:
    """A step of the adapted model by PEFT alone."""
    model = subject.student().train()
    loss = model(**reference.Pad(model)(reference.rows())).loss
    if not loss.isfinite():  # which stops our run, and not a Trainer's
        raise FloatingPointError("the adapter's own loss is not finite")
    loss.backward()


def trial(name: str, columns: tuple[str, ...] = COLUMNS) -> dict[str, Any]:
    """All cells of an adapter; `name` is "adapter on base". See `architecture_trials.trial`."""
    adapter, _, base_name = name.rpartition(" on ")
    subject = Subject(adapter, base_name)
    try:
        student = subject.student()
        kind = type(student).__name__
        if not any(parameter.requires_grad for parameter in student.parameters()):
            return {"kind": name, "failed": "nothing is trained"}
    except Exception as error:  # PEFT's own: there is nothing to try
        return {"kind": name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    cells, path, note = {}, "", ""
    for column in columns:
        with running.heard() as said:
            cells[column] = tried(
                partial(TRIALS[column], subject), (kind,), partial(plain, subject)
            )
        path = running.path_of(said) if column == "step" else path
    if cells.get("step", Cell(CLEAR)).verdict not in (RIGHT, WRONG):
        path = "-"
    else:
        own = ["adds a loss of its own"] if subject.adds_loss else []
        note = "; ".join(own + (["reads all rows of a batch"] if subject.mixes_rows else []))
    return {"kind": name, "class": kind, "path": path, "note": note, "cells": as_json(cells)}
