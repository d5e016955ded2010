"""Prompt and prefix tuning, of the student and of the teacher: the text's logits, nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    SelfTeacher,
)
from tests.hf_distill.trainers import models

pytestmark = [
    pytest.mark.filterwarnings(models.PEFT_WARNING),
    # of PEFT's forward, which leaves them out or gives them on
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
KINDS = {
    "prompt": PromptTuningConfig(**LM, num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(**LM, num_virtual_tokens=2, encoder_hidden_size=16),
    "multitask": MultitaskPromptTuningConfig(**LM, num_virtual_tokens=3, num_tasks=2),
    "cpt": CPTConfig(**LM, cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4]),
    "prefix": PrefixTuningConfig(**LM, num_virtual_tokens=3),
}
ALPHA, TEMPERATURE = 0.6, 2.0


def tuned(kind: str, family: str = "llama") -> nn.Module:
    """Its prompts are no longer as they were made."""
    model = get_peft_model(models.FAMILIES[family](), copy.deepcopy(KINDS[kind]))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


class PadTasks(models.Pad):
    """With the tasks that multitask prompts ask for."""

    def __call__(self, batch: Any) -> Any:
        return super().__call__(batch) | {"task_ids": torch.ones(len(batch)).long()}


def said(model: nn.Module, ids: list[int]) -> Tensor:
    """[T, V] logits of a row alone, of its own tokens."""
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if isinstance(model, PeftModel):
        inputs["task_ids"] = torch.ones(1).long()
    with torch.no_grad():
        return model(**inputs).logits[0, -len(ids) :].double()


def reference(student: nn.Module, teacher: nn.Module, alpha: float) -> float:
    """The loss of the first batch, row by row."""
    soft, hard = [], []
    for row in models.rows()[:4]:
        labels = torch.tensor(row["labels"])[1:]
        kept = labels != -100
        q, p = (said(x, row["input_ids"])[:-1][kept] for x in (student, teacher))
        log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (q, p))
        soft.append((log_p.exp() * (log_p - log_q)).sum(-1) * TEMPERATURE**2)
        hard.append(F.cross_entropy(q, labels[kept], reduction="none"))
    return float(alpha * torch.cat(soft).mean() + (1 - alpha) * torch.cat(hard).mean())


def settings(folder: Path, alpha: float = ALPHA, **changes: Any) -> DistillConfig:
    more = {"divergence": "forward_kl", "temperature": TEMPERATURE, "remove_unused_columns": False}
    return DistillConfig(**models.options(folder, alpha=alpha, max_steps=1, **more, **changes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("whose", ["student", "teacher", "routed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_text(tmp_path: Path, kind: str, whose: str, family: str) -> None:
    student, teacher = tuned(kind, family), models.FAMILIES[family](1)
    if whose != "student":
        student, teacher = teacher, student
    # CPT has a loss of its own: it also scores virtual tokens
    alpha = 1.0 if kind == "cpt" and whose == "student" else ALPHA
    want = reference(student, teacher, alpha)
    if whose == "routed":
        teacher = RoutedTeacher({"one": teacher}, "which")
    rows = [row | {"which": "one"} for row in models.rows()]
    args = settings(tmp_path, alpha)
    trainer = DistillTrainer(student, args, PadTasks(), rows, teacher=teacher)
    trainer.train()
    # sums of some 40 tokens' terms of size 1 to 10 in float32
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, rel=5e-6)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_both_paths_and_hidden_layers(tmp_path: Path, kind: str) -> None:
    """Of logits that are asked for by a mask, and of states that hooks have taken."""

    def run(refusal: str | None, **changes: Any) -> dict[str, Tensor]:
        args = settings(tmp_path, **changes)
        made = DistillTrainer(tuned(kind), args, PadTasks(), models.rows(), teacher=tuned(kind))
        made._reader._refusal = made.teacher._reader._refusal = refusal
        made.train()
        return models.weights(made.model)

    one, other = run(None), run("told so")
    # see models.options: an error of a gradient moves the weights by at most ten times itself
    assert models.difference(one, other) <= 2e-6
    states = run(None, hidden_layers="last", hidden_weight=1.0)
    assert models.difference(states, one) <= 2e-6  # of two that are the same


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_alpha_zero_is_trainer(tmp_path: Path, kind: str) -> None:
    args = TrainingArguments(**models.options(tmp_path))
    rows = models.rows(ignored=1)  # plain Trainer scores first tokens, of which prompts know
    plain = Trainer(tuned(kind), args, models.Pad(), rows)
    plain.train()
    args = DistillConfig(**models.options(tmp_path, alpha=0.0))
    found = DistillTrainer(tuned(kind), args, models.Pad(), rows, teacher=models.llama(1))
    found.train()
    assert not found.task.hard_loss.replaces
    assert models.difference(models.weights(plain.model), models.weights(found.model)) <= 2e-6
    for with_outputs in (False, True):
        if with_outputs:
            found.compute_metrics = lambda x: {"shape": x.predictions.shape[1]}
        loss = found.evaluate(rows[:4])["eval_loss"]
        assert loss == pytest.approx(plain.evaluate(rows[:4])["eval_loss"], rel=2e-6)


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
def test_hints_for_a_student_with_a_prefix(tmp_path: Path, teacher: str) -> None:
    settings = {"max_completion_length": 8, "teacher": teacher, "max_steps": 1, "on_policy": False}
    args = OPSDConfig(**models.options(tmp_path, **settings))
    tokenizer, data = models.tokenizer(), models.problems()
    trainer = OPSDTrainer(tuned("prefix"), args, None, data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("teacher", ["base", "live"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_self_teachers(tmp_path: Path, kind: str, teacher: str) -> None:
    """The base is the model without its prompts."""
    student = tuned(kind)
    want = reference(student, models.llama() if teacher == "base" else student, 1.0)
    args, teacher = settings(tmp_path, 1.0), SelfTeacher(teacher)
    trainer = DistillTrainer(student, args, PadTasks(), models.rows(), teacher=teacher)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, rel=5e-6, abs=1e-6)
