"""Batches of token ids: padding, and rows whose scored tokens stand behind two contexts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.data.alignment import assert_aligned
from hf_distill.data.sides import (
    CONTRAST_NAMES,
    CONTRAST_PREFIX,
    IGNORE_INDEX,
    INDEX_MAPS,
    NO_TOKEN,
    TEACHER_PREFIX,
    contrast_prefix,
    predicts_from_index,
)


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Pad rows of different lengths to [B, T] int64."""
    width = max(map(len, rows), default=0)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [
        [*row, *gap] if side == "right" else [*gap, *row]
        for row, gap in zip(rows, fill, strict=True)
    ]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), width)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, [B, T] int64 each, padded on the left for generation."""
    ones = [[1] * len(row) for row in rows]
    return pad(rows, pad_token_id, side="left"), pad(ones, 0, side="left")


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the rows of a padded batch [B, T] without the positions where mask is 0."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


class TokenRow(NamedTuple):
    """Holds a row of token ids, and the positions of those that are scored, in order."""

    ids: Sequence[int]
    scored: Sequence[int]


def append_completion(context: Sequence[int], completion: Sequence[int]) -> TokenRow:
    """Put a completion, which is scored, behind its context."""
    start = len(context)
    return TokenRow([*context, *completion], range(start, start + len(completion)))


def _rows(rows: Sequence[TokenRow], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input_ids, attention_mask, completion_index), padded on the right."""
    mask = pad([[1] * len(row.ids) for row in rows], 0)
    index = pad([row.scored for row in rows], NO_TOKEN)
    return pad([row.ids for row in rows], pad_token_id), mask, index


def build_batch(
    prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Build a training batch from token ids, with the same completions behind both contexts.

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
        [append_completion(a, b) for a, b in zip(contexts, completions, strict=True)]
        for contexts in (prompts, teacher_prompts)
    )
    return build_rows(student, teacher, pad_token_id)


def build_rows(
    student: Sequence[TokenRow], teacher: Sequence[TokenRow] | None, pad_token_id: int
) -> dict[str, Tensor]:
    """Do `build_batch` from whole rows, whose scored tokens may lie anywhere but at the start.

    Without rows of the teacher's own the batch has no `teacher_` keys: it reads the student's.

    Raises:
        AlignmentError: the scored tokens of a row are not the same ids on both sides.
    """
    ids, mask, index = _rows(student, pad_token_id)
    scored = torch.zeros_like(mask, dtype=torch.bool)
    scored[:, 1:] = predicts_from_index(index, ids.shape[1])[:, :-1]
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(~scored, IGNORE_INDEX),
        "completion_index": index,
    }
    if teacher is None:
        return batch
    ids, mask, index = _rows(teacher, pad_token_id)
    batch |= {
        "teacher_input_ids": ids,
        "teacher_attention_mask": mask,
        "teacher_completion_index": index,
    }
    assert_aligned(batch)
    return batch


def _sequence(rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and positions [1, T], and where the scored tokens stand [1, N]; int64."""
    ids = torch.tensor([[token for row in rows for token in row.ids]], dtype=torch.long)
    position = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
    starts = torch.tensor([len(row.ids) for row in rows]).cumsum(0).tolist()
    starts = [0, *starts[:-1]]
    scored = [at + start for row, start in zip(rows, starts, strict=True) for at in row.scored]
    return ids, position, torch.tensor([scored], dtype=torch.long)


def pack_rows(student: Sequence[TokenRow], teacher: Sequence[TokenRow] | None) -> dict[str, Tensor]:
    """Do as `build_rows`, with the rows of each side behind each other in one sequence.

    Returns:
        input_ids, position_ids, labels [1, T]; teacher_input_ids, teacher_position_ids [1, T'];
        completion_index, teacher_completion_index [1, N]: places of the scored tokens in the
        sequence. There is no attention mask. T are the tokens of all student rows, T' those of the
        teacher's, N the scored ones.

    Raises:
        AlignmentError: the scored tokens of a row are not the same ids on both sides.
    """
    ids, position, index = _sequence(student)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, index[0]] = ids[0, index[0]]
    batch = {"input_ids": ids, "position_ids": position, "labels": labels}
    batch[INDEX_MAPS[0]] = index
    if teacher is None:
        return batch
    names = (f"{TEACHER_PREFIX}input_ids", f"{TEACHER_PREFIX}position_ids", INDEX_MAPS[1])
    batch |= dict(zip(names, _sequence(teacher), strict=True))
    assert_aligned(batch)
    return batch


def build_contrast(
    batch: Mapping[str, Tensor], rows: Sequence[TokenRow], pad_token_id: int, number: int = 0
) -> dict[str, Tensor]:
    """Return the keys of the teacher's contrast `number`, whose rows score the batch's tokens.

    Raises:
        AlignmentError: the scored tokens of a row are not the batch's.
    """
    ids, mask, index = _rows(rows, pad_token_id)
    pairs = list(zip(CONTRAST_NAMES, (ids, mask, index), strict=True))
    assert_aligned({**batch, **{f"{CONTRAST_PREFIX}{name}": value for name, value in pairs}})
    return {f"{contrast_prefix(number)}{name}": value for name, value in pairs}
