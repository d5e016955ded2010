"""A small part of a batch, on which a model can be looked at before the first step.

Shapes: B rows, T positions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.data.packed_rows import not_told, row_numbers

PROBE_TOKENS = 8  # of a row


class ProbeRow(NamedTuple):
    """Holds what a probe gives to a model.

    inputs: with `input_ids`. is_cut: whether they are one row of at most PROBE_TOKENS real tokens;
    otherwise they are the whole batch, which has an input (images, say) that no row can be told of.
    """

    inputs: dict[str, Any]
    is_cut: bool

    @property
    def ids(self) -> Tensor:
        """Return the ids, [1, n] or [B, T]."""
        return self.inputs["input_ids"]


def _part(value: Any, rows: slice, columns: Any, shape: torch.Size) -> Any:
    """Return an input of some rows at some positions; None if it cannot be told which part."""
    if isinstance(value, Tensor) and value.ndim > 0:
        if value.shape[:2] == shape:
            return value[rows, columns]
        return value[rows] if value.shape == shape[:1] else None
    if isinstance(value, list | tuple):
        return list(value[rows]) if len(value) == shape[0] else None
    return value


def rows_of(
    inputs: Mapping[str, Any], rows: slice, columns: Any = slice(None)
) -> dict[str, Any] | None:
    """Return some rows of a batch, with what its other inputs have for them.

    Args:
        inputs: with `input_ids` [B, T]. Others are [B, T, ...] or [B], a list of B, or no tensor.
        rows: which.
        columns: the positions that are kept, all by default.

    Returns:
        None if an input is none of rows or tokens: of images, say, rows can have any number.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    given = {name: value for name, value in inputs.items() if value is not None}
    parts = {name: _part(value, rows, columns, ids.shape) for name, value in given.items()}
    return None if any(part is None for part in parts.values()) else parts


def _longest_packed(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a batch of the longest of packed rows alone, at the model's own positions."""
    of_row = rows == rows.flatten().bincount().argmax()
    return {
        name: value[of_row][None]
        if isinstance(value, Tensor) and value.shape[:2] == rows.shape
        else value
        for name, value in not_told(inputs).items()
    }


def probe_row(inputs: Mapping[str, Any]) -> ProbeRow | None:
    """Return the first tokens of the longest row, with the batch's other inputs of that row.

    Padding is left out, wherever it stands; of packed rows one stands alone. Where an input is none
    of rows or tokens the batch stays whole, because the model would not understand a part of it.

    Returns:
        None if the batch has no `input_ids`.
    """
    packed = row_numbers(inputs)
    if packed is not None:
        inputs = _longest_packed(inputs, packed)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        return None
    if ids.ndim != 2:
        return ProbeRow(dict(inputs), is_cut=False)
    real = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        real = mask.bool()
    row = int(real.sum(1).argmax())
    columns = real[row].nonzero()[:PROBE_TOKENS, 0]
    if not len(columns):  # all is padding, which is as good as any tokens
        columns = torch.arange(ids.shape[1], device=ids.device)[:PROBE_TOKENS]
    part = rows_of(inputs, slice(row, row + 1), columns)
    return ProbeRow(dict(inputs) if part is None else part, is_cut=part is not None)
