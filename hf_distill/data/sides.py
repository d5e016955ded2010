"""The two sides of a batch: each model's inputs, and which of its outputs are scored.

Shapes: B rows, T positions, C completion tokens of the longest row, N scored tokens of the batch.
A token at position t is predicted by the model's output at position t - 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from hf_distill.data import packed_rows

IGNORE_INDEX = -100

NO_TOKEN = -1  # padding of an index map

TEACHER_PREFIX = "teacher_"

TEACHER_ROUTE = "teacher_route"

TEACHER_STORED = "teacher_stored"

CONTRAST_PREFIX = "teacher_contrast_"  # of the teacher's second context

CONTRAST_NAMES = ("input_ids", "attention_mask", "completion_index")

UNCONTRASTED = "teacher_uncontrasted"  # [B] bool: rows whose second context is the first

# [B, K] bool, of K > 1 wrong hints: which contexts are the first, and which a row has not
CONTRAST_SAME, CONTRAST_ABSENT = "teacher_contrast_same", "teacher_contrast_absent"

ANCHOR_PREFIX = "anchor_"

INDEX_MAPS = ("completion_index", "teacher_completion_index")

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # [B, T]: which tokens stand for images

TEACHER_INPUTS = ("input_ids", "attention_mask", "position_ids", *TOKEN_TYPES, *packed_rows.BOUNDS)

IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
"""What both sides read of a batch's images, by rows, images or patches."""

TOKEN_VALUES = ("token_weights", "behaviour_log_probs")  # [B, T] float, aligned with the labels


class Side(NamedTuple):
    """Holds one model's part of a batch.

    inputs: keyword arguments of the model's forward.
    predicts: [B, T] bool, True where the output predicts a scored token; N are True.
    route: [B] int64, the number of the teacher that each row asks, or None if there is one teacher.
    stored: what a data loader has read from a teacher's cache for these rows, or None.
    as_logits: whether what is said of it is wanted as logits in any case.
    rows: [B, T] int64, the row of each token where sequences hold several, see `packed_rows`; None
        where each sequence is a row.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor
    route: Tensor | None = None
    stored: Mapping[str, Tensor] | None = None
    as_logits: bool = False
    rows: Tensor | None = None


def predicts_from_labels(labels: Tensor) -> Tensor:
    """Return [B, T] bool: True at the positions whose next token has a label."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return predicts


def predicts_from_index(index: Tensor, num_positions: int) -> Tensor:
    """Return [B, num_positions] bool from an index map [B, C] of the scored tokens' positions."""
    # NO_TOKEN, and positions that no row has, land in a column of their own that is cut off
    at = torch.where((index < 1) | (index >= num_positions), num_positions, index - 1)
    predicts = torch.zeros(index.shape[0], num_positions + 1, dtype=torch.bool, device=index.device)
    return predicts.scatter_(1, at, True)[:, :num_positions]


_PLACES: Any = WeakIdKeyDictionary()  # of masks, with the version that they had


def places(predicts: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns, [N] int64 each, at which a mask [B, T] is True, row by row.

    How many there are is asked once a mask, which waits for its device; an index by the mask itself
    would ask again each time, and in its backward.
    """
    version = -1 if predicts.is_inference() else predicts._version  # a mask that has changed is new
    found = _PLACES.get(predicts)
    if found is None or found[0] != version or version < 0:
        rows, columns = predicts.nonzero().unbind(1)
        found = _PLACES[predicts] = version, (rows, columns)
    return found[1]


def scored(x: Tensor, predicts: Tensor) -> Tensor:
    """Return x[predicts], [N, ...] of x [B, T, ...], by the `places` of the mask [B, T].

    Raises:
        IndexError: x is of other positions.
    """
    if x.shape[:2] != predicts.shape:
        raise IndexError(
            f"a mask of scored positions must be of {list(x.shape[:2])} positions, got "
            f"{list(predicts.shape)}"
        )
    rows, columns = (at.to(x.device) for at in places(predicts))
    return x[rows, columns]


def targets(labels: Tensor, predicts: Tensor) -> Tensor:
    """Return [N]: the scored tokens of labels [B, T], or of values aligned with them, by row.

    Nothing is predicted by the last position.
    """
    rows, columns = (at.to(labels.device) for at in places(predicts))
    return labels[rows, columns + 1]


def student_side(batch: Mapping[str, Any]) -> Side:
    """Return the student's part: no labels, values of them, index maps or rows of others.

    Raises:
        ValueError: labels are missing, not [B, T], or not of the shape of input_ids; or packed rows
            have padding, or a label at the first token of one.
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        got = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(
            f"a batch needs labels of shape [rows, positions], got {got}: take a data collator "
            "that adds them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False) or "
            "HintCollator(tokenizer, [])"
        )
    ids = batch.get("input_ids")
    if ids is not None and ids.shape != labels.shape:
        raise ValueError(
            "labels must have the shape of input_ids, whose next tokens they are (the trainer "
            f"shifts them), got {list(labels.shape)} and {list(ids.shape)}"
        )
    others = ("labels", *INDEX_MAPS, *TOKEN_VALUES)
    inputs = {
        key: value
        for key, value in batch.items()
        if key not in others and not key.startswith((TEACHER_PREFIX, ANCHOR_PREFIX))
    }
    predicts, rows = predicts_from_labels(labels), packed_rows.row_numbers(inputs)
    if rows is None:
        return Side(inputs, predicts)
    packed_rows.check_starts(labels, rows, IGNORE_INDEX)
    return Side(packed_rows.without_mask(inputs), predicts, rows=rows)


def unpacked(side: Side) -> Side:
    """Return the side with packed rows one below the other, padded on the right.

    The scored tokens are the same, in the same order. Positions are those that a model counts.
    """
    rows = packed_rows.each_alone(side.inputs) if side.rows is None else side.rows
    if rows is None:
        return side
    inputs = {
        name: packed_rows.pad_rows(value, rows, 0) if value.shape[:2] == rows.shape else value
        for name, value in packed_rows.not_told(side.inputs).items()
    }
    real = torch.ones_like(rows)
    inputs["attention_mask"] = packed_rows.pad_rows(real, rows, 0)
    predicts = packed_rows.pad_rows(side.predicts, rows, False)
    return side._replace(inputs=inputs, predicts=predicts, rows=None)


def teacher_side(batch: Mapping[str, Any], student: Side) -> Side:
    """Return the teacher's part: its own rows if the batch has them, else the student's.

    Images are the student's in any case, unless the teacher's rows are of another tokenizer.
    """
    ids, route = batch.get("teacher_input_ids"), batch.get(TEACHER_ROUTE)
    stored = batch.get(TEACHER_STORED)
    if ids is None:
        own = route is None and stored is None
        return student if own else student._replace(route=route, stored=stored)
    named = {name: batch.get(f"{TEACHER_PREFIX}{name}") for name in TEACHER_INPUTS}
    if not has_own_tokens(batch):  # the images are the student's
        named |= {name: student.inputs.get(name) for name in IMAGE_INPUTS}
    inputs = {name: value for name, value in named.items() if value is not None}
    predicts = predicts_from_index(batch["teacher_completion_index"], ids.shape[1])
    rows = packed_rows.row_numbers(inputs)
    inputs = inputs if rows is None else packed_rows.without_mask(inputs)
    return Side(inputs, predicts, route, stored, rows=rows)


def contrast_prefix(number: int) -> str:
    """Return what names of the teacher's context with wrong hint `number`, from 0, begin with."""
    return f"{CONTRAST_PREFIX}{number + 1}_" if number else CONTRAST_PREFIX


def contrast_batches(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the batch with each of the teacher's contrasts in place of its own context."""
    kept = {name: x for name, x in batch.items() if not name.startswith(CONTRAST_PREFIX)}
    found: list[Mapping[str, Any]] = []
    while batch.get(f"{contrast_prefix(len(found))}input_ids") is not None:
        prefix, names = contrast_prefix(len(found)), CONTRAST_NAMES
        found.append({**kept, **{f"{TEACHER_PREFIX}{x}": batch.get(f"{prefix}{x}") for x in names}})
    return found


def stacked(sides: Sequence[Side]) -> Side | None:
    """Return sides as one, of all their rows one below the other, padded on the right to one width.

    It returns None if they have other inputs than ids and masks, or are of another kind.
    """
    names = {"input_ids", "attention_mask"}
    if any(set(x.inputs) != names or x.stored is not None for x in sides):
        return None
    width = max(x.predicts.shape[1] for x in sides)

    def all_rows(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in parts])

    first = sides[0]
    route = None if first.route is None else torch.cat([cast(Tensor, x.route) for x in sides])
    inputs = {name: all_rows([x.inputs[name] for x in sides]) for name in first.inputs}
    predicts = all_rows([x.predicts for x in sides])
    return Side(inputs, predicts, route, None, first.as_logits)


TEACHER_OWN_TOKENS = "teacher_own_tokens"
"""[B] bool, in batches whose teacher rows are of another tokenizer. Only that it is there
counts."""


SPANS, SPANS_OF_STUDENT = "teacher_spans", "teacher_spans_of_student"
"""[B, C'] and [B, C] int64, beside the index maps of the teacher and the student: the number of
each token's span in its row, see `data.spans`; -1 for none and for padding."""


def has_own_tokens(batch: Mapping[str, Any]) -> bool:
    """Return whether the batch's teacher rows are of another tokenizer."""
    return batch.get(TEACHER_OWN_TOKENS) is not None


def paired_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return [N] bool: which of the student's scored tokens have a teacher's token beside them."""
    return (batch["teacher_completion_index"] >= 0)[batch["completion_index"] >= 0]


def at_least_one_item(num_items: Tensor | int) -> Tensor | int:
    """Return what sums are divided by: 1 where nothing is summed, which gives 0 and no NaN."""
    if isinstance(num_items, Tensor):
        return torch.where(num_items > 0, num_items, 1)
    return num_items or 1
