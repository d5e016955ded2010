"""Rows of a real text for a real model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

TEXT = (Path(__file__).parents[3] / "LICENSE").read_text()
LENGTHS = (200, 24, 90, 61, 7, 128, 2, 40)  # tokens


def ids(model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]


def rows(model: Path, ignored: int = 1) -> list[dict[str, Any]]:
    """Pieces of the licence in rows of uneven lengths, whose first labels are ignored."""
    known = ids(model)
    made, at = [], 300
    for length in LENGTHS:
        row = known[at : at + length]
        at += length
        labels = [-100] * ignored + row[ignored:]
        made.append({"input_ids": row, "attention_mask": [1] * length, "labels": labels})
    return made
