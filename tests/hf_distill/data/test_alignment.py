"""Index maps, labels and padding on rows written by hand."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill.data import alignment, batches, sides
from hf_distill.data.alignment import AlignmentError, AlignmentMeter
from hf_distill.data.batches import TokenRow, build_batch

PROMPTS, TEACHER_PROMPTS = [[5, 6], [7]], [[5, 6, 40, 41], [7, 42]]
COMPLETIONS = [[8, 2], [9, 10, 11]]
TEACHERS = ("teacher_attention_mask", "teacher_completion_index")


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
    student = sides.student_side(batch)
    teacher = sides.teacher_side(batch, student)
    assert set(student.inputs) == set(teacher.inputs) == {"input_ids", "attention_mask"}
    assert student.predicts.tolist() == [[False, True, True, False], [True, True, True, False]]
    assert teacher.predicts.nonzero().tolist() == [[0, 3], [0, 4], [1, 1], [1, 2], [1, 3]]
    scored = [8, 2, 9, 10, 11]
    assert sides.targets(batch["labels"], student.predicts).tolist() == scored
    for side in (student, teacher):
        following = side.inputs["input_ids"].roll(-1, dims=1)
        assert following[side.predicts].tolist() == scored


def test_without_rows_of_its_own_the_teacher_reads_the_students() -> None:
    labels = torch.tensor([[-100, 4, -100, 5]])
    ids = torch.tensor([[3, 4, 4, 5]])
    side = sides.student_side({"input_ids": ids, "labels": labels})
    assert sides.teacher_side({"labels": labels}, side) is side
    assert side.predicts.tolist() == [[True, False, True, False]]
    assert sides.targets(labels, side.predicts).tolist() == [4, 5]


def test_the_first_token_of_a_row_is_never_scored() -> None:
    labels = torch.tensor([[4, 5], [6, -100]])
    predicts = sides.predicts_from_labels(labels)
    assert predicts.tolist() == [[True, False], [False, False]]
    assert sides.targets(labels, predicts).tolist() == [5]


def test_an_index_map_with_gaps() -> None:
    index = torch.tensor([[1, 4, -1], [3, -1, -1]])
    found = sides.predicts_from_index(index, 5)
    assert found.nonzero().tolist() == [[0, 0], [0, 3], [1, 2]]


def made() -> dict[str, Tensor]:
    return build_batch(PROMPTS, TEACHER_PROMPTS, COMPLETIONS, pad_token_id=0)


def other_id(batch: dict[str, Tensor]) -> None:
    batch["teacher_input_ids"][1, 3] = 33


def one_token_less(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"][0, 1] = -1


def a_shorter_map(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"] = batch["teacher_completion_index"][:, :2]


def first_position(batch: dict[str, Tensor]) -> None:
    batch["completion_index"][1, 0] = 0


def behind_the_row(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"][0, 1] = 6


def far_before_the_row(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"][0, 1] = -7


def another_label(batch: dict[str, Tensor]) -> None:
    batch["labels"][1, 2] = 33


def a_label_outside_the_map(batch: dict[str, Tensor]) -> None:
    batch["labels"][0, 1] = 6


def a_label_missing(batch: dict[str, Tensor]) -> None:
    batch["labels"][1, 3] = -100


def shifted_on_both_sides(batch: dict[str, Tensor]) -> None:
    """The ids still agree, for rows whose contexts end alike; the labels are other tokens."""
    for name in sides.INDEX_MAPS:
        batch[name][0, :2] -= 1
    batch["teacher_input_ids"][0, 3] = batch["input_ids"][0, 1]


def scored_padding(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"][1, 3] = 0


def predicted_by_padding(batch: dict[str, Tensor]) -> None:
    batch["teacher_attention_mask"][1, 1] = 0


def no_map(batch: dict[str, Tensor]) -> None:
    del batch["completion_index"]
    one_token_less(batch)


BROKEN = [
    (other_id, "row 1, completion token 1 is id 10 for the student, 33 for the teacher"),
    (one_token_less, "row 0, completion token 1 is id 2 for the student, -1 for the teacher"),
    (a_shorter_map, "row 1, completion token 2 is id 11 for the student, -1 for the teacher"),
    (no_map, "row 0, completion token 1 is id 2 for the student, -1 for the teacher"),
    (first_position, r"completion_index must .* \(nothing predicts .* row 1 names position 0 of 4"),
    (behind_the_row, "teacher_completion_index must .* row 0 names position 6 of 6"),
    (far_before_the_row, "teacher_completion_index must .* row 0 names position -7 of 6"),
    (another_label, "labels must be the input_ids .* row 1, position 2 has label 33, and id 10"),
    (a_label_outside_the_map, "that completion_index names, .* row 0, position 1"),
    (a_label_missing, "that completion_index names, .* row 1, position 3"),
    (shifted_on_both_sides, "that completion_index names, .* row 0, position 1"),
    (scored_padding, "must not be padding for the student: row 1, position 3"),
    (predicted_by_padding, "must not be padding for the teacher: row 1, position 2"),
]
IDS = [change.__name__ for change, _ in BROKEN]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=IDS)
def test_a_broken_batch_is_named(change: Any, message: str) -> None:
    batch = made()
    alignment.assert_aligned(batch, end_ids=[2])
    change(batch)
    with pytest.raises(AlignmentError, match=message):
        alignment.assert_aligned(batch, end_ids=[2])


def without_its_end(batch: dict[str, Tensor]) -> None:
    for name in sides.INDEX_MAPS:
        batch[name][0, 1] = -1
    batch["labels"][0, 3] = -100


def test_an_end_token_that_is_not_scored_is_an_error() -> None:
    batch = made()
    without_its_end(batch)
    alignment.assert_aligned(batch, end_ids=[4])
    with pytest.raises(AlignmentError, match=r"end token behind .* row 0, position 3 has label"):
        alignment.assert_aligned(batch, end_ids=[4, 2])


def test_an_end_token_in_a_context_need_not_be_scored() -> None:
    """A turn that the length limit cut is closed by the template; the dialogue goes on."""
    closed = TokenRow([5, 8, 9, 2, 6, 7], [1, 2, 5])
    batch = batches.build_rows([closed], [closed], pad_token_id=2)
    alignment.assert_aligned(batch, end_ids=[2])
    unscored = TokenRow([5, 8, 2, 6, 2], [1, 2])  # behind the last scored token comes another one
    batch = batches.build_rows([unscored], [unscored], pad_token_id=2)
    alignment.assert_aligned(batch, end_ids=[2])


@pytest.mark.parametrize("name", ["input_ids", "labels", *TEACHERS])
def test_a_batch_without_a_part_is_an_error(name: str) -> None:
    batch = made()
    del batch[name]
    with pytest.raises(AlignmentError, match=f"with teacher_input_ids needs {name}, it has none"):
        alignment.assert_aligned(batch)


def test_scored_tokens_are_replies_as_sampled() -> None:
    """Some of them or all, but whole."""
    for replies in ([[8, 2]], [[8], [2]], [[7], [8, 2]], [[8], [8, 2], [9]]):
        alignment.assert_completions(made(), [replies, [[9, 10, 11]]])
    for row, replies, message in (
        (
            0,
            [[8]],
            r"row 0 .* scores 2 tokens that end in \[8, 2\], the replies have \[1\] and end",
        ),
        (0, [[2], [8]], r"the replies have \[1, 1\] and end in \[\[2\], \[8\]\]"),
        (1, [[9, 10, 11, 2]], r"row 1 .* the replies have \[4\] and end in \[\[10, 11, 2\]\]"),
        (1, [[9, 12, 11]], "row 1 must score replies as they were sampled"),
    ):
        replies = [replies, [[9, 10, 11]]] if row == 0 else [[[8, 2]], replies]
        with pytest.raises(AlignmentError, match=message):
            alignment.assert_completions(made(), replies)


class Waits(TorchDispatchMode):
    """Notes what would wait for a device: reading a value, a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh"):
            self.found.append(name)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> AlignmentMeter:
    """As on a device, with one batch seen."""
    monkeypatch.setattr(AlignmentMeter, "_is_costly", staticmethod(lambda batch: True))
    meter = AlignmentMeter([2])
    meter.add(made())
    return meter


def test_on_a_device_only_the_first_batch_is_waited_for(meter: AlignmentMeter) -> None:
    batch = made()
    other_id(batch)
    with Waits() as waits:
        meter.add(batch)
    assert waits.found == []
    with Waits() as waits, pytest.raises(AlignmentError):
        AlignmentMeter([2]).add(batch)
    assert "_local_scalar_dense" in waits.found


def test_what_was_counted_on_a_device_is_raised_when_read(meter: AlignmentMeter) -> None:
    for change in (other_id, another_label, lambda batch: None, another_label):
        batch = made()
        change(batch)
        meter.add(batch)
    with pytest.raises(
        AlignmentError, match=r"since the last log: labels must be .* \(2 times\); "
    ) as e:
        meter.read(Accelerator(cpu=True))
    assert "must score the same tokens (1 times)" in str(e.value)
    assert "padding" not in str(e.value)
    meter.read(Accelerator(cpu=True))  # starts anew


class OneOfTwo:
    """A process whose neighbour has counted one broken rule of each kind."""

    device = torch.device("cpu")

    def reduce(self, sums: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return sums + 1


def test_what_another_process_has_counted_is_raised_here_too(meter: AlignmentMeter) -> None:
    with pytest.raises(AlignmentError, match=r"must be scored \(1 times\)") as caught:
        meter.read(OneOfTwo())
    assert str(caught.value).count("(1 times)") == len(alignment.RULES)


@pytest.mark.parametrize("change", [change for change, _ in BROKEN] + [without_its_end])
def test_every_rule_is_counted(change: Any, meter: AlignmentMeter) -> None:
    batch = made()
    change(batch)
    meter.add(batch)
    with pytest.raises(AlignmentError, match="since the last log: "):
        meter.read(Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("batch", "got"),
    [({}, "none"), ({"labels": torch.zeros(3)}, r"shape \(3,\)")],
)
def test_labels_must_be_rows_of_positions(batch: dict, got: str) -> None:
    with pytest.raises(ValueError, match=rf"labels of shape \[rows, positions\], got {got}"):
        sides.student_side(batch)


def test_padding_and_back() -> None:
    rows = [[3, 4, 5], [], [6]]
    mask = batches.pad([[1] * len(row) for row in rows], 0, side="left")
    left = batches.pad(rows, 9, side="left")
    assert left.tolist() == [[3, 4, 5], [9, 9, 9], [9, 9, 6]]
    assert batches.unpad(left, mask) == rows
    assert batches.pad(rows, 9).tolist() == [[3, 4, 5], [9, 9, 9], [6, 9, 9]]
    assert batches.pad([], 9).shape == (0, 0)
