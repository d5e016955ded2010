"""A small cache, and what a live teacher says of the same rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.cache import Manifest, cache_teacher
from hf_distill.cache.codecs import Full
from hf_distill.data import sides
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from tests.hf_distill.trainers import models

ROWS, SHARD_ROWS = 21, 4  # the last shard has one row
EXACT = Full()  # 16 bits: of log-probabilities down to -16, less than 0.008 off


def collator(**changes: Any) -> HintCollator:
    return HintCollator(models.tokenizer(), **{"hint": ()} | changes)


def write(path: Path, model: nn.Module | None = None, **changes: Any) -> Manifest:
    options: dict[str, Any] = {
        "dataset": models.problems(ROWS),
        "codec": EXACT,
        "data_collator": collator(),
        "batch_size": 3,
        "shard_rows": SHARD_ROWS,
    } | changes
    return cache_teacher(model or models.llama(), path=path, **options)


def side(collate: Any, rows: Sequence[Mapping[str, Any]]) -> Side:
    batch = collate(rows)
    return sides.teacher_side(batch, sides.student_side(batch))


def live(model: nn.Module, asked: Side, real_vocab: int) -> Tensor:
    """[N, V] log-probabilities of a model that has no padding in its vocabulary."""
    with torch.no_grad():
        logits = Reader("teacher").signal(model, asked).dense().float()
    logits[:, real_vocab:] = -torch.inf
    return torch.log_softmax(logits, dim=-1)


def contents(path: Path) -> dict[str, bytes]:
    """The shards' bytes, without sidecars, by name."""
    return {p.name: p.read_bytes() for p in sorted(path.glob("shards/*.safetensors"))}
