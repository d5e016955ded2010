"""The check before training: quiet where both sides agree, and what it says of each fault."""

import contextlib
import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import Hint, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.batches import TokenRow
from hf_distill.data.teacher_view import TeacherView
from hf_distill.monitoring.preflight import EmptyHintError, find_lost_context
from hf_distill.teachers import initial_adapters
from hf_distill.teachers.held_values import HeldValues
from tests.hf_distill.trainers import models

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
    assert not any(word in text for word in ("adapter:", "dropout:", "padding", "context:"))


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


def test_tokens_far_behind_the_context_are_compared(tmp_path):
    """The teacher reads one word otherwise, which stands at the end of completions only."""
    opsd = trainer(tmp_path, models.llama(), on_policy=False)
    opsd.train_dataset = [row | {"completion": "3 + 4 , no yes so"} for row in opsd.train_dataset]
    (word,) = models.tokenizer()("yes")["input_ids"]
    with torch.no_grad():
        opsd.teacher._copy.model.embed_tokens.weight[word] += 1.0
    with pytest.raises(EmptyHintError, match=r"teacher: without a hint"):
        opsd.train()


def test_a_dead_teacher_is_an_error(tmp_path):
    opsd = trainer(tmp_path, models.llama())
    with torch.no_grad():
        opsd.teacher._copy.lm_head.weight.zero_()  # uniform
    with pytest.raises(EmptyHintError, match="teacher: without a hint"):
        opsd.train()


class OtherContext(HintCollator):
    """Its teacher's rows are changed."""

    def changed(self, teacher: TokenRow) -> TokenRow:
        raise NotImplementedError

    def _fit(self, prompt: Any, student: TokenRow, hints: Any, teacher: Any) -> Any:
        return super()._fit(prompt, student, hints, lambda hints: self.changed(teacher(hints)))


def without(row: TokenRow, start: int, count: int) -> TokenRow:
    """The row without some tokens of a context."""
    return TokenRow(
        [*row.ids[:start], *row.ids[start + count :]],
        [at if at < start else at - count for at in row.scored],
    )


class Greets(OtherContext):
    """A system message even where there is no hint."""

    def changed(self, teacher: TokenRow) -> TokenRow:
        greeting = self.tokenizer("<|im_start|> system You are brief . <|im_end|>")["input_ids"]
        return TokenRow([*greeting, *teacher.ids], [at + len(greeting) for at in teacher.scored])


class NoGenerationPrompt(OtherContext):
    def changed(self, teacher: TokenRow) -> TokenRow:
        return without(teacher, teacher.scored[0] - 2, 2)


class TwoBeginnings(OtherContext):
    def changed(self, teacher: TokenRow) -> TokenRow:
        return TokenRow([teacher.ids[0], *teacher.ids], [at + 1 for at in teacher.scored])


class Thinks(HintCollator):
    """Other template kwargs for the teacher."""

    def _fit(self, prompt: Any, student: TokenRow, hints: Any, teacher: Any) -> Any:
        def other(hints: Any) -> TokenRow:
            kept = self.chat_template_kwargs, self.view
            self.chat_template_kwargs, self.view = {"think": True}, TeacherView({"think": True})
            try:
                return teacher(hints)
            finally:
                self.chat_template_kwargs, self.view = kept

        return super()._fit(prompt, student, hints, other)


class SecondTurn(OtherContext):
    """Right up to the first reply; a token behind it is lost."""

    def changed(self, teacher: TokenRow) -> TokenRow:
        starts = [b for a, b in pairwise(teacher.scored) if b != a + 1]
        return without(teacher, starts[0] - 3, 1) if starts else teacher


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Greets, "token 1 is the first to differ"),
        (NoGenerationPrompt, r"first to differ: \[3, 7, \d+\]"),  # <|im_start|> assistant
        (TwoBeginnings, r"first to differ: \[6, \d+, \d+\] and \[3, 6, \d+\]"),
        (Thinks, r"first to differ: .* and \[30, "),  # think
    ],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_another_template_is_an_error(tmp_path, kind, where, on_policy):
    opsd = trainer(tmp_path, models.llama(), kind(models.tokenizer()), on_policy=on_policy)
    if not on_policy and kind is not Thinks:  # text is all that can stand behind other kwargs
        opsd.train_dataset = [dialogue() for _ in range(4)]
    with pytest.raises(EmptyHintError, match=rf"template: without a hint row 0 .* {where}"):
        opsd.train()


def dialogue() -> dict[str, Any]:
    """Two replies; the hint stands before the second, which alone is scored in training."""
    said = ("What is 1 + 2 ?", "3", "Sum of 1 and 4 ?", "The answer is 5 .")
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, said, strict=True)
    ]
    return {"prompt": turns[:1], "completion": turns[1:], "hint": "Hint : 5"}


def test_every_reply_of_the_data_is_compared(tmp_path, caplog):
    for kind in (HintCollator, SecondTurn):
        collator = kind(models.tokenizer(), Hint(turn=2), scored="hinted")
        opsd = trainer(tmp_path, models.llama(), collator, on_policy=False)
        opsd.train_dataset = [dialogue() for _ in range(4)]
        if kind is HintCollator:
            assert FOUND in log(caplog, opsd)
            continue
        with pytest.raises(EmptyHintError, match="template: without a hint row 0"):
            opsd.train()


@pytest.mark.parametrize("teacher", ["base", "ema"])
def test_an_adapter_that_is_not_off_is_an_error(tmp_path, monkeypatch, teacher):
    """Also one that was not trained: then student and teacher agree all the same."""
    model = models.lora(models.llama())
    fill_adapter(model, 0.0)
    opsd = trainer(tmp_path, model, teacher=teacher)
    monkeypatch.setattr(initial_adapters, "adapters_off", contextlib.nullcontext)
    monkeypatch.setattr(HeldValues, "inside", contextlib.nullcontext)
    with pytest.raises(EmptyHintError, match="adapter: the teacher must not change with the stud"):
        opsd.train()


def test_the_check_leaves_weights_and_random_state(tmp_path):
    opsd = trainer(tmp_path, models.lora(models.llama()), teacher="ema")
    weights, state = models.weights(opsd.model), torch.get_rng_state()
    opsd._check_empty_hint()
    assert models.difference(weights, models.weights(opsd.model)) == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in opsd.model.parameters()].count(True) > 0


BY_ITSELF = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|> system You are brief . <|im_end|> ' }}{% endif %}" + models.TEMPLATE
)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(("where", "is_lost"), [("system", True), ("user", False)])
def test_a_system_message_that_a_hint_replaces_is_named(
    tmp_path, caplog, where, is_lost, on_policy
):
    tokenizer = models.tokenizer()
    tokenizer.chat_template = BY_ITSELF
    collator = HintCollator(tokenizer, Hint(where=where))
    opsd = trainer(tmp_path, models.llama(), collator, on_policy=on_policy)
    if not on_policy:
        opsd.train_dataset = [dialogue() for _ in range(4)]
    opsd.args.max_steps = 2
    text = log(caplog, opsd)
    assert FOUND in text
    assert text.count("context: the teacher must read what the student reads, and the") == is_lost
    lost = (
        r"row 0 of the batch has '[^']*You are brief[^']*' for the student, and '[^']+' in its pl"
    )
    assert (re.search(lost, text) is not None) == is_lost


class Pieces:
    """A tokenizer whose pieces can end in the middle of a word."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_lost_context_is_told_by_its_text():
    words = Pieces("Sum", " of 3", "?", "?\n\nHint", " 4", "<end>", "Be", " brief")
    kept = ([0, 1, 2, 5], [0, 1, 3, 4, 2, 5], [0, 1, 3, 4, 5], [6, 7, 0, 1, 2, 5])
    for teacher in kept:
        assert find_lost_context([0, 1, 2, 5], teacher, words) is None
    assert find_lost_context([6, 7, 0, 5], [3, 4, 0, 5], words) == ("Be brief", "?\n\nHint 4")
    assert find_lost_context([0, 1, 2, 5], [1, 2, 5], words) == ("Sum", "")
    assert find_lost_context([0, 1, 2, 5], [0, 2, 1, 5], words) == ("?", "")


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
def test_a_second_train_is_checked_like_the_first(tmp_path, caplog, teacher):
    """Its teacher begins at the present weights."""
    opsd = trainer(tmp_path, models.llama(), teacher=teacher, learning_rate=0.05)
    for _ in range(2):
        assert f"{FOUND} 0.0e+00 nats" in log(caplog, opsd)


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
