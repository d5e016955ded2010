"""The check before training: quiet where both sides agree, and what it says of each fault."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import Hint, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.preflight import EmptyHintError
from tests.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

FOUND = "without a hint student and teacher are"


def trainer(folder: Path, model: nn.Module, collator: Any = None, **changes: Any) -> OPSDTrainer:
    settings = {"max_completion_length": 4, "max_steps": 1} | changes
    tokenizer = models.tokenizer()
    return OPSDTrainer(
        model,
        OPSDConfig(**models.options(folder, **settings)),
        collator or HintCollator(tokenizer, Hint(where="system")),
        models.problems(chat=True),
        processing_class=tokenizer,
    )


def log(caplog: pytest.LogCaptureFixture, opsd: OPSDTrainer) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        opsd.train()
    return "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("hf_distill"))


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.gemma2, models.phi])
def test_sides_that_agree_are_quiet(tmp_path, caplog, make, teacher):
    text = log(caplog, trainer(tmp_path, make(), teacher=teacher))
    assert float(text.split(f"{FOUND} ")[1].split(" nats")[0]) < 1e-9
    assert not any(word in text for word in ("adapter:", "dropout:", "padding"))


def fill_adapter(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(value)


def test_a_new_adapter_is_quiet(tmp_path, caplog):
    model = models.lora(models.llama())
    fill_adapter(model, 0.0)
    text = log(caplog, trainer(tmp_path, model))
    assert FOUND in text
    assert "adapter:" not in text


def test_an_adapter_trained_before_is_named(tmp_path, caplog):
    model = models.lora(models.llama())
    fill_adapter(model, 0.1)
    assert "adapter: without a hint" in log(caplog, trainer(tmp_path, model))
    assert "adapter: without a hint" in log(caplog, trainer(tmp_path, model, teacher="lora_scale"))
    assert "adapter: without" not in log(caplog, trainer(tmp_path, model, teacher="live"))


def test_dropout_is_named(tmp_path, caplog):
    assert "dropout: in training" in log(
        caplog, trainer(tmp_path, models.llama(attention_dropout=0.5))
    )


def test_a_teacher_with_other_weights_is_an_error(tmp_path):
    opsd = trainer(tmp_path, models.llama())
    with torch.no_grad():
        opsd.teacher._copy.lm_head.weight.mul_(1.05)
    with pytest.raises(EmptyHintError, match=r"teacher: without a hint .* nats apart \(limit"):
        opsd.train()


def test_a_dead_teacher_is_an_error(tmp_path):
    opsd = trainer(tmp_path, models.llama())
    with torch.no_grad():
        opsd.teacher._copy.lm_head.weight.zero_()  # uniform
    with pytest.raises(EmptyHintError, match="teacher: without a hint"):
        opsd.train()


class OtherTemplate(HintCollator):
    """Its teacher has a system message even where there is no hint."""

    def _contexts(self, row: Any, hinted: bool = True) -> Any:
        made = super()._contexts(row, hinted)
        greeting = self.tokenizer("<|im_start|> system You are brief . <|im_end|>")["input_ids"]
        return made._replace(teacher=made.teacher._replace(ids=[*greeting, *made.teacher.ids]))


def test_another_template_is_an_error(tmp_path):
    opsd = trainer(tmp_path, models.llama(), OtherTemplate(models.tokenizer()))
    with pytest.raises(EmptyHintError, match=r"template: .* and token 1 is the first to differ"):
        opsd.train()


class Deaf(nn.Module):
    """Stands in for a decoder that counts positions from the padding on, and attends to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        kwargs |= {"attention_mask": None, "position_ids": None}
        return self.inner(input_ids=input_ids, **kwargs)


def test_padding_that_reaches_the_logits_is_an_error(tmp_path):
    model = models.llama()
    model.model = Deaf(model.model)
    opsd = trainer(tmp_path, model, on_policy=False)
    with pytest.raises(EmptyHintError, match="padding or position ids: rows padded on the left"):
        opsd.train()


def test_a_resumed_run_is_not_checked(tmp_path, caplog):
    opsd = trainer(tmp_path, models.llama(), max_steps=2, save_strategy="steps", save_steps=1)
    assert FOUND in log(caplog, opsd)
    resumed = trainer(tmp_path, models.llama(), max_steps=3)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert FOUND not in caplog.text


def test_another_model_as_the_teacher_is_not_checked(tmp_path, caplog):
    opsd = trainer(tmp_path, models.llama())
    other = OPSDTrainer(
        models.llama(),
        opsd.args,
        opsd.hint_collator,
        models.problems(chat=True),
        processing_class=models.tokenizer(),
        teacher=models.llama(1),
    )
    assert "no check without hints: the teacher is another model" in log(caplog, other)


@pytest.mark.parametrize("teacher", ["base", "ema"])
def test_a_second_train_goes_on_without_a_check(tmp_path, caplog, teacher):
    opsd = trainer(tmp_path, models.llama(), teacher=teacher, learning_rate=0.05)
    assert FOUND in log(caplog, opsd)
    assert FOUND not in log(caplog, opsd)


def test_16_bit_products_are_no_fault(tmp_path, caplog):
    """Also where evaluation has wrapped the model's forward, whose logits are then float32.

    A difference as bfloat16 makes it is planted.
    """
    opsd = trainer(tmp_path, models.llama(), bf16=True)
    opsd.evaluate(models.problems(2, chat=True))
    with torch.no_grad():
        opsd.teacher._copy.lm_head.weight.mul_(1.003)
    assert FOUND in log(caplog, opsd)


class Rows(torch.utils.data.IterableDataset):
    """Has a length, and a __getitem__ that only raises."""

    def __len__(self) -> int:
        return 8

    def __iter__(self):
        return iter(models.problems(8, chat=True))


def test_a_dataset_without_rows_to_look_up_is_not_checked(tmp_path, caplog):
    opsd = trainer(tmp_path, models.llama())
    opsd.train_dataset = Rows()
    assert "no check without hints: the dataset has no rows to look up" in log(caplog, opsd)
