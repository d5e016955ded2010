"""Which tokens of two sides with different tokenizers stand beside each other.

Shapes: B rows, C scored tokens of the student's longest row, N scored tokens of the student.
Column c of the two index maps is a pair: the position of the student's c-th scored token, and that
of the teacher's token beside it, or -1 where there is none.
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

TEACHER_OWN_TOKENS = "teacher_own_tokens"
"""[B] bool, in batches whose teacher rows are of another tokenizer; what counts is that it is
there."""

RULE = (
    "with tokens of its own for the teacher, both index maps must have one shape, ascend, and pair "
    "each row with a scored token at least once"
)


def has_own_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether the batch's teacher rows are of another tokenizer."""
    return batch.get(TEACHER_OWN_TOKENS) is not None


def paired(batch: Mapping[str, Any]) -> Tensor:
    """[N] bool: which of the student's scored tokens have a teacher's token beside them."""
    return (batch["teacher_completion_index"] >= 0)[batch["completion_index"] >= 0]


def _descends(index: Tensor) -> Tensor:
    """[B, C] positions that are not behind all those before them in their row."""
    before = torch.full_like(index, -1)
    before[:, 1:] = index.cummax(1).values[:, :-1]
    return (index >= 0) & (index <= before)


def broken(index: Tensor, teacher_index: Tensor) -> Tensor:
    """[B, C] bool, True where `RULE` is broken; no synchronisation with a device."""
    if index.shape != teacher_index.shape:
        return torch.ones_like(index, dtype=torch.bool)
    real, beside = index >= 0, teacher_index >= 0
    alone = real & ~beside.any(1, keepdim=True)
    return _descends(index) | _descends(teacher_index) | (beside & ~real) | alone


def runs(positions: list[int]) -> list[list[int]]:
    """Ascending positions, cut where they are not consecutive."""
    found: list[list[int]] = []
    for at in positions:
        if found and found[-1][-1] + 1 == at:
            found[-1].append(at)
        else:
            found.append([at])
    return found


def beside(student: list[int], teacher: list[int]) -> list[int]:
    """The teacher's position beside each of the student's scored tokens of a row, or -1.

    Each reply of the one stands beside the same reply of the other, token by token from its first;
    if the two have not as many replies, all scored tokens are one reply.

    Args:
        student: positions of the student's scored tokens, ascending; a gap ends a reply.
        teacher: those of the teacher's.
    """
    one, other = runs(student), runs(teacher)
    if len(one) != len(other):
        one, other = [student], [teacher]
    return [
        -1 if there is None else there
        for mine, theirs in zip(one, other, strict=True)
        for here, there in zip_longest(mine, theirs)
        if here is not None
    ]
