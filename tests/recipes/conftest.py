"""A model and a data set small enough to run recipes on."""

import json
from pathlib import Path

import pytest
import word_problems


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small untrained model with a chat template, as a folder."""
    tokenizer = word_problems.build_tokenizer()
    word_problems.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"Tom has {i} apples . how many apples ?",
            "answer": f"<<{i}={i}>>{i}\n#### {i}",
        }
        for i in range(2, 40)
    ]
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows[:30]), ("test", rows[30:])):
        lines = "\n".join(map(json.dumps, part))
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    return tmp_path / "data"
