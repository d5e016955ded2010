"""Packed rows: which row a token is of, and rows that are taken apart and put together."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from hf_distill.cache import fingerprints
from hf_distill.data import packed_rows, student_side
from hf_distill.data.sides import scored, unpacked
from hf_distill.trainers.tasks import Batch
from tests.hf_distill.trainers import models

ROWS = [{"input_ids": x, "labels": x} for x in ([5, 6, 7], [8], [9, 10], [11, 12, 13, 14])]
NUMBERS = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]


def flat(**changes: Any) -> dict[str, Any]:
    return dict(DataCollatorWithFlattening(**changes)(ROWS))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_ids_start": 2},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
    ],
)
def test_rows_are_numbered(changes: dict[str, Any]) -> None:
    batch = flat(**changes)
    numbers = packed_rows.row_numbers(batch)
    assert numbers is not None
    assert numbers.tolist() == [NUMBERS]
    if "position_ids" in batch:
        found = find_packed_sequence_indices(batch["position_ids"])
        assert found is not None
        assert torch.equal(found, numbers)


def test_several_sequences_count_on() -> None:
    position = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "position_ids": position}
    numbers = packed_rows.row_numbers(batch)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 1, 1], [2, 2, 2, 3]]


def positions(*given: list[int]) -> dict[str, Tensor]:
    at = torch.tensor(given)
    return {"input_ids": torch.ones_like(at), "position_ids": at}


def test_rows_that_are_not_packed_have_no_numbers() -> None:
    assert packed_rows.row_numbers(positions([0, 1, 2, 3])) is None
    left = {"attention_mask": torch.tensor([[0, 0, 1, 1]])}
    assert packed_rows.row_numbers(positions([1, 1, 0, 1]) | left) is None
    ones = {"attention_mask": torch.ones(1, 4, dtype=torch.long)}
    # with a mask Transformers looks for no rows, and positions may leave some out
    assert packed_rows.row_numbers(positions([0, 1, 40, 41]) | ones) is None
    assert packed_rows.row_numbers(positions([0, 1, 0, 1]) | ones) is not None


def test_padding_and_labels_of_first_tokens_are_errors() -> None:
    batch = flat() | {"attention_mask": torch.tensor([[1] * 9 + [0]])}
    with pytest.raises(ValueError, match=r"packed rows .* leaves out 1 tokens"):
        student_side(batch)
    whole = student_side(flat() | {"attention_mask": torch.ones(1, 10, dtype=torch.long)})
    assert "attention_mask" not in whole.inputs
    with pytest.raises(ValueError, match=r"label -100, .* got 7 at position 3"):
        student_side(flat(separator_id=7))


@pytest.mark.parametrize("changes", [{}, {"return_flash_attn_kwargs": True}])
def test_unpacked_rows_are_the_padded_ones(changes: dict[str, Any]) -> None:
    packed, given = (
        student_side(flat(**changes)),
        [row | {"attention_mask": [1] * len(row["labels"])} for row in ROWS],
    )
    padded = student_side(models.Pad()(given))
    found = unpacked(packed)
    assert found.inputs.keys() == padded.inputs.keys()
    assert all(torch.equal(found.inputs[name], x) for name, x in padded.inputs.items())
    assert torch.equal(found.predicts, padded.predicts)
    ids = (x.inputs["input_ids"] for x in (packed, found))
    assert (
        len(
            {
                tuple(scored(x, y).tolist())
                for x, y in zip(ids, (packed.predicts, found.predicts), strict=True)
            }
        )
        == 1
    )
    known = [
        [(x.ids, x.positions.tolist()) for x in fingerprints.side_rows(side)]
        for side in (packed, padded)
    ]
    assert known[0] == known[1]
    assert packed.rows is not None
    again = packed_rows.pack_again(found.inputs["input_ids"], packed.rows)
    assert torch.equal(again, packed.inputs["input_ids"])


def test_rows_that_fill_a_batch_of_an_evaluation_do_not_count() -> None:
    side = student_side(flat())
    batch = Batch({}, side, side, num_rows=3)
    counted = batch.counted_tokens
    assert counted is not None
    assert counted.tolist() == [True] * 3 + [False] * 3
    labels = batch.counted_labels(flat()["labels"])
    assert (labels == -100).tolist() == [[True, False, False, True, True, False] + [True] * 4]
