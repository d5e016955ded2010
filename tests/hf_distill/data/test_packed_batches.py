"""A packing HintCollator: its batches are the padded ones row by row, and are proven aligned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import Hint, HintCollator
from hf_distill.data.alignment import AlignmentError, AlignmentMeter, assert_aligned
from hf_distill.data.packed_batches import by_rows
from hf_distill.data.sides import scored, student_side, teacher_side
from tests.hf_distill.trainers import models

Batch = dict[str, Tensor]
DIALOGUE = {
    "prompt": [{"role": "user", "content": "What is 3 + 5 ?"}],
    "hint": "think first",
    "completion": [
        {"role": "assistant", "content": "8"},
        {"role": "user", "content": "What is 1 + 2 ?"},
        {"role": "assistant", "content": "The answer is 3 ."},
    ],
}
ROWS = {"text": models.problems(5), "dialogues": [*models.problems(3, chat=True), DIALOGUE]}


def collator(packing: bool = True, **changes: Any) -> HintCollator:
    return HintCollator(models.tokenizer(), packing=packing, **changes)


@pytest.mark.parametrize("hint", [None, [], Hint("hint", where="system")])
@pytest.mark.parametrize("kind", ROWS)
def test_by_rows_it_is_the_padded_batch(kind: str, hint: Any) -> None:
    packed, padded = (collator(x, hint=hint)(ROWS[kind]) for x in (True, False))
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert not any("mask" in name for name in packed)
    found = by_rows(packed)
    assert found.keys() - {"position_ids"} == padded.keys()
    for name, value in padded.items():
        same = found[name].shape == value.shape
        if name.endswith("input_ids"):  # whose padding has no meaning
            mask = padded[name.replace("input_ids", "attention_mask")].bool()
            assert same
            assert torch.equal(found[name][mask], value[mask]), name
        else:
            assert same, name
            assert torch.equal(found[name], value), name
    sides = [(student_side(x), teacher_side(x, student_side(x))) for x in (packed, padded)]
    for one, other in zip(*sides, strict=True):
        read = [scored(side.inputs["input_ids"], side.predicts) for side in (one, other)]
        assert torch.equal(*read)


def moved(name: str, at: int, by: int) -> Callable[[Batch], Any]:
    def change(batch: Batch) -> None:
        batch[name][0, at] += by

    return change


def other_token(batch: Batch) -> None:
    at = batch["teacher_completion_index"][0, -1]
    batch["teacher_input_ids"][0, at] += 1


def first_of_a_row(batch: Batch) -> None:
    """Where the second row begins, in place of its first scored token."""
    at = (batch["teacher_position_ids"][0] == 0).nonzero()[1, 0]
    index = batch["teacher_completion_index"]
    row = int((index[0] < at).sum())
    index[0, row] = at


def one_row_less(batch: Batch) -> None:
    """The teacher's last two rows are one."""
    starts = (batch["teacher_position_ids"][0] == 0).nonzero()[:, 0]
    at = batch["teacher_position_ids"][0]
    at[starts[-1] :] += at[starts[-1] - 1] + 1


def swapped_over_rows(batch: Batch) -> None:
    """The boundary between two rows of the teacher stands a token later: same ids, same order."""
    starts = (batch["teacher_position_ids"][0] == 0).nonzero()[:, 0]
    at, end = int(starts[1]), int(starts[2])
    length = end - at
    ids = batch["teacher_input_ids"][0]
    batch["teacher_position_ids"][0, at] = int(batch["teacher_position_ids"][0, at - 1]) + 1
    batch["teacher_position_ids"][0, at + 1 : end] = torch.arange(length - 1)
    index = batch["teacher_completion_index"][0]
    own = (index >= at).nonzero()[0, 0]
    index[own] = at  # the first scored token of the second row is now the first row's last
    ids[at] = batch["input_ids"][0, batch["completion_index"][0, own]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_token, r"must score the same tokens: row 3, completion token 5"),
        (first_of_a_row, r"from 1 on and inside the row .*: row 1 names position 0"),
        (moved("teacher_completion_index", -1, 500), "names position"),
        (one_row_less, "same rows, got 4 for the student and 3 for the teacher"),
        (swapped_over_rows, r"must score the same tokens: row 0"),
        (moved("completion_index", 0, 1), "labels must stand at the positions"),
        (moved("labels", -1, 1), "labels must be the input_ids"),
    ],
)
def test_what_is_not_aligned_is_an_error(change: Callable[[Batch], Any], message: str) -> None:
    batch = collator()(models.problems(4))
    assert_aligned(batch, [models.EOS])
    change(batch)
    with pytest.raises(AlignmentError, match=message):
        assert_aligned(batch, [models.EOS])
    with pytest.raises(AlignmentError, match=message):
        AlignmentMeter([models.EOS]).add(batch)


def test_an_unscored_end_of_a_row_inside_is_an_error() -> None:
    batch = collator()(models.problems(4))
    at = int((batch["position_ids"][0] == 0).nonzero()[1, 0]) - 1
    assert batch["labels"][0, at] == models.EOS
    batch["labels"][0, at] = -100
    batch["teacher_completion_index"] = without(batch["teacher_completion_index"], batch, at)
    batch["completion_index"] = without(batch["completion_index"], batch, at)
    assert_aligned(batch)
    with pytest.raises(AlignmentError, match=r"end token .* must be scored: row 0"):
        assert_aligned(batch, [models.EOS])


def without(index: Tensor, batch: Batch, at: int) -> Tensor:
    """An index map without the scored token that stands at a place of the student's sequence."""
    return index[:, batch["completion_index"][0] != at]
