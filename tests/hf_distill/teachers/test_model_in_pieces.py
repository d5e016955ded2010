"""When a teacher is cut by the engine of the student, and when it stays whole.

What is cut is trained with in `tests/hf_distill/engines`.
"""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from hf_distill import ModelTeacher, RoutedTeacher
from hf_distill.teachers import model_in_pieces
from hf_distill.teachers.model_in_pieces import cut_by_engine
from tests.hf_distill.trainers import models

FSDP, DEEPSPEED = DistributedType.FSDP, DistributedType.DEEPSPEED


def engine(kind: DistributedType, version: int = 2, stage: int | None = None) -> Any:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        distributed_type=kind,
        is_fsdp2=version == 2,
        deepspeed_plugin=plugin,
        native_amp=False,
        device="cpu",
    )


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By what a model was cut, instead of doing it."""
    done: list[str] = []
    for name in ("_cut_by_fsdp2", "_cut_by_zero3"):
        monkeypatch.setattr(model_in_pieces, name, lambda *_, name=name: done.append(name))
    return done


@pytest.mark.parametrize(
    ("accelerator", "by"),
    [
        (engine(FSDP), ["_cut_by_fsdp2"]),
        (engine(FSDP, version=1), []),
        (engine(DEEPSPEED, stage=3), ["_cut_by_zero3"]),
        (engine(DEEPSPEED, stage=2), []),
        (engine(DistributedType.MULTI_GPU), []),
        (engine(DistributedType.NO), []),
    ],
)
def test_the_engine_decides(accelerator: Any, by: list[str], cut: list[str]) -> None:
    cut_by_engine(accelerator, models.llama(), shares=False)
    assert cut == by


@pytest.mark.parametrize("reason", ["quantized", "placed", "in common"])
def test_what_stays_whole_is_said(
    reason: str, cut: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = models.llama()
    if reason == "quantized":
        model.is_quantized = True
    if reason == "placed":
        model.hf_device_map = {"": 0}
    caplog.set_level(logging.INFO)
    cut_by_engine(engine(FSDP), model, shares=reason == "in common")
    assert cut == []
    assert "teacher: whole on every process, because it" in caplog.text
    assert reason in caplog.text


def test_teachers_of_some_rows_stay_whole(cut: list[str]) -> None:
    student = models.llama()
    ModelTeacher(models.llama(1)).prepare(engine(FSDP), student, None)
    assert cut == ["_cut_by_fsdp2"]
    routed = RoutedTeacher({"a": ModelTeacher(models.llama(1))}, "domain")
    routed.prepare(engine(FSDP), student, None)
    assert cut == ["_cut_by_fsdp2"]
