"""Under bf16 autocast a teacher computes as the student does, unless its dtype says otherwise."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    HintCollator,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    SelfTeacher,
)
from hf_distill.data import Side
from hf_distill.models import Signal
from hf_distill.models.precision import stored
from hf_distill.teachers import Teacher
from tests.hf_distill.teachers.asking import SIDE
from tests.hf_distill.trainers import classifying, models
from tests.hf_distill.trainers.reading import ReadsLogits


class Plain(Teacher):
    """A teacher of one's own, which knows nothing of autocast."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def signal(self, student: nn.Module, side: Side) -> Signal:
        return Signal(logits=self.model(**side.inputs).logits[side.predicts])


def routed(*teachers: Any) -> RoutedTeacher:
    return RoutedTeacher({str(i): x for i, x in enumerate(teachers)}, column="who")


OWN: dict[str, Callable[[nn.Module], Teacher]] = {
    "base": lambda _: SelfTeacher("base"),
    "ema": lambda _: SelfTeacher("ema"),
    "live": lambda _: SelfTeacher("live"),
    "copy": lambda model: ModelTeacher(copy.deepcopy(model).eval()),
    "routed": lambda model: routed(copy.deepcopy(model)),
    "routed self": lambda model: routed(SelfTeacher("base"), SelfTeacher("ema"), model_copy(model)),
    "of one's own": lambda model: Plain(copy.deepcopy(model).eval()),
}
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    **models.FAMILIES,
    "bf16 weights": lambda: models.llama().bfloat16(),
    "lora on bf16": lambda: models.lora(models.llama().bfloat16()),
}


pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def model_copy(model: nn.Module) -> ModelTeacher:
    return ModelTeacher(copy.deepcopy(model).eval())


def make(
    folder: Path, student: nn.Module, teacher: Any, reads: type[DistillTrainer], **changes: Any
) -> DistillTrainer:
    rows = [row | {"who": "0"} for row in models.rows()]
    settings = {"bf16": True, "max_steps": 1, "learning_rate": 0.0, "temperature": 1.0} | changes
    config = DistillConfig(**models.options(folder, **settings))
    return reads(student, config, models.Pad(), rows, rows[:6], teacher=teacher)


@pytest.mark.parametrize("reads", [DistillTrainer, ReadsLogits])
@pytest.mark.parametrize("kind", OWN)
def test_a_copy_of_the_student_says_the_same(
    tmp_path: Path, kind: str, reads: type[DistillTrainer]
) -> None:
    student = models.llama()
    trainer = make(tmp_path, student, OWN[kind](student), reads)
    assert trainer.evaluate()["eval_soft"] == 0  # the model is not prepared before
    trainer.train()
    assert trainer.state.log_history[-2]["soft"] == 0
    assert trainer.evaluate()["eval_soft"] == 0


@pytest.mark.parametrize("kind", ["base", "copy"])
@pytest.mark.parametrize("family", STUDENTS)
def test_of_each_family(tmp_path: Path, family: str, kind: str) -> None:
    student = STUDENTS[family]()
    teacher = OWN["copy" if family.startswith("lora") else kind](student)
    trainer = make(tmp_path, student, teacher, DistillTrainer)
    trainer.train()
    assert trainer.state.log_history[0]["soft"] == 0


def test_in_an_opsd_trainer(tmp_path: Path) -> None:
    """A self-teacher in float32 weights, whose average is put in the place of the student's."""
    tokenizer = models.tokenizer()
    changes = {"bf16": True, "max_steps": 2, "learning_rate": 0.0, "on_policy": False}
    config = OPSDConfig(**models.options(tmp_path, teacher="ema", **changes))
    collator = HintCollator(tokenizer, hint_dropout=1.0)
    rows = models.problems()
    trainer = OPSDTrainer(models.llama(), config, collator, rows, processing_class=tokenizer)
    trainer.train()
    assert [log["soft"] for log in trainer.state.log_history if "soft" in log] == [0, 0]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "quantized"])
def test_a_teacher_of_another_dtype_computes_as_it_is(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = models.gpt2(1)  # autocast has its layer norms computed in float32
    if kind == "quantized":
        model.is_quantized = True
    else:
        model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[kind])
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer = make(tmp_path, models.gpt2(), model, DistillTrainer)
    assert f"teacher: stored in {stored(model)}, computes as it is, not in bf16" in caplog.text
    trainer.train()
    trainer.evaluate()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_casts_of_weights_are_not_kept(tmp_path: Path, kind: str) -> None:
    """Under an autocast around both, the student's gradient is not lost to the teacher's casts."""

    def gradients(kept: bool) -> list[Tensor]:
        model, teacher = models.llama(), SelfTeacher(kind)
        teacher.prepare(Accelerator(cpu=True), model, None)
        for parameter in model.parameters():  # the average is another model
            parameter.data.mul_(1.25)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            said = teacher.signal(model, SIDE).dense().float()
            logits = model(**SIDE.inputs).logits[SIDE.predicts].float()
            ((logits - 2 * said) ** 2).sum().backward()
        return [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]

    assert all(map(torch.equal, gradients(kept=True), gradients(kept=False)))


@pytest.mark.parametrize("family", classifying.FAMILIES)
def test_of_classifiers(tmp_path: Path, family: str) -> None:
    student = classifying.FAMILIES[family]()
    changes = {"bf16": True, "max_steps": 1, "learning_rate": 0.0}
    trainer = classifying.trainer(tmp_path, student, model_copy(student), **changes)
    trainer.train()
    assert trainer.state.log_history[0]["soft"] == 0
    assert trainer.evaluate()["eval_soft"] == 0
