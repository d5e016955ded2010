"""Rows by name, and collators by the columns."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_distill.cache.datasets import MessagesCollator, TokenCollator, default_collator, load_data
from hf_distill.data.hint_collator import HintCollator
from tests.hf_distill.trainers import models


def test_rows_from_files_and_folders(tmp_path: Path) -> None:
    rows = models.problems(3)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "several")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/test.jsonl").write_text(lines.read_text())
    for name, split in (("rows.jsonl", "train"), ("one", "train"), ("several", "test")):
        assert load_data(str(tmp_path / name), split).to_list() == rows
    assert load_data(str(tmp_path / "files"), "test").to_list() == rows
    for name, split, message in (
        ("rows.jsonl", "test", "a file is the split 'train', got 'test'"),
        ("one", "test", "is one split, 'train', got 'test'"),
        ("several", "train", r"split must be one of \['test'\], got 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(str(tmp_path / name), split)
    with pytest.raises(ValueError, match="has no subsets, got 'main'"):
        load_data(str(lines), subset="main")


def test_token_rows() -> None:
    made = TokenCollator(9)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
            {"input_ids": [4], "labels": None},
        ]
    )
    assert made["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert made["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    with pytest.raises(ValueError, match="labels must have 2 values, one per id, got 1"):
        TokenCollator()([{"input_ids": [1, 2], "labels": [1]}])


def test_a_collator_by_the_columns() -> None:
    tokenizer = models.tokenizer()
    tokens = default_collator(models.rows(1), tokenizer)
    assert isinstance(tokens, TokenCollator)
    assert tokens.pad_token_id == models.PAD
    pairs = default_collator(models.problems(1), tokenizer)
    assert isinstance(pairs, HintCollator)
    assert pairs.hints == ()
    hinted = default_collator(models.problems(1), tokenizer, "hint")
    assert isinstance(hinted, HintCollator)
    assert [hint.text for hint in hinted.hints] == ["hint"]


def test_messages_are_a_prompt_and_what_follows() -> None:
    said = [("system", "be brief"), ("user", "What"), ("assistant", "no"), ("user", "is")]
    messages = [{"role": role, "content": text} for role, text in [*said, ("assistant", "yes")]]
    tokenizer = models.tokenizer()
    given = {"messages": messages, "hint": "think first"}
    made = default_collator([given], tokenizer, "hint")
    assert isinstance(made, MessagesCollator)
    row = {"prompt": messages[:2], "completion": messages[2:], "hint": "think first"}
    expected = HintCollator(tokenizer, "hint")([row])
    batch = made([given])
    for name, values in expected.items():
        assert (batch[name] == values).all(), name
    scored = batch["labels"][batch["labels"] >= 0].tolist()
    assert tokenizer.decode(scored) == "no <|im_end|> yes <|im_end|>"


@pytest.mark.parametrize("roles", [["user"], ["assistant", "user", "assistant"], ["assistant"]])
def test_messages_without_prompt_or_reply(roles: list[str]) -> None:
    row = {"messages": [{"role": role, "content": "no"} for role in roles]}
    with pytest.raises(ValueError, match="messages must have a reply behind a prompt, got roles"):
        default_collator([row], models.tokenizer())([row])


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"text": "no"}, {}, r"rows must have columns .* got \['text'\]"),
        (models.problems(1)[0], {"tokenizer": None}, "need a tokenizer"),
        (models.rows(1)[0], {"hint": "hint"}, "a hint needs text or messages"),
    ],
)
def test_rows_without_a_collator(row: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_collator([row], **{"tokenizer": models.tokenizer()} | arguments)
