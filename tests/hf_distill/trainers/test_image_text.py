"""Image-text models: a step equals one of each row alone; evaluation, adapters, hidden layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_distill import DistillConfig, DistillTrainer, SelfTeacher
from tests.hf_distill.trainers import image_models, models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

ROUNDING = 3e-6  # of the largest gradient, between a batch in float32 and its rows; found 6e-7
SETTINGS = {
    "alpha": 0.5,
    "divergence": "forward_kl",
    "temperature": 1.0,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "remove_unused_columns": False,
    "max_steps": 1,
    "per_device_train_batch_size": 3,
}


class Keep(TrainerCallback):
    """Keeps the gradients of a step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        named = model.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}


def one_step(
    folder: Path, student: nn.Module, teacher: Any, kind: str, side: str = "right", **changes: Any
) -> tuple[Any, dict[str, Tensor]]:
    args = DistillConfig(**models.options(folder, **SETTINGS | changes))
    collator, rows, keep = image_models.Processed(kind, side), image_models.rows(kind), Keep()
    made = DistillTrainer(student, args, collator, rows, teacher=teacher, callbacks=[keep])
    made.train()
    return made, keep.gradients


SINGLE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
CASES = [(kind, "left" if i % 2 else "right", {}) for i, kind in enumerate(image_models.KINDS)]
CASES += [("qwen2_vl", "left", {}), ("qwen3_vl", "right", SINGLE), ("smolvlm", "right", SINGLE)]


@pytest.mark.parametrize(("kind", "side", "changes"), CASES)
def test_a_step_is_that_of_each_row_alone(
    tmp_path: Path, kind: str, side: str, changes: dict[str, Any]
) -> None:
    student, teacher = (image_models.model(kind, seed) for seed in (0, 1))
    rows = image_models.rows(kind)
    wanted, gradients = image_models.distillation_step(student, teacher, kind, rows)
    made, found = one_step(tmp_path, student, teacher, kind, side, **changes)
    assert made._reader.refusal is None  # by hidden states, before the language head
    assert models.steps(made)[0]["loss"] == pytest.approx(wanted, rel=1e-6)
    largest = max(float(x.abs().max()) for x in gradients.values())
    assert models.difference(found, gradients) < ROUNDING * largest
    assert any("vis" in name and bool(x.any()) for name, x in found.items())


def on_the_language_part(model: nn.Module) -> nn.Module:
    """Adapters whose product is not zero, in no layer of the vision tower."""
    torch.manual_seed(2)
    chosen = r".*language_model.*\.(q_proj|up_proj)"
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=chosen)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return adapted


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_adapters_learn_from_their_base_model(tmp_path: Path, kind: str) -> None:
    student, base = on_the_language_part(image_models.model(kind)), image_models.model(kind)
    rows = image_models.rows(kind)
    wanted, gradients = image_models.distillation_step(student, base, kind, rows)
    made, found = one_step(tmp_path, student, SelfTeacher("base"), kind)
    assert models.steps(made)[0]["loss"] == pytest.approx(wanted, rel=1e-6)
    largest = max(float(x.abs().max()) for x in gradients.values())
    assert models.difference(found, gradients) < ROUNDING * largest
    assert found
    assert not any("vis" in name for name in found)
