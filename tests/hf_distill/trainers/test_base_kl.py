"""Staying near the base: its KL in the loss, StableOPD's mixture, and what is forgotten."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.sides import CONTRAST_PREFIX
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

SUM_ERROR = 5e-6  # relative, of a float32 mean over some 20 tokens; measured: 4e-7
WEIGHT = 0.7


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [{**row, "wrong": "Hint : 9 9"} for row in models.problems(count)]


def make(folder: Path, hint: Any = "hint", contrast: Any = None, **changes: Any) -> OPSDTrainer:
    settings = {"on_policy": False, "base_kl_weight": WEIGHT, "max_steps": 1} | changes
    forgetting, teacher = settings.pop("forgetting", None), settings.pop("given", None)
    student = settings.pop("student", None) or models.lora(models.llama())
    return OPSDTrainer(
        student,
        OPSDConfig(**models.options(folder, **settings)),
        HintCollator(models.tokenizer(), hint, contrast=contrast),
        rows(),
        rows(),
        models.tokenizer(),
        teacher=teacher,
        forgetting_dataset=forgetting,
    )


def log_probs(model: Any, batch: dict[str, Tensor], prefix: str, off: bool) -> list[Tensor]:
    """Float64, at each row's scored tokens, each row by itself; with the adapters or without."""
    found = []
    with torch.no_grad(), model.disable_adapter() if off else nullcontext():
        for i, ids in enumerate(batch[f"{prefix}input_ids"]):
            at = batch[f"{prefix}completion_index"][i]
            ids = ids[batch[f"{prefix}attention_mask"][i].bool()]
            logits = model(input_ids=ids[None]).logits[0].double()
            found.append(logits[at[at >= 0] - 1].log_softmax(-1))
    return found


def by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[float, float]:
    """The mean JSD to the hinted base, and the mean KL(student || base) on the student's rows."""
    sides = [("", False), ("teacher_", True), ("", True)]
    triples = zip(*(log_probs(model, batch, *x) for x in sides), strict=True)
    jsd, kl, count = 0.0, 0.0, 0
    for q, p, base in triples:
        m = ((p.exp() + q.exp()) / 2).log()
        jsd += float((p.exp() * (p - m) + q.exp() * (q - m)).sum()) / 2
        kl += float((q.exp() * (q - base)).sum())
        count += len(q)
    return jsd / count, kl / count


def step_loss(trainer: OPSDTrainer, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model.train(), batch).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_formula(tmp_path: Path, smoothing: float) -> None:
    """From hidden states and from logits."""
    trainer = make(tmp_path, label_smoothing_factor=smoothing)
    batch = trainer.data_collator(rows()[:4])
    jsd, kl = by_hand(trainer.model, batch)
    assert step_loss(trainer, batch) == pytest.approx(jsd + WEIGHT * kl, rel=SUM_ERROR)
    assert kl > 0.01
    assert trainer._read_metrics(training=True)["base_kl"] == pytest.approx(kl, rel=SUM_ERROR)
    found = trainer.evaluate(rows()[:4])  # an evaluation is without
    assert found["eval_loss"] == pytest.approx(jsd, rel=SUM_ERROR)


def test_steps_whose_teacher_is_asked_beforehand_have_it(tmp_path: Path) -> None:
    """Weights of entropies ask before the mode is set: that of the start is "eval"."""
    given = {"token_weights": {"entropy": 1.0}, "eval_on_start": True, "max_steps": 2}
    trainer = make(tmp_path, **given, eval_strategy="steps", eval_steps=1)
    trainer.model.eval()
    trainer.train()
    logs = trainer.state.log_history
    assert ["base_kl" in x for x in logs if "loss" in x] == [True, True]
    assert not any("eval_base_kl" in x for x in logs)


def gradient(trainer: OPSDTrainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model.train(), batch).backward()
    named = trainer.model.named_parameters()
    return {name: x.grad.double().clone() for name, x in named if x.grad is not None}


def test_gradients_are_those_of_both_losses(tmp_path: Path) -> None:
    """Against torch's own through plain logits."""
    trainer, plain = make(tmp_path), make(tmp_path, base_kl_weight=0.0)
    batch = trainer.data_collator(rows()[:4])
    both, one = (gradient(x, batch) for x in (trainer, plain))
    model: Any = plain.model
    base = torch.cat(log_probs(model, batch, "", off=True)).float()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    q = logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
    model.zero_grad()
    (q.exp() * (q - base)).sum(-1).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            want = one[name] + WEIGHT * parameter.grad.double()
            error = (both[name] - want).norm() / want.norm()
            assert error <= 1e-5, (name, error)  # measured: 9e-7


@pytest.mark.parametrize(
    ("hint", "contrast", "expected"),
    [
        ("hint", None, [(8, False), (4, True)]),  # both contexts at once
        ("hint", "wrong", [(12, False), (4, True)]),
        ([], None, [(4, False), (4, True)]),  # the base is the teacher already
    ],
)
def test_the_base_needs_no_forward_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hint: Any, contrast: Any, expected: Any
) -> None:
    trainer = make(tmp_path, hint, contrast)
    batch = trainer.data_collator(rows()[:4])
    assert (f"{CONTRAST_PREFIX}input_ids" in batch) == (contrast is not None)
    trainer.compute_loss(trainer.model.train(), batch)  # the probes are done
    seen: list[tuple[int, bool]] = []
    kind: Any = type(trainer.model.get_base_model())
    forward = kind.forward

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(kwargs["input_ids"]), torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", noted)
    trainer.compute_loss(trainer.model.train(), batch)
    assert seen == expected


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(tmp_path, **sizes, token_weights={"position": "late"})
        trainer.train()
        found.append(models.weights(trainer.model))
    assert models.difference(*found) <= 2e-6  # measured: 1e-7


def test_the_mixture_of_stable_opd(tmp_path: Path) -> None:
    """Rollouts, the cross-entropy of the data's own completions, and the base's KL in one loss."""
    given = {"on_policy": True, "max_completion_length": 4, "anchor_weight": 0.1}
    trainer = make(tmp_path, **given, base_kl_weight=0.01)
    trainer.train()
    (step,) = models.steps(trainer)
    want = step["soft"] + 0.1 * step["anchor"] + 0.01 * step["base_kl"]
    assert step["loss"] == pytest.approx(want, rel=SUM_ERROR)
    assert min(step["anchor"], step["base_kl"]) > 0.01


def test_what_is_forgotten_is_measured_on_other_rows(tmp_path: Path) -> None:
    """In batches of four and two: the mean over tokens of the cross-entropy."""
    others = [{"prompt": "get 1 and", "completion": text} for text in ("2", "2 done .", "3") * 2]
    trainer = make(tmp_path, forgetting=others, base_kl_weight=0.0, learning_rate=0.05)
    model, total, count = trainer.model, 0.0, 0

    def expected() -> float:
        total, count = 0.0, 0
        batch = HintCollator(models.tokenizer(), [])(others)
        for labels, q in zip(batch["labels"], log_probs(model, batch, "", off=False), strict=True):
            tokens = labels[labels != -100]
            total -= float(q.gather(1, tokens[:, None]).sum())
            count += len(tokens)
        return total / count

    del total, count
    before = trainer.evaluate()["eval_forgetting_hard"]
    assert before == pytest.approx(expected(), rel=SUM_ERROR)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_forgetting_hard"] == pytest.approx(expected(), rel=SUM_ERROR)
    assert abs(after["eval_forgetting_hard"] - before) > 1e-3
    logged = [x["eval_forgetting_hard"] for x in trainer.state.log_history if "eval_loss" in x]
    assert logged == [before, after["eval_forgetting_hard"]][-len(logged) :]


class OnlyTokens(models.Pad):
    """Fails at text, as a collator does that makes a tensor of each column."""

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        assert not any("text" in row for row in batch)
        return super().__call__(batch)


def test_rows_of_a_collator_without_hints(tmp_path: Path) -> None:
    args = DistillConfig(**models.options(tmp_path))
    trainer = DistillTrainer(
        models.llama(),
        args,
        OnlyTokens(),
        models.rows(),
        models.rows(4),
        teacher=models.llama(1),
        forgetting_dataset=Dataset.from_list([{**x, "text": "1"} for x in models.rows(6, seed=1)]),
    )
    metrics = trainer.evaluate()
    other = trainer.evaluate(models.rows(6, seed=1))
    assert metrics["eval_forgetting_hard"] == pytest.approx(other["eval_hard"], rel=SUM_ERROR)


def test_what_it_cannot_be_combined_with(tmp_path: Path) -> None:
    for changes in ({"teacher": "ema"}, {"given": models.llama(1)}):
        with pytest.raises(ValueError, match="base_kl_weight needs the teacher 'base', which is"):
            make(tmp_path, **changes)
    with pytest.raises(ValueError, match="base_kl_weight must be at least 0 and finite, got -1"):
        OPSDConfig(output_dir="out", report_to="none", base_kl_weight=-1.0)
    with pytest.raises(ValueError, match="forgetting_dataset must have rows to look up, got a l"):
        make(tmp_path, forgetting=[])
    args = DistillConfig(**models.options(tmp_path, alpha=0.0))
    with pytest.raises(ValueError, match="in runs with a teacher, got none"):
        DistillTrainer(models.llama(), args, models.Pad(), models.rows(), forgetting_dataset=rows())
