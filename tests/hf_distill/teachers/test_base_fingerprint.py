"""A resumed run must have the frozen copy that it began with, which checkpoints tell apart."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    SelfTeacher,
)
from hf_distill.teachers.base_fingerprint import FILE, BaseFingerprint, fingerprint
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def opsd(folder: Path, model: nn.Module, **changes: Any) -> OPSDTrainer:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    settings |= {"max_completion_length": 4}
    return OPSDTrainer(
        model,
        OPSDConfig(**models.options(folder, **settings | changes)),
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
    )


def test_the_model_of_a_checkpoint_is_not_the_base(tmp_path: Path) -> None:
    whole = opsd(tmp_path, models.llama())
    whole.train()
    folder = tmp_path / "checkpoint-2"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    rule = "must be built with the model as it was before training, because teacher 'base' is its"
    with pytest.raises(ValueError, match=rule):
        opsd(tmp_path, trained).train(resume_from_checkpoint=str(folder))
    again = opsd(tmp_path, models.llama())
    again.train(resume_from_checkpoint=str(folder))
    assert models.difference(models.weights(whole.model), models.weights(again.model)) == 0
    (folder / FILE).unlink()  # the way that the error names
    opsd(tmp_path, trained).train(resume_from_checkpoint=str(folder))


def test_a_routed_teachers_base_is_compared_too(tmp_path: Path) -> None:
    def run(model: nn.Module) -> DistillTrainer:
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        args = DistillConfig(**models.options(tmp_path, **settings))
        teacher = RoutedTeacher({"self": SelfTeacher("base"), "other": models.llama(1)}, "domain")
        names = ("self", "other") * 8
        rows = [row | {"domain": x} for row, x in zip(models.rows(), names, strict=True)]
        return DistillTrainer(model, args, models.Pad(), rows, teacher=teacher)

    run(models.llama()).train()
    with pytest.raises(ValueError, match="of 21 parameters have other values"):
        run(models.llama(2)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    run(models.llama()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_older_checkpoint_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opsd(tmp_path, models.llama()).train()
    (tmp_path / "checkpoint-2" / FILE).unlink()
    run = opsd(tmp_path, models.llama(1))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 3
    assert "it is not known whether teacher 'base'" in caplog.text


@pytest.mark.parametrize("teacher", ["ema", "live", "adapters"])
def test_others_have_none(tmp_path: Path, teacher: str) -> None:
    model = models.lora(models.llama()) if teacher == "adapters" else models.llama()
    kind = "base" if teacher == "adapters" else teacher
    opsd(tmp_path, model, teacher=kind).train()
    assert not list(tmp_path.glob(f"*/{FILE}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_of_one_value_tells_models_apart(tmp_path: Path, dtype: torch.dtype) -> None:
    model = models.tied().to(dtype)
    BaseFingerprint(model).save(str(tmp_path))
    assert json.loads((tmp_path / FILE).read_text()) == fingerprint(model)
    same = copy.deepcopy(model)
    BaseFingerprint(same).load(str(tmp_path))
    for name, parameter in model.named_parameters():
        other = copy.deepcopy(model)
        bits = other.get_parameter(name).data.view(-1)[-1:].view(torch.int8)
        bits[0] ^= 1
        with pytest.raises(ValueError, match=f"1 of 20 parameters .*, the first is '{name}'"):
            BaseFingerprint(other).load(str(tmp_path))
        assert not torch.equal(other.get_parameter(name), parameter)


def test_another_dtype_is_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BaseFingerprint(models.llama()).save(str(tmp_path))
    BaseFingerprint(models.llama().bfloat16()).load(str(tmp_path))
    assert "in 0 of 21 parameters" in caplog.text


def test_sums_do_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(models.llama())
    monkeypatch.setattr("hf_distill.teachers.base_fingerprint.PIECE", 7)
    assert fingerprint(models.llama()) == whole


def test_parameters_without_values_here_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert fingerprint(model).keys() == {"0.weight", "0.bias"}
