"""Packed rows: several rows in one sequence, where a token sees those of its own row only.

Transformers tells packed rows by their positions, which begin anew with each row, where a batch has
no attention mask; some attention and state-space kernels by lengths (`cu_seq_lens_q`) or numbers
(`seq_idx`) of rows. `DataCollatorWithFlattening` makes such batches.

Shapes: B sequences, T positions, R rows of all sequences, L tokens of the longest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def may_be_packed(inputs: Mapping[str, Any]) -> bool:
    """Return whether a batch has inputs that tell packed rows; it need not hold several."""
    return any(inputs.get(name) is not None for name in ("position_ids", *BOUNDS))


def row_numbers(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the row of each token, [B, T] int64, counted from 0 through all sequences.

    Without an attention mask a row begins where a position is not the one before it and one more,
    as Transformers has it; with a mask, where positions do not ascend between two tokens.

    Args:
        inputs: of a model's forward, with `input_ids` [B, T].

    Returns:
        None if no sequence holds several rows. To find that out waits for the device, in batches
        that `may_be_packed`.
    """
    ids = inputs.get("input_ids")
    if not may_be_packed(inputs) or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    starts = torch.zeros_like(ids, dtype=torch.bool)
    position, number, ends = (inputs.get(x) for x in ("position_ids", "seq_idx", BOUNDS[0]))
    if isinstance(position, Tensor) and position.shape == ids.shape:
        starts[:, 1:] |= _restarts(position, inputs.get("attention_mask"))
    if isinstance(number, Tensor) and number.shape == ids.shape:
        starts[:, 1:] |= number[:, 1:] != number[:, :-1]
    if isinstance(ends, Tensor) and len(ids) == 1:
        at = ends[(ends > 0) & (ends < ids.shape[1])].long()
        starts[0, at] = True
    if not bool(starts.any()):
        return None
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view(ids.shape) - 1


def _restarts(position: Tensor, mask: Any) -> Tensor:
    step = position[:, 1:] - position[:, :-1]
    if not isinstance(mask, Tensor) or mask.shape != position.shape:
        return step != 1
    real = mask != 0
    return (step <= 0) & real[:, 1:] & real[:, :-1]


def without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of packed rows without an attention mask, beside which they are not told.

    Raises:
        ValueError: the mask leaves something out.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        raise ValueError(
            "packed rows (positions that begin anew inside a sequence) must have no padding, got "
            f"an attention_mask that leaves out {int((mask == 0).sum())} tokens: Transformers "
            "tells packed rows apart only where there is no mask"
        )
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def not_told(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs without those that tell packed rows."""
    shape = inputs["input_ids"].shape
    return {
        name: value
        for name, value in inputs.items()
        if name not in BOUNDS and not (name == "position_ids" and value.shape == shape)
    }


def each_alone(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the row of each token, [B, T] int64, of a packed batch whose sequences are one row.

    It returns None if the batch does not tell packed rows, or has an attention mask.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not may_be_packed(inputs) or mask is not None or not isinstance(ids, Tensor):
        return None
    return torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)


def check_starts(labels: Tensor, rows: Tensor, ignored: int) -> None:
    """Check that no packed row's first token has a label: the row before would predict it.

    Args:
        labels: [B, T].
        rows: [B, T], see `row_numbers`.
        ignored: the label of tokens that are not scored.

    Raises:
        ValueError: one has.
    """
    wrong = (rows[:, 1:] != rows[:, :-1]) & (labels[:, 1:] != ignored)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 1]) + 1
        raise ValueError(
            f"the first token of a packed row must have the label {ignored}, because nothing of "
            f"its row predicts it, got {int(labels[:, 1:][wrong][0])} at position {at} "
            "(separator_id of DataCollatorWithFlattening)"
        )


def columns(rows: Tensor) -> Tensor:
    """Return each token's place in its row, [B, T] int64."""
    flat = rows.flatten()
    lengths = flat.bincount()
    starts = lengths.cumsum(0) - lengths
    return (torch.arange(len(flat), device=rows.device) - starts[flat]).view(rows.shape)


def pad_rows(x: Tensor, rows: Tensor, fill: Any) -> Tensor:
    """Return [R, L, ...] of x [B, T, ...]: the rows one below the other, padded on the right.

    Args:
        x: has a value for each token.
        rows: [B, T], see `row_numbers`.
        fill: of the padding.
    """
    at, column = rows.flatten(), columns(rows).flatten()
    shape = (int(at[-1]) + 1, int(column.max()) + 1, *x.shape[2:])
    padded = x.new_full(shape, fill)
    padded[at, column] = x.flatten(0, 1)
    return padded


def pack_again(padded: Tensor, rows: Tensor) -> Tensor:
    """Return [B, T, ...] of `pad_rows`' [R, L, ...]."""
    return padded[rows, columns(rows)]
