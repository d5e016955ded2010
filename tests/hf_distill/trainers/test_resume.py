"""A run that is interrupted and resumed by a new trainer ends in the same weights, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

STEPS, SAVED_AT = 6, 3  # 16 rows make 4 steps an epoch: the run resumes in the middle of the first
SAVING = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "train_sampling_strategy": "random",
}
LEAST = 1e-5  # what losing any part of the state must change; the resumed run itself is bit-equal


def student() -> nn.Module:
    return models.llama(attention_dropout=0.2)  # the random state matters


def distill(folder: Path) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, **SAVING))
    return DistillTrainer(student(), args, models.Pad(), models.rows(), teacher=models.llama(1))


def opsd(folder: Path, model: nn.Module, **changes: Any) -> OPSDTrainer:
    settings = SAVING | {"max_completion_length": 8, "rollout": {"temperature": 1.0}} | changes
    args = OPSDConfig(**models.options(folder, **settings))
    tokenizer = models.tokenizer()
    return OPSDTrainer(model, args, train_dataset=models.problems(), processing_class=tokenizer)


def opsd_lora(folder: Path) -> OPSDTrainer:
    return opsd(folder, models.lora(student()))


def opsd_ema(folder: Path) -> OPSDTrainer:
    return opsd(folder, student(), teacher="ema", self_teacher={"ema_decay": 0.5})


def opsd_lora_scale(folder: Path) -> OPSDTrainer:
    """The teacher is another one at each step, before the checkpoint and behind it."""
    return opsd(
        folder,
        models.lora(student()),
        teacher="lora_scale",
        self_teacher={"lora_scale": "linear:0.0->1.0@5"},
    )


def opsd_window(folder: Path) -> OPSDTrainer:
    """Each rollout serves two steps: the checkpoint of step 3 lies between them."""
    return opsd(
        folder,
        student(),
        rollout={"temperature": 1.0, "steps_per_rollout": 2},
        gradient_accumulation_steps=2,
    )


def opsd_weighted(folder: Path) -> OPSDTrainer:
    """The teacher, which moves, is asked when a step's tokens are counted."""
    return opsd(
        folder,
        student(),
        teacher="ema",
        self_teacher={"ema_decay": 0.5},
        rollout={"temperature": 1.0, "steps_per_rollout": 2, "importance_clip": 2.0},
        gradient_accumulation_steps=2,
        token_weights={"entropy": 4.0, "reasoning": 0.5, "markers": ["1", "2"]},
    )


ALL = (distill, opsd_lora, opsd_ema, opsd_lora_scale, opsd_window, opsd_weighted)
SETUPS = {f.__name__: f for f in ALL}


def resumed(setup: str, folder: Path) -> dict[str, torch.Tensor]:
    trainer = SETUPS[setup](folder)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}"))
    assert trainer.state.global_step == STEPS
    return models.weights(trainer.model)


@pytest.mark.parametrize("setup", SETUPS)
def test_resumed_is_straight_bit_for_bit(tmp_path: Path, setup: str) -> None:
    straight = SETUPS[setup](tmp_path)
    straight.train()
    assert models.difference(models.weights(straight.model), resumed(setup, tmp_path)) == 0.0


def test_a_lost_rollout_would_show(tmp_path: Path) -> None:
    straight = opsd_window(tmp_path)
    straight.train()
    (tmp_path / f"checkpoint-{SAVED_AT}" / "rollout-0.json").unlink()
    end = resumed("opsd_window", tmp_path)
    assert models.difference(models.weights(straight.model), end) > LEAST


@pytest.mark.parametrize("setup", ["opsd_ema", "opsd_lora_scale", "opsd_weighted"])
def test_a_teacher_state_that_is_not_restored_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: str
) -> None:
    straight = SETUPS[setup](tmp_path)
    straight.train()
    monkeypatch.setattr(type(straight.teacher), "load_state_dict", lambda self, state: None)
    assert models.difference(models.weights(straight.model), resumed(setup, tmp_path)) > LEAST


def test_resuming_without_the_teachers_state_is_an_error(tmp_path: Path) -> None:
    opsd_ema(tmp_path).train()
    (tmp_path / f"checkpoint-{SAVED_AT}" / "teacher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"teacher's state must be in the checkpoint"):
        resumed("opsd_ema", tmp_path)


def test_a_rollout_that_is_used_up_is_not_saved(tmp_path: Path) -> None:
    opsd_window(tmp_path).train()
    assert (tmp_path / "checkpoint-3" / "rollout-0.json").is_file()
    assert not (tmp_path / "checkpoint-6" / "rollout-0.json").exists()
    opsd(tmp_path, student(), max_steps=SAVED_AT).train()  # over it, with no window
    assert not (tmp_path / "checkpoint-3" / "rollout-0.json").exists()
