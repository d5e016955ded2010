"""The teacher's second context: wrong hints by source, and the proof that it scores the same."""

import re
from typing import Any

import pytest
import torch

from hf_distill import Contrast, Hint, HintCollator
from hf_distill.data.alignment import AlignmentError, assert_aligned
from hf_distill.data.contrast import as_contrasts, corrupted
from hf_distill.data.episodes import Episode
from hf_distill.data.sides import (
    CONTRAST_ABSENT,
    CONTRAST_PREFIX,
    CONTRAST_SAME,
    UNCONTRASTED,
    contrast_prefix,
)
from hf_distill.rollouts.environments import share_siblings
from tests.hf_distill.data.test_hint_collator import CHAT, PROMPT, SYSTEM_CHAT, row, words
from tests.hf_distill.data.test_teacher_view import DIALOGUE
from tests.hf_distill.trainers import models

END, USER, REPLY = "<|im_end|>", "<|im_start|> user", "<|im_start|> assistant"


def rows(prompt: Any, completion: Any = "3") -> list[dict[str, Any]]:
    """Two rows whose hints differ, and a third with the first one's."""
    return [
        {**row(prompt, completion), "hint": f"Hint : {x}", "wrong": wrong}
        for x, wrong in ((3, "Hint : 4"), (5, "Hint : 9"), (3, None))
    ]


def read(
    contrast: Any, given: list[dict[str, Any]], **settings: Any
) -> tuple[list[str], list[str], list[bool]]:
    """What the teacher reads in both contexts, and which rows have no wrong hint."""
    collator = HintCollator(models.tokenizer(), "hint", contrast=contrast, **settings)
    batch = collator(given)
    found = []
    for prefix in ("teacher_", CONTRAST_PREFIX):
        pairs = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], strict=True)
        found.append([words(ids[mask.bool()]) for ids, mask in pairs])
    return found[0], found[1], batch[UNCONTRASTED].tolist()


@pytest.mark.parametrize("prompt", [PROMPT, CHAT, SYSTEM_CHAT])
@pytest.mark.parametrize(
    ("contrast", "numbers"),
    [
        (Hint("wrong", optional=True), [4, 9, 3]),  # the third row has no wrong hint
        (Contrast("other_row"), [5, 3, 5]),
        (Contrast("corrupted_number"), None),
    ],
)
def test_wrong_hints_stand_where_right_ones_do(prompt: Any, contrast: Any, numbers: Any) -> None:
    right, wrong, same = read(contrast, rows(prompt))
    assert same == [False, False, numbers is not None and numbers[2] == 3]
    for i, (one, other) in enumerate(zip(right, wrong, strict=True)):
        (number,) = re.findall(r"Hint : (\S+)", other)  # 0 is unknown to this tokenizer
        assert other == re.sub(r"Hint : \S+", f"Hint : {number}", one)
        if numbers is None:
            assert number != re.findall(r"Hint : (\S+)", one)[0]
        else:
            assert int(number) == numbers[i]


def test_a_wrong_hint_may_stand_elsewhere() -> None:
    _, wrong, _ = read(Hint("wrong", where="system"), rows(CHAT)[:2])
    assert wrong[0].startswith(f"<|im_start|> system Hint : 4 {END} {USER} {PROMPT} {END}")


@pytest.mark.parametrize("completion", ["3", DIALOGUE])
@pytest.mark.parametrize("settings", [{}, {"teacher_template_kwargs": {"think": True}}])
def test_the_reference_without_the_question(completion: Any, settings: dict[str, Any]) -> None:
    right, wrong, _ = read(Contrast("reference"), rows(SYSTEM_CHAT, completion), **settings)
    for one, other in zip(right, wrong, strict=True):
        assert PROMPT in one
        assert other == one.replace(f"{PROMPT} ", "")


def test_one_row_alone_has_no_other_row() -> None:
    right, wrong, same = read(Contrast("other_row"), rows(CHAT)[:1])
    assert (right, same) == (wrong, [True])


def test_every_context_scores_the_same_tokens() -> None:
    """In a dialogue, of which some replies count."""
    hint = Hint("hint", where="user", turn=2)
    given = [{**x, "wrong": f"so {x['hint']} then"} for x in rows(CHAT, DIALOGUE)]
    collator = HintCollator(models.tokenizer(), hint, scored="hinted", contrast=Hint("wrong"))
    batch = collator(given)
    at, index = batch[f"{CONTRAST_PREFIX}completion_index"], batch["completion_index"]
    theirs = batch[f"{CONTRAST_PREFIX}input_ids"].gather(1, at)
    assert torch.equal(theirs, batch["input_ids"].gather(1, index))
    assert_aligned(batch)
    broken = batch[f"{CONTRAST_PREFIX}input_ids"].clone()
    broken[1, at[1, 0]] += 1
    message = "in the contrast, student and teacher must score the same tokens: row 1, completion"
    with pytest.raises(AlignmentError, match=message):
        assert_aligned({**batch, f"{CONTRAST_PREFIX}input_ids": broken})


def test_without_a_contrast_batches_are_as_before() -> None:
    batch = HintCollator(models.tokenizer(), "hint")(rows(CHAT))
    assert not [name for name in batch if "contrast" in name]


def test_dropped_hints_leave_no_contrast() -> None:
    settings = {"contrast": Contrast("corrupted_number"), "hint_dropout": 0.5}
    collator = HintCollator(models.tokenizer(), "hint", **settings)
    found = [collator.at(step, 1)(rows(CHAT)) for step in range(6)]
    dropped = torch.cat([x["teacher_hint_dropped"] for x in found])
    assert 0 < int(dropped.sum()) < len(dropped)
    assert torch.equal(dropped, torch.cat([x[UNCONTRASTED] for x in found]))


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["17 * 23 = 391, so 391"], r"17 \* 23 = (\d{3}), so \1"),
        (["it is 5", "think"], r"it is (\d)"),
        (["3 and 391"], r"3 and (\d{3})"),
        (["10"], r"([1-9]\d)"),
    ],
)
def test_a_corrupted_number_is_another_everywhere(texts: list[str], kept: str) -> None:
    (made,) = corrupted(texts)
    assert made != texts
    assert [made] == corrupted(texts), "the same each time"
    found = re.fullmatch(kept, made[0])
    assert found is not None
    assert made[1:] == texts[1:]


@pytest.mark.parametrize(("text", "found"), [("it is 391", 26), ("10 or 5", 9), ("5", 9)])
def test_corrupted_numbers_are_all_others(text: str, found: int) -> None:
    """As many as there are with one other digit, the first of them first."""
    made = [x[0] for x in corrupted([text], 100)]
    assert len({*made}) == len(made) == found
    assert [made[:1], made[:4]] == [[x[0] for x in corrupted([text], n)] for n in (1, 4)]
    for each in made:
        differ = [a != b for a, b in zip(text, each, strict=True)]
        assert sum(differ) == 1
        assert not re.search(r"\b0\d", each)


def wrong_texts(contrast: Any, given: list[dict[str, Any]]) -> tuple[list[list[str]], Any]:
    """What follows "Hint :" in each wrong context of each row, and the batch."""
    batch = HintCollator(models.tokenizer(), "hint", contrast=contrast)(given)
    found: list[list[str]] = [[] for _ in given]
    for k in range(batch[CONTRAST_SAME].shape[1]):
        ids, mask = (batch[f"{contrast_prefix(k)}{x}"] for x in ("input_ids", "attention_mask"))
        for listed, own, kept, absent in zip(
            found, ids, mask, batch[CONTRAST_ABSENT][:, k].tolist(), strict=True
        ):
            if not absent:
                listed.append(re.findall(r"Hint : (\S+)", words(own[kept.bool()]))[0])
    return found, batch


def test_other_rows_are_as_many_as_differ() -> None:
    given = [row(CHAT, "3") | {"hint": f"Hint : {x}"} for x in (3, 5, 3, 6, 5)]
    found, batch = wrong_texts(Contrast("other_row", number=2), given)
    assert found == [["5", "6"], ["3", "6"], ["6", "5"], ["5", "3"], ["3", "6"]]
    assert not batch[CONTRAST_SAME].any()
    found, batch = wrong_texts(Contrast("other_row", number=3), given[:3])
    assert found == [["5"], ["3"], ["5"]]
    alone = wrong_texts(Contrast("other_row", number=3), given[:1])[1]
    assert alone.keys() == batch.keys()
    assert alone[CONTRAST_ABSENT].tolist() == [[False, True, True]]
    assert alone[CONTRAST_SAME][:, 0].tolist() == alone[UNCONTRASTED].tolist() == [True]


def test_a_list_of_texts_is_a_wrong_hint_in_each_context() -> None:
    given = [
        row(CHAT, "3") | {"hint": "Hint : 3", "wrongs": x, "one": "4"}
        for x in (["4", "5", "6"], ["4", "4"], [], None)
    ]
    found, batch = wrong_texts(Contrast(hint="Hint : {wrongs}", number=2), given)
    assert found == [["4", "5"], ["4"], ["3"], ["3"]]  # the last two read their own context
    assert batch[UNCONTRASTED].tolist() == [False, False, True, True]
    # a column that is the same in each context is one wrong hint
    assert wrong_texts(Contrast(hint="Hint : {one}", number=2), given)[0] == [["4"]] * 4


def test_a_row_is_uncontrasted_where_all_its_contexts_are_the_right_one() -> None:
    given = [
        row(CHAT, "3") | {"hint": "Hint : 3", "wrongs": x}
        for x in (["Hint : 3", "Hint : 4"], ["Hint : 3"], ["Hint : 4", "Hint : 3"])
    ]
    batch = wrong_texts(Contrast(hint="wrongs", number=2), given)[1]
    assert batch[CONTRAST_SAME].tolist() == [[True, False], [True, True], [False, True]]
    assert batch[UNCONTRASTED].tolist() == [False, True, False]


def test_several_contrasts_are_as_many_contexts() -> None:
    """Hints of a context of their own first, then those made of the right ones."""
    given = [row(CHAT, "3") | {"hint": f"Hint : {x}", "wrong": "Hint : 9"} for x in (3, 5)]
    several = [Contrast("other_row"), Contrast("corrupted_number"), Contrast(hint="wrong")]
    found, _ = wrong_texts(several, given)
    for (first, second, third), right in zip(found, ("3", "5"), strict=True):
        assert (first, third) == ("9", "5" if right == "3" else "3")
        assert second != right


def test_texts_without_a_number_cannot_be_corrupted() -> None:
    assert corrupted(["think first"], 3) == []
    given = [{**x, "hint": "think first"} for x in rows(CHAT)]
    assert read(Contrast("corrupted_number"), given)[2] == [True] * 3


def test_failed_siblings_are_a_column() -> None:
    """Of two groups: the first other attempt that was judged and has failed."""
    made = [
        Episode({}, PROMPT, group, texts=[text], columns={} if score is None else {"score": score})
        for group, text, score in (
            (0, "a", 0.0), (0, "b", 1.0), (0, "c", None), (0, "d", 0.0), (1, "e", 0.0),
        )
    ]  # fmt: skip
    share_siblings(made)
    assert [x.seen()["failed_sibling"] for x in made] == ["d", "a", "a", "a", None]
    assert [x.seen()["failed_siblings"] for x in made] == [
        ["d"],
        ["a", "d"],
        ["a", "d"],
        ["a"],
        None,
    ]
    assert [x.seen()["sibling"] for x in made] == ["b", None, "b", "b", None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrast("sibling"), "source must be one of .*, got 'sibling'"),
        (lambda: Contrast("hint"), "a hint with the source 'hint' only, got 'hint' and None"),
        (lambda: Contrast("other_row", "hint"), "only, got 'other_row' and 'hint'"),
        (lambda: Contrast("other_row", number=0), "number must be at least 1, got 0"),
        (lambda: Contrast("reference", number=2), "is 1 for the source 'reference', got 2"),
        (
            lambda: as_contrasts([Contrast("reference"), "wrong"]),
            "several contrasts must all be Contrast objects",
        ),
        (
            lambda: as_contrasts([Contrast("other_row"), Contrast("other_row", number=2)]),
            "'hint' may come twice, got 'other_row' 2 times: set its number",
        ),
        (
            lambda: HintCollator(models.tokenizer(), [], contrast="wrong"),
            "a contrast needs hints that it is the contrast of, got 'wrong'",
        ),
    ],
)
def test_bad_contrasts_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
