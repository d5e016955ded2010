"""The teacher's second context: wrong hints by source, and the proof that it scores the same."""

import re
from typing import Any

import pytest
import torch

from hf_distill import Contrast, Hint, HintCollator
from hf_distill.data.alignment import AlignmentError, assert_aligned
from hf_distill.data.contrast import corrupted
from hf_distill.data.episodes import Episode
from hf_distill.data.sides import CONTRAST_PREFIX, UNCONTRASTED
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
    made = corrupted(texts)
    assert made != texts
    assert made == corrupted(texts), "the same each time"
    found = re.fullmatch(kept, made[0])
    assert found is not None
    assert made[1:] == texts[1:]


def test_texts_without_a_number_cannot_be_corrupted() -> None:
    assert corrupted(["think first"]) is None
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
    assert [x.seen()["sibling"] for x in made] == ["b", None, "b", "b", None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrast("sibling"), "source must be one of .*, got 'sibling'"),
        (lambda: Contrast("hint"), "a hint with the source 'hint' only, got 'hint' and None"),
        (lambda: Contrast("other_row", "hint"), "only, got 'other_row' and 'hint'"),
        (
            lambda: HintCollator(models.tokenizer(), [], contrast="wrong"),
            "a contrast needs hints that it is the contrast of, got 'wrong'",
        ),
    ],
)
def test_bad_contrasts_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
