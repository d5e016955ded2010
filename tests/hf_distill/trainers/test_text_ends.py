"""The trainers tell the collators where the student's replies end, and sampling ends there too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    cache_teacher,
)
from hf_distill.teachers import ModelTeacher
from tests.hf_distill.data.templates import TEMPLATES, characters, family
from tests.hf_distill.trainers import models


def rows(count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"a{i}"}],
            "completion": [{"role": "assistant", "content": f"b{i}"}],
            "hint": f"h{i}",
        }
        for i in range(count)
    ]


def student(size: int, ends: list[int], seed: int = 0) -> nn.Module:
    model: Any = models.llama(seed, vocab_size=size)
    model.generation_config.eos_token_id = ends
    return model


def seen(trainer: Any) -> list[dict[str, Any]]:
    """The batches of a run."""
    found, compute_loss = [], trainer.compute_loss

    def look(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = look
    trainer.train()
    return found


def replies(batch: dict[str, Any]) -> list[list[int]]:
    return [row[row != -100].tolist() for row in batch["labels"]]


@pytest.mark.parametrize("kind", ["distill", "no teacher", "around", "dropped hints", "opsd"])
def test_the_model_says_which_plain_word_ends_a_reply(tmp_path: Path, kind: str) -> None:
    tokenizer = characters(TEMPLATES["chatml"][0], words=["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = student(len(tokenizer), [2, end])

    class Around:
        columns = ("prompt", "completion", "hint")

        def __init__(self, collator: Any) -> None:
            self.collator = collator

        def __call__(self, rows: Any) -> Any:
            return self.collator(rows)

    options = models.options(tmp_path, max_steps=1, remove_unused_columns=False)
    collator: Any = HintCollator(tokenizer, hint_dropout=0.5 * (kind == "dropped hints"))
    if kind == "opsd":
        trainer: Any = OPSDTrainer(
            model, OPSDConfig(**options, on_policy=False), collator, rows(),
            processing_class=tokenizer,
        )  # fmt: skip
    else:
        teacher = None if kind == "no teacher" else student(len(tokenizer), [2], 1)
        config = DistillConfig(**options, alpha=0.0 if teacher is None else 0.5)
        collator = Around(collator) if kind == "around" else collator
        trainer = DistillTrainer(model, config, collator, rows(), teacher=teacher)
    # without a teacher the model's forward would be given the index maps
    batch = trainer.data_collator(rows()) if kind == "no teacher" else seen(trainer)[0]
    assert all(reply[-1] == end and reply.count(end) == 1 for reply in replies(batch))


@pytest.mark.parametrize("engine", ["generate", "continuous"])
@pytest.mark.parametrize("name", ["chatml", "phi3"])
def test_sampled_replies_end_with_the_templates_turn(
    tmp_path: Path, name: str, engine: str
) -> None:
    tokenizer, end = family(name)
    model: Any = student(len(tokenizer), [2])  # a base model: it does not know of turns
    with torch.no_grad():
        model.lm_head.weight[end] *= 2.0  # so that some replies end early
    options = models.options(tmp_path, max_steps=1, max_completion_length=24)
    config = OPSDConfig(**options, rollout={"engine": engine})
    trainer = OPSDTrainer(
        model, config, HintCollator(tokenizer), rows(), processing_class=tokenizer
    )
    sampled = replies(seen(trainer)[0])
    assert any(reply[-1] == end for reply in sampled)
    assert all(end not in reply[:-1] for reply in sampled)
    assert trainer.state.log_history[0]["completion_ended"] > 0


def test_the_datas_replies_beside_sampled_ones_end_like_them(tmp_path: Path) -> None:
    tokenizer = characters(TEMPLATES["chatml"][0], words=["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    options = models.options(tmp_path, max_steps=1, max_completion_length=4, anchor_weight=0.1)
    trainer = OPSDTrainer(
        student(len(tokenizer), [2, end]), OPSDConfig(**options), HintCollator(tokenizer), rows(),
        processing_class=tokenizer,
    )  # fmt: skip
    labels = seen(trainer)[0]["anchor_labels"]
    assert [row[row != -100].tolist()[-1] for row in labels] == [end] * len(labels)


def test_begun_replies_are_sampled_behind_their_beginning(tmp_path: Path) -> None:
    tokenizer, end = family("chatml")
    data = rows()
    for row in data:
        row["prompt"] = [*row["prompt"], {"role": "assistant", "content": "it is"}]
    model = student(len(tokenizer), [2, end])
    options = models.options(tmp_path, max_steps=1, max_completion_length=4)
    config = OPSDConfig(**options, anchor_weight=0.1)
    trainer = OPSDTrainer(
        model, config, HintCollator(tokenizer), data, data, processing_class=tokenizer
    )
    batch = seen(trainer)[0]
    for row in range(len(data)):
        scored = int((batch["labels"][row] != -100).nonzero()[0])
        for ids, start in (("input_ids", scored), ("anchor_input_ids", None)):
            start = start or int((batch["anchor_labels"][row] != -100).nonzero()[0])
            assert tokenizer.decode(batch[ids][row, :start]).endswith("assistant\nit is")
    assert "eval_loss" in trainer.evaluate()


def test_a_cache_is_written_with_the_ends_of_the_training(tmp_path: Path) -> None:
    tokenizer = characters(TEMPLATES["chatml"][0], words=["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    teacher = student(len(tokenizer), [2, end], 1)
    collator = HintCollator(tokenizer)
    cache_teacher(ModelTeacher(teacher), rows(), tmp_path / "cache", data_collator=collator)
    options = models.options(tmp_path, max_steps=1, remove_unused_columns=False)
    trainer = DistillTrainer(
        student(len(tokenizer), [2, end]),
        DistillConfig(**options, temperature=1.0),
        collator,
        rows(),
        teacher=CachedTeacher(tmp_path / "cache"),
    )
    assert all(reply[-1] == end for reply in replies(seen(trainer)[0]))


@pytest.mark.parametrize("kind", ["distill", "no teacher", "opsd", "on-policy"])
@pytest.mark.parametrize("way", [None, "tokenizer", "model", "collator"])
def test_no_end_token_anywhere_is_told_once(
    tmp_path: Path, kind: str, way: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = characters(TEMPLATES["chatml"][0].replace("<|im_end|>", "."))
    if way != "tokenizer":
        tokenizer.eos_token = None
    model: Any = models.llama(vocab_size=len(tokenizer), eos_token_id=None)
    if way == "model":
        model.generation_config.eos_token_id = 2
    collator = HintCollator(tokenizer)
    if way == "collator":
        collator = collator.with_end_tokens(2)
    options = models.options(tmp_path, max_steps=1, remove_unused_columns=False)
    made: Any = {"processing_class": tokenizer}
    if kind in ("opsd", "on-policy"):
        config = OPSDConfig(**options, on_policy=kind == "on-policy", max_completion_length=4)
        trainer: Any = OPSDTrainer(model, config, collator, rows(), **made)
        ends = trainer.hint_collator.ends.ids
    else:
        teacher = None if kind == "no teacher" else student(len(tokenizer), [2], 1)
        config = DistillConfig(**options, alpha=0.0 if teacher is None else 0.5)
        trainer = DistillTrainer(model, config, collator, rows(), teacher=teacher, **made)
        ends = trainer.data_collator.ends.ids
    assert ends == (() if way is None else (2,))
    told = [x for x in caplog.messages if "no end token" in x]
    assert len(told) == 1
    assert told[0].startswith("no end token is known" if way is None else "the chat template ends")
