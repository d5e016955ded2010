"""The hard loss of causal LMs is that of plain Trainer, whoever defines it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from hf_distill.losses import hard_loss
from hf_distill.trainers.tasks import make_hard_loss
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

TOLERANCE = 2e-6  # of weights after steps of 1e-3; measured: at most 3e-7
BUG_FACTOR = 100


def focal(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """(1 - q)² weighs the cross-entropy of the next token."""
    log_q = logits.float().log_softmax(-1)[:, :-1]
    targets, counted = labels[:, 1:].clamp_min(0)[..., None], labels[:, 1:] != -100
    picked = log_q.gather(-1, targets)[..., 0]
    loss = -((1 - picked.exp()) ** 2 * picked)[counted].sum()
    return loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class WithPenalty(LlamaForCausalLM):
    """Its forward adds the square of the logits' log-sum, and counts as it is told."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        out = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None:
            kept = out.logits[:, :-1].logsumexp(-1)[labels[:, 1:] != -100]
            count = kwargs.get("num_items_in_batch") or len(kept)
            out.loss = out.loss + 0.05 * (kept**2).sum() / count
        return out


class MeanOnly(LlamaForCausalLM):
    """Its forward ignores how many tokens the step has."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        kwargs.pop("num_items_in_batch", None)
        out = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        out.loss = None if labels is None else out.loss * 3
        return out


class NoCount(LlamaForCausalLM):
    """Its forward takes no count."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **_: Any
    ) -> Any:
        out = super().forward(input_ids, attention_mask, labels=labels)
        out.loss = None if labels is None else out.loss * 3
        return out

    accepts_loss_kwargs = False


class Chosen(LlamaForCausalLM):
    """Its class chooses the loss."""

    loss_function = property(lambda self: focal)  # pyright: ignore[reportAssignmentType]


def of_class(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = models.llama()
        model.__class__ = kind
        return model

    return make


def on_the_instance() -> nn.Module:
    model = models.llama()
    model.loss_function = focal
    return model


OWN = {
    "instance": on_the_instance,
    "class": of_class(Chosen),
    "penalty": of_class(WithPenalty),
    "no count": of_class(NoCount),
    "mean only": of_class(MeanOnly),
}


def double(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * ForCausalLMLoss(outputs.logits, labels, models.VOCAB, num_items_in_batch)


# (student, kind of trainer, settings, arguments)
PATHS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "hidden": (models.llama, DistillTrainer, {}, {}),
    "logits": (models.llama, ReadsLogits, {}, {}),
    "smoothing": (models.llama, DistillTrainer, {"label_smoothing_factor": 0.3}, {}),
    "function": (models.llama, DistillTrainer, {}, {"compute_loss_func": double}),
} | {name: (make, DistillTrainer, {}, {}) for name, make in OWN.items()}


def shifted(by: int) -> Callable[[list[Any]], dict[str, Tensor]]:
    """A collator that moves labels against their tokens: a missing shift is 1, a double one -1."""

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        batch = models.Pad()(rows)
        return batch | {"labels": batch["labels"].roll(by, 1)}

    return collate


def distil(
    folder: Path, student: Any, kind: Any = DistillTrainer, extra: Any = None, **changes: Any
) -> DistillTrainer:
    collator = changes.pop("collator", models.Pad())
    args = DistillConfig(**models.options(folder, **{"alpha": 0.0} | changes))
    rows, teacher = models.rows(), models.llama(1)
    trainer = kind(student, args, collator, rows, teacher=teacher, **extra or {})
    trainer.train()
    return trainer


@pytest.mark.parametrize("path", PATHS)
def test_alpha_zero_is_trainer_on_every_path(tmp_path: Path, path: str) -> None:
    """Loss and weights; labels that are not shifted, or twice, would show."""
    make, kind, settings, extra = PATHS[path]
    args = TrainingArguments(**models.options(tmp_path, **settings))
    plain = Trainer(make(), args, models.Pad(), models.rows(), **extra)
    plain.train()
    found = distil(tmp_path, make(), kind, extra, **settings)
    for log, want in zip(models.steps(found), models.steps(plain), strict=True):
        assert log["loss"] == pytest.approx(want["loss"], rel=2e-6)
        assert log["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-5)
    want = models.weights(plain.model)
    assert models.difference(want, models.weights(found.model)) <= TOLERANCE
    for by in (1, -1):
        wrong = distil(tmp_path, make(), kind, extra, collator=shifted(by), **settings)
        assert models.difference(want, models.weights(wrong.model)) > BUG_FACTOR * TOLERANCE


@pytest.mark.parametrize("own", OWN)
def test_accumulation_does_not_change_an_own_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    def run(rows: int, steps: int) -> dict[str, Tensor]:
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        return models.weights(distil(tmp_path, OWN[own](), alpha=0.3, **settings).model)

    one, many = run(8, 1), run(2, 4)
    assert models.difference(one, many) <= TOLERANCE
    original = hard_loss.HardLoss.of

    def local(self: Any, outputs: Any, labels: Tensor, num_items: Any) -> Any:
        return original(self, outputs, labels, None) / 4

    monkeypatch.setattr(hard_loss.HardLoss, "of", local)
    assert models.difference(one, run(2, 4)) > BUG_FACTOR * TOLERANCE


@pytest.mark.parametrize("own", OWN)
def test_an_own_loss_is_mixed_with_the_soft_one_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: str
) -> None:
    plain = distil(tmp_path, OWN[own](), max_steps=1).state.log_history[0]
    log = distil(tmp_path, OWN[own](), max_steps=1, alpha=0.4).state.log_history[0]
    assert log["loss"] == pytest.approx(0.4 * log["soft"] + 0.6 * plain["loss"], rel=1e-5)
    assert abs(plain["loss"] - plain["hard"]) > 1e-3  # hard is logged as cross-entropy
    reason = "its loss_function is focal" if own in ("instance", "class") else "where the cross-ent"
    said = "student: the hard loss is the model's own, which takes logits: "
    assert caplog.text.count(said) == 2
    assert caplog.text.count(reason) == 2


@pytest.mark.parametrize("family", models.FAMILIES)
def test_plain_models_keep_the_fused_path(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = models.FAMILIES[family]
    args = DistillConfig(**models.options(tmp_path, max_steps=2))
    trainer = DistillTrainer(make(), args, models.Pad(), models.rows(), teacher=make(1))
    heads: list[Any] = []
    at_head = trainer._reader.at_head
    monkeypatch.setattr(trainer._reader, "at_head", lambda *x: (heads.append(x), at_head(*x))[1])
    trainer.train()
    assert len(heads) == 2
    assert not trainer.task.hard_loss.replaces
    assert "the model's own" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_plain_models_in_bfloat16_keep_it_too(tmp_path: Path, family: str) -> None:
    args = DistillConfig(**models.options(tmp_path, max_steps=1))
    student, teacher = (models.FAMILIES[family](seed).bfloat16() for seed in (0, 1))
    trainer = DistillTrainer(student, args, models.Pad(), models.rows(), teacher=teacher)
    trainer.train()
    assert not trainer.task.hard_loss.replaces


def test_lora_students_are_looked_into(tmp_path: Path) -> None:
    for make, found in ((models.llama, False), (on_the_instance, True)):
        trainer = distil(tmp_path, models.lora(make()), max_steps=1)
        assert trainer.task.hard_loss.replaces == found


@pytest.mark.parametrize("own", OWN)
def test_at_alpha_one_there_is_no_hard_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: str
) -> None:
    trainer = distil(tmp_path, OWN[own](), alpha=1.0, max_steps=1)
    assert not trainer.task.hard_loss.replaces
    assert "the model's own" not in caplog.text


def test_what_the_user_gives_comes_first(tmp_path: Path) -> None:
    """As in Trainer: label smoothing and compute_loss_func do not ask the model."""
    for settings, extra in (
        ({"label_smoothing_factor": 0.3}, {}),
        ({}, {"compute_loss_func": double}),
    ):
        plain = distil(tmp_path, models.llama(), extra=extra, **settings)
        own = distil(tmp_path, on_the_instance(), extra=extra, **settings)
        assert models.difference(models.weights(plain.model), models.weights(own.model)) == 0.0


def test_a_registered_loss_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSS_MAPPING, "focal", focal)

    def make() -> nn.Module:
        model = models.llama()
        model.loss_type = "focal"
        return model

    found = distil(tmp_path, make(), max_steps=1)
    expected = distil(tmp_path, on_the_instance(), max_steps=1)
    assert found.task.hard_loss.replaces
    assert found.state.log_history[0]["loss"] == expected.state.log_history[0]["loss"]


@pytest.mark.parametrize("own", ["instance", "penalty"])
def test_evaluation_reads_it_too(tmp_path: Path, own: str) -> None:
    trainer = distil(tmp_path, OWN[own](), max_steps=1, learning_rate=0.0)
    rows = models.rows(4)
    with_outputs = trainer.predict(rows).metrics["test_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(with_outputs, rel=1e-6)
    assert with_outputs == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("own", ["instance", "penalty"])
def test_what_an_own_loss_cannot_be_combined_with(tmp_path: Path, own: str) -> None:
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        batch = models.Pad()(rows)
        return batch | {"token_weights": torch.ones_like(batch["labels"]).float()}

    message = "weights of tokens reach neither label smoothing nor compute_loss_func nor a model's"
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, OWN[own](), collator=collate, remove_unused_columns=False, max_steps=1)
    settings = {"alpha": 0.5, "anchor_weight": 0.1, "max_completion_length": 8}
    config = OPSDConfig(**models.options(tmp_path, **settings))
    tokenizer, data = models.tokenizer(), models.problems()
    with pytest.raises(ValueError, match=r"anchor_weight 0.1 > 0 is a plain cross-entropy"):
        OPSDTrainer(OWN[own](), config, None, data, processing_class=tokenizer).train()


def test_a_micro_batch_without_labels(tmp_path: Path) -> None:
    """A mean over no tokens is no number; it has no share of the step."""

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        batch = models.Pad()(rows)
        if rows[0]["input_ids"] == models.rows()[0]["input_ids"]:
            batch["labels"].fill_(-100)
        return batch

    settings = {"collator": collate, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = distil(tmp_path, OWN["mean only"](), alpha=0.3, **settings)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_two_tokens_are_enough_to_look(tmp_path: Path) -> None:
    trainer = distil(tmp_path, OWN["penalty"](), max_steps=1)
    look = make_hard_loss(trainer._run, lambda: (None, None), accepts_count=True)
    short = torch.tensor([[5]])
    look.look(trainer.model, {"input_ids": short})
    assert not look.replaces  # nothing can be said of one token; the next batch is asked
    look.look(trainer.model, {"input_ids": torch.tensor([[5, 7]])})
    assert look.replaces


def test_a_row_that_has_tokens_is_looked_at(tmp_path: Path) -> None:
    rows, pad = models.rows(), models.Pad()
    args = DistillConfig(**models.options(tmp_path, alpha=0.5, watchdog={"action": "off"}))
    short = {"input_ids": [5], "attention_mask": [1], "labels": [-100]}
    trainer = DistillTrainer(OWN["penalty"](), args, pad, rows, teacher=models.llama(1))
    trainer.compute_loss(trainer.model, pad([short]))
    assert not trainer.task.hard_loss.replaces
    trainer.compute_loss(trainer.model, pad([short, rows[0]]))
    assert trainer.task.hard_loss.replaces


def bart(seed: int = 0) -> nn.Module:
    """A decoder whose own loss compares the logits of a position with its own label."""
    torch.manual_seed(seed)
    sizes = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
    }
    config = BartConfig(**models.BASE, **sizes, max_position_embeddings=64, dropout=0.0)
    return BartForCausalLM(config)


def test_labels_that_are_not_shifted_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(**models.options(tmp_path))
    plain = Trainer(bart(), args, models.Pad(), models.rows())
    plain.train()
    found = distil(tmp_path, bart())
    # one step's batches have as many labels as its rows have on this side of the shift
    assert "its labels are not shifted: it compares the logits of each position" in caplog.text
    for log, want in zip(models.steps(found), models.steps(plain), strict=True):
        assert log["loss"] == pytest.approx(want["loss"], rel=2e-6)
    caplog.clear()
    distil(tmp_path, bart(), alpha=1.0)
    assert "not shifted" not in caplog.text
