"""Which positions of which row are scored: the same tokens on the student's and teacher's side.

Shapes: B rows, T positions, C completion tokens of the longest row, N scored tokens of the batch.
A token at position t is predicted by the model's output at position t - 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
NO_TOKEN = -1  # padding of an index map

TEACHER_PREFIX = "teacher_"
ANCHOR_PREFIX = "anchor_"
INDEX_MAPS = ("completion_index", "teacher_completion_index")
TOKEN_VALUES = ("token_weights", "behaviour_log_probs")  # [B, T] float, aligned with the labels


class AlignmentError(ValueError):
    """Student and teacher rows do not hold the same completion tokens where their maps say."""


class Side(NamedTuple):
    """One model's part of a batch.

    inputs: keyword arguments of the model's forward.
    predicts: [B, T] bool, True where the output predicts a scored token; N are True.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor


def predicts_from_labels(labels: Tensor) -> Tensor:
    """[B, T] bool: True at the positions whose next token has a label."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return predicts


def predicts_from_index(index: Tensor, num_positions: int) -> Tensor:
    """[B, num_positions] bool from an index map [B, C] of the positions of scored tokens."""
    # NO_TOKEN lands in a column of its own that is cut off
    at = torch.where(index == NO_TOKEN, num_positions, index - 1)
    predicts = torch.zeros(index.shape[0], num_positions + 1, dtype=torch.bool, device=index.device)
    return predicts.scatter_(1, at, True)[:, :num_positions]


def targets(labels: Tensor, predicts: Tensor) -> Tensor:
    """[N]: the scored tokens of labels [B, T], or of values aligned with them, row by row."""
    return labels[:, 1:][predicts[:, :-1]]


def student_side(batch: Mapping[str, Any]) -> Side:
    """The student's part: what is not labels, values of them, index maps or rows of others.

    Raises:
        ValueError: labels are missing or not [B, T].
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        got = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"a batch needs labels of shape [rows, positions], got {got}")
    others = ("labels", *INDEX_MAPS, *TOKEN_VALUES)
    inputs = {
        key: value
        for key, value in batch.items()
        if key not in others and not key.startswith((TEACHER_PREFIX, ANCHOR_PREFIX))
    }
    return Side(inputs, predicts_from_labels(labels))


def teacher_side(batch: Mapping[str, Any], student: Side) -> Side:
    """The teacher's part: its own rows if the batch has them, else the student's."""
    ids = batch.get("teacher_input_ids")
    if ids is None:
        return student
    inputs = {"input_ids": ids, "attention_mask": batch["teacher_attention_mask"]}
    return Side(inputs, predicts_from_index(batch["teacher_completion_index"], ids.shape[1]))


def assert_same_tokens(batch: Mapping[str, Tensor]) -> None:
    """Check that both index maps of a batch name the same token ids, in number and identity.

    Raises:
        AlignmentError: naming the first row and token that differ.
    """
    pairs = (("input_ids", "completion_index"), ("teacher_input_ids", "teacher_completion_index"))
    gathered = []
    for ids, index in pairs:
        tokens = batch[ids].gather(1, batch[index].clamp_min(0))
        gathered.append(tokens.masked_fill(batch[index] == NO_TOKEN, NO_TOKEN))
    student, teacher = gathered
    if student.shape == teacher.shape and torch.equal(student, teacher):
        return
    if student.shape != teacher.shape:
        raise AlignmentError(
            "student and teacher must score the same tokens, got index maps of shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    row, token = (student != teacher).nonzero()[0].tolist()
    raise AlignmentError(
        f"student and teacher must score the same tokens: row {row}, completion token {token} is "
        f"id {student[row, token].item()} for the student, {teacher[row, token].item()} for the "
        f"teacher ({NO_TOKEN}: no token)"
    )


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """[B, T] int64 from rows of different lengths."""
    width = max(map(len, rows), default=0)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [
        [*row, *gap] if side == "right" else [*gap, *row]
        for row, gap in zip(rows, fill, strict=True)
    ]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), width)


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a padded batch [B, T], without the positions where mask is 0."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


class Rendered(NamedTuple):
    """A row of token ids, and the positions of those that are scored, in order."""

    ids: Sequence[int]
    scored: Sequence[int]


def completed(context: Sequence[int], completion: Sequence[int]) -> Rendered:
    """A context with its completion behind it, which is scored."""
    start = len(context)
    return Rendered([*context, *completion], range(start, start + len(completion)))


def _rows(rows: Sequence[Rendered], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, completion_index), padded on the right."""
    mask = pad([[1] * len(row.ids) for row in rows], 0)
    index = pad([row.scored for row in rows], NO_TOKEN)
    return pad([row.ids for row in rows], pad_token_id), mask, index


def build_batch(
    prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """A training batch from token ids, with the same completions behind both contexts.

    Args:
        prompts: B lists of the student's context ids.
        teacher_prompts: B lists of the teacher's context ids.
        completions: B lists of ids, at least one token each. Every id is scored, so that an end
            token in it is learnt; padding is told from it by position, never by its id.
        pad_token_id: id of the padding on the right.

    Returns:
        input_ids, attention_mask, labels [B, T]; teacher_input_ids, teacher_attention_mask
        [B, T of the teacher]; completion_index, teacher_completion_index [B, C]: positions of the
        completion tokens in their row, padded with -1.
    """
    student, teacher = (
        [completed(a, b) for a, b in zip(contexts, completions, strict=True)]
        for contexts in (prompts, teacher_prompts)
    )
    return build_rows(student, teacher, pad_token_id)


def build_rows(
    student: Sequence[Rendered], teacher: Sequence[Rendered], pad_token_id: int
) -> dict[str, Tensor]:
    """`build_batch` from whole rows, whose scored tokens may lie anywhere but at the first place.

    Raises:
        AlignmentError: the scored tokens of a row are not the same ids on both sides.
    """
    ids, mask, index = _rows(student, pad_token_id)
    teacher_ids, teacher_mask, teacher_index = _rows(teacher, pad_token_id)
    scored = torch.zeros_like(mask, dtype=torch.bool)
    scored[:, 1:] = predicts_from_index(index, ids.shape[1])[:, :-1]
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(~scored, IGNORE_INDEX),
        "completion_index": index,
        "teacher_input_ids": teacher_ids,
        "teacher_attention_mask": teacher_mask,
        "teacher_completion_index": teacher_index,
    }
    assert_same_tokens(batch)
    return batch
