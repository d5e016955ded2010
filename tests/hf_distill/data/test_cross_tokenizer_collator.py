"""CrossTokenizerCollator token by token, and the rules of batches with two tokenizers."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill import CrossTokenizerCollator, Hint, HintCollator
from hf_distill.data import alignment, cross_tokenizer_collator, sides
from hf_distill.data.alignment import AlignmentError, AlignmentMeter
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import letters

WORDS, LETTERS = models.tokenizer(), letters()
ROWS = [
    {"prompt": "What is 1 + 2 ?", "completion": "The answer is 3 ."},
    {"prompt": "Sum of 4 and 5 ?", "completion": "9"},
]
TURNS = {
    "prompt": [{"role": "user", "content": "What is 1 + 2 ?"}],
    "completion": [
        {"role": "assistant", "content": "The answer is 3 ."},
        {"role": "user", "content": "Hint : no"},
        {"role": "assistant", "content": "no"},
    ],
}


def made(rows: Any = ROWS, first: Any = WORDS, second: Any = LETTERS, **changes: Any) -> dict:
    return CrossTokenizerCollator(first, second, **changes)(rows)


def shown(tokenizer: Any, ids: Tensor) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids.tolist())


def pairs_of(batch: dict, row: int, first: Any = WORDS, second: Any = LETTERS) -> list[tuple]:
    """Each scored token of the student's row, and the teacher's beside it."""
    found = []
    columns = (batch["completion_index"][row], batch["teacher_completion_index"][row])
    for here, there in zip(*(x.tolist() for x in columns), strict=True):
        if here >= 0:
            mine = shown(first, batch["input_ids"][row, here : here + 1])[0]
            other = shown(second, batch["teacher_input_ids"][row, there : there + 1])
            found.append((mine, other[0] if there >= 0 else None))
    return found


def test_a_batch_token_by_token() -> None:
    batch = made()
    text = [*"What is 1 + 2 ?", *"The answer is 3 .", "<end>"]
    mask = batch["teacher_attention_mask"].bool()
    assert shown(LETTERS, batch["teacher_input_ids"][0][mask[0]]) == text
    text = ["Sum", "of", "4", "and", "5", "?", "9", "<|im_end|>"]
    mask = batch["attention_mask"].bool()
    assert shown(WORDS, batch["input_ids"][1][mask[1]]) == text
    assert batch["input_ids"][1, ~mask[1]].unique().tolist() == [0]
    assert batch["teacher_input_ids"][1][batch["teacher_attention_mask"][1] == 0].unique() == 1
    labels = batch["labels"]
    for row, count in ((0, 6), (1, 2)):
        at = batch["completion_index"][row, :count]
        assert (batch["completion_index"][row, count:] == -1).all()
        assert torch.equal(labels[row].ne(-100).nonzero()[:, 0], at)
        assert torch.equal(labels[row, at], batch["input_ids"][row, at])
    words = ["The", "answer", "is", "3", ".", "<|im_end|>"]
    assert pairs_of(batch, 0) == list(zip(words, "The an", strict=True))
    assert pairs_of(batch, 1) == [("9", "9"), ("<|im_end|>", "<end>")]
    assert sides.paired_tokens(batch).tolist() == [True] * 8
    assert batch["teacher_own_tokens"].tolist() == [True, True]


def test_a_longer_students_completion_is_scored_to_its_end() -> None:
    batch = made(ROWS, LETTERS, WORDS)
    found = pairs_of(batch, 0, LETTERS, WORDS)
    assert [x for x, _ in found] == [*"The answer is 3 .", "<end>"]
    words = ["The", "answer", "is", "3", ".", "<|im_end|>"]
    assert [x for _, x in found] == [*words, *[None] * 12]
    assert sides.paired_tokens(batch).tolist() == [True] * 6 + [False] * 12 + [True] * 2


@pytest.mark.parametrize("swapped", [False, True])
def test_each_reply_begins_anew(swapped: bool) -> None:
    both = (LETTERS, WORDS) if swapped else (WORDS, LETTERS)
    batch = made([TURNS, TURNS | {"completion": TURNS["completion"][:1]}], *both)
    found = pairs_of(batch, 0, *both)
    if swapped:
        starts = [i for i, (mine, _) in enumerate(found) if mine in "Tn"][:1]
        assert found[starts[0]] == ("T", "The")
        assert found[-3:] == [("n", "no"), ("o", "<|im_end|>"), ("<end>", None)]
    else:
        words = ["The", "answer", "is", "3", ".", "<|im_end|>"]
        assert found == [*zip(words, "The an", strict=True), ("no", "n"), ("<|im_end|>", "o")]
    assert len(pairs_of(batch, 1, *both)) == len(found) - (3 if swapped else 2)


def test_with_one_tokenizer_it_is_a_hint_collators_batch_without_hints() -> None:
    want = HintCollator(WORDS, Hint(lambda row: None))(ROWS)
    found = made(ROWS, WORDS, WORDS)
    assert found.keys() - want.keys() == {"teacher_own_tokens"}
    for name, value in want.items():
        assert torch.equal(found[name], value), name


def test_templates_are_each_sides_own() -> None:
    row = TURNS | {"completion": "no"}
    batch = made([row], chat_template_kwargs={"think": True})
    assert "think" in shown(WORDS, batch["input_ids"][0])
    batch = made([row], LETTERS, WORDS, teacher_chat_template_kwargs={"think": True})
    assert "think" in shown(WORDS, batch["teacher_input_ids"][0])


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"max_prompt_length": 5}, "for the student: row 0 .* has 6 tokens, max_prompt_length"),
        ({"max_prompt_length": 8}, "for the teacher: row 0 .* has 15 tokens, max_prompt_length"),
        ({"max_completion_length": 17}, "for the teacher: .* has 18 tokens, max_completion_len"),
        ({"completion_column": "reply"}, "for the student: row 0 .* there is no 'reply'"),
    ],
)
def test_a_bad_row_is_named_with_its_side(budgets: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**budgets)


def a_pair_without_a_student(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"][1, :3] = torch.tensor([15, 16, 17])


def pairs_that_cross(batch: dict[str, Tensor]) -> None:
    index = batch["teacher_completion_index"]
    index[0, 1:3] = index[0, 1:3].flip(0)


def a_pair_twice(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"][0, 3] = batch["teacher_completion_index"][0, 2]


def a_row_without_pairs(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"][1] = -1


def a_student_that_descends(batch: dict[str, Tensor]) -> None:
    batch["completion_index"][0] = batch["completion_index"][0].flip(0)


def a_shorter_map(batch: dict[str, Tensor]) -> None:
    batch["teacher_completion_index"] = batch["teacher_completion_index"][:, :3]


BROKEN = [
    (a_pair_without_a_student, "row 1, position 2"),
    (pairs_that_cross, "row 0, position 2"),
    (a_pair_twice, "row 0, position 3"),
    (a_row_without_pairs, "row 1, position 0"),
    (a_student_that_descends, "row 0, position 1"),
    (a_shorter_map, "row 0, position 0"),
]


@pytest.mark.parametrize(("change", "where"), BROKEN, ids=[x.__name__ for x, _ in BROKEN])
def test_a_broken_pair_is_named(change: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = made()
    alignment.assert_aligned(batch, end_ids=[2])
    meter = AlignmentMeter([2])
    meter.add(made())
    change(batch)
    with pytest.raises(AlignmentError, match=f"both index maps must .* at least once: {where}"):
        alignment.assert_aligned(batch, end_ids=[2])
    monkeypatch.setattr(AlignmentMeter, "_is_costly", staticmethod(lambda batch: True))
    meter.add(batch)
    with pytest.raises(AlignmentError, match=r"since the last log: .*both index maps must"):
        meter.read(Accelerator(cpu=True))


def test_the_other_rules_hold_as_well() -> None:
    for name, at, value, words in (
        ("teacher_attention_mask", (0, 20), 0, "must not be padding for the teacher"),
        ("attention_mask", (0, 8), 0, "must not be padding for the student"),
        ("labels", (0, 8), 33, "labels must be the input_ids"),
        ("labels", (0, 8), -100, "that completion_index names"),
        ("teacher_completion_index", (0, 5), 99, "row 0 names position 99 of 33"),
        ("completion_index", None, None, "needs completion_index"),
    ):
        batch = made()
        if at is None:
            del batch[name]
        else:
            batch[name][at] = value
        with pytest.raises(AlignmentError, match=words):
            alignment.assert_aligned(batch)


def test_without_its_mark_a_batch_must_hold_the_same_tokens() -> None:
    batch = made()
    del batch["teacher_own_tokens"]
    with pytest.raises(AlignmentError, match="must score the same tokens"):
        alignment.assert_aligned(batch)


@pytest.mark.parametrize(
    ("student", "teacher", "beside"),
    [
        ([3, 4, 5], [7, 8], [7, 8, -1]),
        ([3], [7, 8], [7]),
        ([3, 4, 8, 9], [5, 8, 9, 10], [5, -1, 8, 9]),
        ([3, 4, 8, 9], [5, 6, 7], [5, 6, 7, -1]),  # not as many replies
        ([3, 4], [5, 7], [5, 7]),
        ([], [], []),
    ],
)
def test_which_tokens_stand_beside_each_other(
    student: list[int], teacher: list[int], beside: list[int]
) -> None:
    assert cross_tokenizer_collator.pair_positions(student, teacher) == beside
