"""Batches of packed rows, whose two sides are compared row by row; see `packed_rows`.

Shapes: B sequences, T positions, R rows of all sequences, C scored tokens of the longest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_distill.data import packed_rows
from hf_distill.data.sides import (
    IGNORE_INDEX,
    INDEX_MAPS,
    NO_TOKEN,
    TEACHER_INPUTS,
    TEACHER_PREFIX,
)


def told_rows(batch: Mapping[str, Any], prefix: str = "") -> Tensor | None:
    """Return the row of each token of one side, [B, T] int64, or None if it has no packed rows."""
    named = {name: batch.get(f"{prefix}{name}") for name in TEACHER_INPUTS}
    return packed_rows.row_numbers(named)


def _index_by_rows(index: Tensor, rows: Tensor) -> Tensor:
    """Return [R, C] places in their rows of places [B, N] in the sequences, padded with NO_TOKEN.

    Places that a sequence has not stay as they are, in its first row.
    """
    sequence, column = (index != NO_TOKEN).nonzero().unbind(1)
    at = index[sequence, column]
    inside = (at >= 0) & (at < rows.shape[1])
    safe = at.clamp(0, rows.shape[1] - 1)
    row = torch.where(inside, rows[sequence, safe], rows[sequence, 0])
    place = torch.where(inside, packed_rows.columns(rows)[sequence, safe], at)
    order = row.argsort(stable=True)
    row, place, count = row[order], place[order], int(rows.max()) + 1
    counts = row.bincount(minlength=count)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    found = index.new_full((count, int(counts.max())), NO_TOKEN)
    found[row, column] = place
    return found


def by_rows(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with the packed rows of each side one below the other, padded on the right.

    Token ids, labels, masks and index maps are those of the padded batch; what else it holds stays.
    Batches without packed rows are returned as they are.
    """
    found = dict(batch)
    for prefix, index in (("", INDEX_MAPS[0]), (TEACHER_PREFIX, INDEX_MAPS[1])):
        rows = told_rows(batch, prefix)
        if rows is None:
            continue
        fills = {f"{prefix}input_ids": 0} | ({} if prefix else {"labels": IGNORE_INDEX})
        for name, fill in fills.items():
            found[name] = packed_rows.pad_rows(batch[name], rows, fill)
        mask = batch.get(f"{prefix}attention_mask")
        mask = torch.ones_like(rows) if mask is None else mask
        found[f"{prefix}attention_mask"] = packed_rows.pad_rows(mask, rows, 0)
        found.pop(f"{prefix}position_ids", None)
        if batch.get(index) is not None:
            found[index] = _index_by_rows(batch[index], rows)
    return found
