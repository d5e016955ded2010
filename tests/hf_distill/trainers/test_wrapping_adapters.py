"""Adapters that wrap the model's forward: what they need and add is that of plain Trainer."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    LoraConfig,
    PeftMixedModel,
    PolyConfig,
    ShadowConfig,
    XLoraConfig,
    get_peft_model,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillConfig, DistillTrainer, SelfTeacher
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = [
    pytest.mark.filterwarnings(models.PEFT_WARNING),
    # of PEFT's shadow
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
Make = Callable[[Path], nn.Module]


def noisy(model: nn.Module) -> nn.Module:
    """Its adapters do something from the start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def adalora(_: Path) -> nn.Module:
    sizes = {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 0, "tfinal": 1}
    config = AdaLoraConfig(**LM, **sizes, target_modules=["q_proj", "v_proj"])
    return noisy(get_peft_model(models.llama(), config))


def xlora(folder: Path) -> nn.Module:
    saved = str(folder / "lora")
    models.lora(models.llama()).save_pretrained(saved)
    config = XLoraConfig(**LM, hidden_size=32, xlora_depth=2, adapters={"0": saved})
    return noisy(get_peft_model(models.llama(use_cache=False), config))


def adaption(_: Path) -> nn.Module:
    config = AdaptionPromptConfig(**LM, adapter_len=4, adapter_layers=2)
    return noisy(get_peft_model(models.llama(), config))


def poly(_: Path) -> nn.Module:
    config = PolyConfig(**LM, r=4, n_tasks=2, n_skills=2, target_modules=["q_proj", "v_proj"])
    return noisy(get_peft_model(models.llama(), config))


def shadow(_: Path) -> nn.Module:
    return noisy(get_peft_model(models.llama(use_cache=False), ShadowConfig(**LM)))


def alora(_: Path) -> nn.Module:
    config = LoraConfig(**LM, r=4, target_modules=["q_proj"], alora_invocation_tokens=[5])
    return noisy(get_peft_model(models.llama(), config))


def mixed(_: Path) -> nn.Module:
    return noisy(PeftMixedModel(models.llama(), LoraConfig(target_modules=["q_proj"]), "default"))


ADAPTERS: dict[str, tuple[Make, str]] = {
    "adalora": (adalora, "by its hidden states"),
    "xlora": (xlora, "by its logits, .* XLoraModel runs the model 2 times a call"),
    "adaption": (adaption, "by its logits, .* AdaptionPromptModel has kept the model's forward"),
    "poly": (poly, "by its hidden states"),
    "shadow": (shadow, "by its hidden states"),
    "alora": (alora, "by its hidden states"),
    "mixed": (mixed, "by its hidden states"),
}


class PadTasks(models.Pad):
    """With a task for each row, and the token that invokes aLoRA."""

    def __call__(self, batch: Any) -> Any:
        made = super().__call__(batch)
        made["input_ids"][:, 1] = 5
        return made | {"task_ids": torch.arange(len(batch)) % 2}


class Allocates(TrainerCallback):
    """As PEFT's documentation says that AdaLoRA is trained."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def trained(kind: Any, args: Any, model: nn.Module, **more: Any) -> Any:
    adapted = getattr(model, "peft_config", {}).get("default")
    callbacks = [Allocates()] if isinstance(adapted, AdaLoraConfig) else []
    rows = models.rows(ignored=1)
    trainer = kind(model, args, PadTasks(), rows, callbacks=callbacks, **more)
    trainer.train()
    return trainer


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return models.options(folder, remove_unused_columns=False, **changes)


@pytest.mark.parametrize("name", ADAPTERS)
def test_alpha_zero_is_trainer(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, said = ADAPTERS[name]
    plain = trained(Trainer, TrainingArguments(**options(tmp_path)), make(tmp_path))
    caplog.set_level("INFO", "hf_distill")
    args, teacher = DistillConfig(**options(tmp_path, alpha=0.0)), models.llama(1)
    found = trained(DistillTrainer, args, make(tmp_path), teacher=teacher)
    assert any("student: read" in text for text in caplog.messages)
    assert re.search(f"student: read {said}", caplog.text)
    for log, want in zip(models.steps(found), models.steps(plain), strict=True):
        assert log["loss"] == pytest.approx(want["loss"], rel=2e-6)
        assert log["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-5, abs=1e-7)
    assert models.difference(models.weights(plain.model), models.weights(found.model)) <= 2e-6
    rows = models.rows(4, ignored=1)
    for metrics in (None, lambda _: {}):  # with outputs too
        found.compute_metrics = metrics
        want = plain.evaluate(rows)["eval_loss"]
        assert found.evaluate(rows)["eval_loss"] == pytest.approx(want, rel=2e-6)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("teacher", ["model", "base", "live"])
def test_the_soft_loss_trains_too(tmp_path: Path, name: str, teacher: str) -> None:
    """With checkpointing where the adapter can."""
    made = models.llama(1) if teacher == "model" else SelfTeacher(teacher)
    args = DistillConfig(
        **options(tmp_path, max_steps=2, activation_checkpointing=name in ("alora", "adalora"))
    )
    found = trained(DistillTrainer, args, ADAPTERS[name][0](tmp_path), teacher=made)
    assert all(log["loss"] >= 0 for log in models.steps(found))
    if teacher == "live" and name not in ("poly", "shadow"):  # which draw in training
        assert models.steps(found)[0]["soft"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_an_adapter_adds_is_whole_at_every_alpha(
    tmp_path: Path, kind: Any, alpha: float
) -> None:
    """And once an optimizer step, into how many batches it may be cut."""
    model = adalora(tmp_path)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        lm = model.get_base_model()
        added = float(model(input_ids=ids, labels=ids).loss - lm(input_ids=ids, labels=ids).loss)
    assert added > 0.1
    weights = []
    for rows, steps in ((8, 1), (2, 4)):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        args = DistillConfig(**options(tmp_path, alpha=alpha, max_steps=1, **cut))
        found = trained(kind, args, adalora(tmp_path), teacher=models.llama(1))
        log = models.steps(found)[0]
        mixed = alpha * log["soft"] + (1 - alpha) * log.get("hard", 0.0)
        assert log["loss"] - mixed == pytest.approx(added, abs=1e-5)
        weights.append(models.weights(found.model))
    assert models.difference(*weights) <= 2e-6
