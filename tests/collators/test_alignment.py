"""Index maps, labels and padding on rows written by hand."""

import pytest
import torch

from hf_distill import alignment
from hf_distill.alignment import AlignmentError, build_batch

PROMPTS, TEACHER_PROMPTS = [[5, 6], [7]], [[5, 6, 40, 41], [7, 42]]
COMPLETIONS = [[8, 2], [9, 10, 11]]


def test_a_batch_token_by_token() -> None:
    batch = build_batch(PROMPTS, TEACHER_PROMPTS, COMPLETIONS, pad_token_id=0)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 8, 2], [7, 9, 10, 11]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "labels": [[-100, -100, 8, 2], [-100, 9, 10, 11]],
        "completion_index": [[2, 3, -1], [1, 2, 3]],
        "teacher_input_ids": [[5, 6, 40, 41, 8, 2], [7, 42, 9, 10, 11, 0]],
        "teacher_attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
        "teacher_completion_index": [[4, 5, -1], [2, 3, 4]],
    }


def test_an_end_token_is_scored_and_padding_with_its_id_is_not() -> None:
    batch = build_batch([[5], [5]], [[5], [5, 6]], [[2], [8, 9, 2]], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [5, 8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 8, 9, 2]]


def test_both_sides_predict_the_same_tokens() -> None:
    batch = build_batch(PROMPTS, TEACHER_PROMPTS, COMPLETIONS, pad_token_id=0)
    student = alignment.student_side(batch)
    teacher = alignment.teacher_side(batch, student)
    assert set(student.inputs) == set(teacher.inputs) == {"input_ids", "attention_mask"}
    assert student.predicts.tolist() == [[False, True, True, False], [True, True, True, False]]
    assert teacher.predicts.nonzero().tolist() == [[0, 3], [0, 4], [1, 1], [1, 2], [1, 3]]
    scored = [8, 2, 9, 10, 11]
    assert alignment.targets(batch["labels"], student.predicts).tolist() == scored
    for side in (student, teacher):
        following = side.inputs["input_ids"].roll(-1, dims=1)
        assert following[side.predicts].tolist() == scored


def test_without_rows_of_its_own_the_teacher_reads_the_students() -> None:
    labels = torch.tensor([[-100, 4, -100, 5]])
    ids = torch.tensor([[3, 4, 4, 5]])
    side = alignment.student_side({"input_ids": ids, "labels": labels})
    assert alignment.teacher_side({"labels": labels}, side) is side
    assert side.predicts.tolist() == [[True, False, True, False]]
    assert alignment.targets(labels, side.predicts).tolist() == [4, 5]


def test_the_first_token_of_a_row_is_never_scored() -> None:
    labels = torch.tensor([[4, 5], [6, -100]])
    predicts = alignment.predicts_from_labels(labels)
    assert predicts.tolist() == [[True, False], [False, False]]
    assert alignment.targets(labels, predicts).tolist() == [5]


def test_an_index_map_with_gaps() -> None:
    index = torch.tensor([[1, 4, -1], [3, -1, -1]])
    found = alignment.predicts_from_index(index, 5)
    assert found.nonzero().tolist() == [[0, 0], [0, 3], [1, 2]]


def test_other_ids_are_an_error() -> None:
    batch = build_batch(PROMPTS, TEACHER_PROMPTS, COMPLETIONS, pad_token_id=0)
    batch["teacher_input_ids"][1, 3] = 33
    with pytest.raises(
        AlignmentError,
        match=r"row 1, completion token 1 is id 10 for the student, 33 for the teacher",
    ):
        alignment.assert_same_tokens(batch)


def test_another_number_of_tokens_in_a_row_is_an_error() -> None:
    batch = build_batch(PROMPTS, TEACHER_PROMPTS, COMPLETIONS, pad_token_id=0)
    batch["teacher_completion_index"][0, 1] = -1
    with pytest.raises(
        AlignmentError, match=r"row 0, completion token 1 is id 2 for the student, -1 for the tea"
    ):
        alignment.assert_same_tokens(batch)


def test_maps_of_other_shapes_are_an_error() -> None:
    batch = build_batch(PROMPTS, TEACHER_PROMPTS, COMPLETIONS, pad_token_id=0)
    batch["teacher_completion_index"] = batch["teacher_completion_index"][:, :2]
    with pytest.raises(AlignmentError, match=r"index maps of shapes \(2, 3\) and \(2, 2\)"):
        alignment.assert_same_tokens(batch)


@pytest.mark.parametrize(
    ("batch", "got"),
    [({}, "none"), ({"labels": torch.zeros(3)}, r"shape \(3,\)")],
)
def test_labels_must_be_rows_of_positions(batch: dict, got: str) -> None:
    with pytest.raises(ValueError, match=rf"labels of shape \[rows, positions\], got {got}"):
        alignment.student_side(batch)


def test_padding_and_back() -> None:
    rows = [[3, 4, 5], [], [6]]
    mask = alignment.pad([[1] * len(row) for row in rows], 0, side="left")
    left = alignment.pad(rows, 9, side="left")
    assert left.tolist() == [[3, 4, 5], [9, 9, 9], [9, 9, 6]]
    assert alignment.unpad(left, mask) == rows
    assert alignment.pad(rows, 9).tolist() == [[3, 4, 5], [9, 9, 9], [6, 9, 9]]
    assert alignment.pad([], 9).shape == (0, 0)
