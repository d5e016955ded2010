"""Rows of supervised training in the student's own forward, beside those it is distilled on.

They share one forward: it is one pass over the weights, and a model in DistributedDataParallel that
runs twice before one backward gets gradients that are wrong, and differ between the processes,
when its layers are checkpointed with use_reentrant=True (measured with torch 2.13; no error).

Shapes: B and T of the student's rows, A and S of the anchor's, N and M scored tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.data.sides import ANCHOR_PREFIX, Side, predicts_from_labels

KEYS = tuple(ANCHOR_PREFIX + name for name in ("input_ids", "attention_mask", "labels", "count"))


def has_anchor(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch carries anchor rows.

    Raises:
        ValueError: it has some of their keys only, or their shapes differ.
    """
    found = [key for key in KEYS if key in batch]
    if found and len(found) < len(KEYS):
        missing = [key for key in KEYS if key not in batch]
        raise ValueError(f"a batch with {found[0]} needs {', '.join(missing)} too")
    shapes = [tuple(batch[key].shape) for key in found[:3]]
    if len(set(shapes)) > 1:
        raise ValueError(f"{', '.join(KEYS[:3])} must have one shape, got {shapes}")
    return bool(found)


def join_anchor_rows(student: Side, batch: Mapping[str, Any]) -> Side:
    """Put the anchor's rows below the student's side, padded on the right to one width.

    The N scored tokens of the student's rows come first, then the M of the anchor's.

    Raises:
        ValueError: the student's rows have inputs that the anchor's have not.
    """
    odd = sorted(student.inputs.keys() - {"input_ids", "attention_mask"})
    if odd or "input_ids" not in student.inputs:
        raise ValueError(
            "anchor rows have input_ids and attention_mask only, so the student's rows must too; "
            f"got {sorted(student.inputs)}"
        )
    ids, anchor_ids = student.inputs["input_ids"], batch["anchor_input_ids"]
    mask = student.inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    predicts = predicts_from_labels(batch["anchor_labels"])
    pairs = (
        (ids, anchor_ids),
        (mask, batch["anchor_attention_mask"].to(mask.dtype)),
        (student.predicts, predicts),
    )
    ids, mask, predicts = (_stacked(*pair) for pair in pairs)
    return Side({"input_ids": ids, "attention_mask": mask}, predicts)


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Stack [B, T] on [A, S] to [B + A, max(T, S)]; zeros fill the right."""
    width = max(one.shape[1], other.shape[1])
    return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in (one, other)])
