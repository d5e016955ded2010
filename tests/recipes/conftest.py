"""A model and a data set small enough to run recipes on."""

import json
from pathlib import Path

import pytest

from helpers import word_problems


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with a chat template, as a folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = word_problems.build_tokenizer()
    word_problems.build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows with GSM8K's columns, 30 to learn from and 8 held out."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [
        {
            "question": f"Tom has {i} apples . how many apples ?",
            "answer": f"<<{i}={i}>>{i}\n#### {i}",
        }
        for i in range(2, 40)
    ]
    for split, part in (("train", rows[:30]), ("test", rows[30:])):
        lines = "\n".join(map(json.dumps, part))
        (folder / f"{split}.jsonl").write_text(lines)
    return folder
