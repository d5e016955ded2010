"""Rows whose hints are dropped, and hints whose length follows a schedule."""

import random
from typing import Any

import pytest
import torch

from hf_distill import Hint, HintCollator
from hf_distill.cache.datasets import MessagesCollator
from hf_distill.data.episodes import Episode
from hf_distill.data.hint_collator import DROPPED, TRUNCATED
from hf_distill.data.hint_schedule import (
    HintDropout,
    HintSchedule,
    collator_at_step,
    hint_schedule_of,
)
from hf_distill.schedules import Schedule
from tests.hf_distill.data.test_chat import PROMPT, ROW, reply, user, words
from tests.hf_distill.data.test_episodes import episode
from tests.hf_distill.trainers import models

SEED = 3


def collator(hint: Any = "hint", dropout: Any = 1.0, **settings: Any) -> HintCollator:
    return HintCollator(models.tokenizer(), hint, hint_dropout=dropout, **settings)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def dropped_like(hinted: dict[str, Any], dropped: dict[str, Any]) -> None:
    """The student's side and what is scored are the hinted batch's; the teacher reads no hint."""
    for name in ("input_ids", "attention_mask", "labels", "completion_index"):
        assert torch.equal(hinted[name], dropped[name])
    for name in ("input_ids", "attention_mask", "completion_index"):
        assert torch.equal(dropped[name], dropped[f"teacher_{name}"])
    assert not torch.equal(hinted["teacher_input_ids"], dropped["teacher_input_ids"])
    assert dropped[DROPPED].all()


PLACES = {
    "user": Hint("hint", turn=3, separator=" "),
    "system": Hint("hint", "system", separator=" "),
    "before": Hint("hint", "before", turn="wrong"),
    "after": Hint("hint", "after", turn=4),
    "two": [Hint("hint", turn=3), Hint("hint", "after", turn=4)],
}
# first token of what is scored of ROW's replies "3", "so 6", "5 ."
FIRST_SCORED = {
    ("user", "hinted"): "so 6 <|im_end|>",
    ("user", "after_hint"): "so 6 <|im_end|> 5 . <|im_end|>",
    ("system", "hinted"): "3 <|im_end|>",
    ("after", "hinted"): "5 . <|im_end|>",
    ("before", "after_hint"): "so 6 <|im_end|> 5 . <|im_end|>",
}


@pytest.mark.parametrize("scored", ["all", "hinted", "after_hint"])
@pytest.mark.parametrize("place", PLACES)
def test_a_dialogue_scores_what_it_would_with_its_hints(place: str, scored: str) -> None:
    hinted = collator(PLACES[place], 0.0, scored=scored)([ROW])
    made = collator(PLACES[place], scored=scored).at(0, SEED)([ROW])
    dropped_like(hinted, made)
    expected = FIRST_SCORED.get((place, scored))
    if expected is not None:
        assert words(made["labels"][0][made["labels"][0] != -100]) == expected


@pytest.mark.parametrize("where", ["user", "system"])
@pytest.mark.parametrize("prompt", ["What is 1 + 2 ?", PROMPT])
def test_prompts_of_text_and_of_messages(prompt: Any, where: str) -> None:
    row = {"prompt": prompt, "hint": "Hint : 3", "completion": "so 3"}
    hint = Hint("hint", where, separator=" ")
    dropped_like(collator(hint, 0.0)([row]), collator(hint).at(0, SEED)([row]))
    contexts = collator(hint).at(0, SEED).contexts([row])
    assert torch.equal(contexts["teacher_prompt_ids"], contexts["prompt_ids"])
    assert torch.equal(contexts["teacher_prompt_mask"], contexts["prompt_mask"])
    assert "Hint" in words(collator(hint).at(0).contexts([row])["teacher_prompt_ids"][0])


@pytest.mark.parametrize("scored", ["all", "hinted", "after_hint"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_sampled_dialogues(chat: bool, scored: str) -> None:
    hint = Hint(lambda row: "Hint : 5", **({"turn": 3} if chat else {}))
    text = {"prompt": "What is 1 + 2 ?"}
    end = models.WORDS.index("3"), models.EOS
    one = episode() if chat else Episode(text, text["prompt"], 0, [list(end)], ["3"])
    hinted, texts = collator(hint, 0.0, scored=scored).from_episodes([one])
    made, none = collator(hint, scored=scored).at(0, SEED).from_episodes([one])
    dropped_like(hinted, made)
    assert (made["labels"] != -100).any()
    assert texts == [["Hint : 5"]]
    assert none == [()]  # the teacher's hints, as tables and meters show them


def test_a_row_without_a_hint_has_none_to_drop() -> None:
    hint = Hint("hint", optional=True)
    rows = [{"prompt": "What ?", "hint": x, "completion": "3"} for x in (None, "Hint : 3")]
    assert collator(hint).at(0, SEED)(rows)[DROPPED].tolist() == [False, True]


def test_a_dropped_hint_was_not_cut() -> None:
    rows = [ROW | {"hint": "Hint : 1 + 2 = 3 ."}] * 8
    settings = {"truncation": "hint", "max_hint_length": 3}
    batch = collator(Hint(separator=" "), 0.5, **settings).at(0, SEED)(rows)
    assert 0 < batch[DROPPED].sum() < 8
    assert torch.equal(batch[TRUNCATED], ~batch[DROPPED])


def test_an_error_in_a_hint_does_not_wait_for_a_step_that_keeps_it() -> None:
    with pytest.raises(
        ValueError, match=r"row 0 of the batch: the hint of .* max_hint_length is 1"
    ):
        collator(max_hint_length=1).at(0, SEED)([ROW])


def test_evaluation_and_share_zero_keep_all_hints() -> None:
    rows = [{"prompt": f"What is {i} ?", "hint": f"Hint : {i}", "completion": "3"} for i in "1234"]
    plain = collator(dropout=0.0)
    assert plain.hint_plan is None
    assert plain.at(7, SEED) is plain
    want = plain(rows)
    assert same(collator(dropout=1.0).at(7)(rows), want)
    at_start = collator(dropout="linear:0.0->1.0@10").at(0, SEED)(rows)
    assert at_start.pop(DROPPED).tolist() == [False] * 4
    assert same(at_start, want)


def test_a_constant_schedule_is_the_number() -> None:
    rows = [{"prompt": f"What is {i} ?", "hint": "Hint : 3 .", "completion": "3"} for i in range(9)]
    constants = {"truncation": "hint"}
    one = collator(dropout=0.5, max_hint_length=2, **constants)
    other = collator(dropout="0.5", max_hint_length=Schedule.parse("2"), **constants)
    for step in (0, 5):
        batch = one.at(step, SEED)(rows)
        assert 0 < batch[DROPPED].sum() < 9
        assert same(batch, other.at(step, SEED)(rows))
    assert collator(dropout=0.0, max_hint_length="3").max_hint_length == 3  # and needs no step


def rows_of(count: int) -> list[list[int]]:
    return [[5, i % 97, i // 97] for i in range(count)]


def test_the_share_is_that_of_the_draws() -> None:
    rows = rows_of(4000)
    for share in (0.1, 0.5, 0.9):
        found = sum(HintDropout(share, 0, 0)(rows)) / len(rows)
        assert found == pytest.approx(share, abs=0.03)  # three and a half standard errors
    assert sum(HintDropout(0.0, 0, 0)(rows)) == 0
    assert sum(HintDropout(1.0, 0, 0)(rows)) == len(rows)


def test_a_draw_follows_from_seed_step_and_row_alone() -> None:
    rows, draw = rows_of(200), HintDropout(0.5, 0, 7)
    state, own = random.getstate(), torch.get_rng_state()
    whole = draw(rows)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), own)
    assert [draw([row])[0] for row in rows] == whole  # batches do not matter
    assert draw(rows[::-1]) == whole[::-1]
    for other in (HintDropout(0.5, 1, 7), HintDropout(0.5, 0, 8)):
        agree = sum(a == b for a, b in zip(whole, other(rows), strict=True))
        assert 60 < agree < 140  # of 200: two fair coins
    alike = draw([rows[0]] * 200)
    assert 60 < sum(alike) < 140  # completions of one prompt are drawn for one by one


@pytest.mark.parametrize(("step", "expected"), [(0, 6), (1, 4), (2, 2), (3, 1), (9, 1)])
def test_the_length_follows_its_schedule(step: int, expected: int) -> None:
    row = {"prompt": "What ?", "hint": "Hint : 1 + 2 = 3 .", "completion": "3"}
    length = {"max_hint_length": "linear:6->1@3", "truncation": "hint"}  # 6, 4.33, 2.67, 1
    batch = collator(Hint(separator=" "), 0.0, **length).at(step, SEED)([row])
    added = batch["teacher_attention_mask"].sum() - batch["attention_mask"].sum()
    assert added == expected
    assert batch[TRUNCATED].tolist() == [True]
    assert batch[DROPPED].tolist() == [False]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("scored", ["all", "hinted"])
def test_a_hint_that_cannot_be_cut_to_its_schedule_is_left_out(scored: str, chat: bool) -> None:
    """Down to nothing: the last steps are those without hints, not an error."""
    hint = Hint("hint", **({"turn": 1} if chat else {}), separator=" ")
    prompt = PROMPT if chat else "What is 1 + 2 ?"
    row = {"prompt": prompt, "hint": "Hint : 3", "completion": "so 3"}
    one = Episode(row, prompt, 0, [[models.WORDS.index("3"), models.EOS]], ["3"])
    length = {"max_hint_length": "linear:2->0@2", "truncation": "hint", "scored": scored}
    made = collator(hint, 0.0, **length)
    unscheduled = collator(hint, 0.0, scored=scored)
    for step, left_out in ((0, False), (1, False), (2, True), (3, True)):
        for seed in (SEED, None):  # in evaluation too
            batch, hints = made.at(step, seed).from_episodes([one])
            assert batch[DROPPED].tolist() == [left_out]
            assert batch[TRUNCATED].tolist() == [not left_out]
            assert torch.equal(batch["labels"], unscheduled.from_episodes([one])[0]["labels"])
            assert hints == [() if left_out else [["Hint :"], ["Hint"]][step]]
            assert made.at(step, seed)([row])[DROPPED].tolist() == [left_out]


@pytest.mark.parametrize(("value", "tokens"), [(64 - 1e-9, 64), (63.99, 63), (7, 7), ("2.5", 2)])
def test_lengths_are_rounded_down_but_for_rounding_errors(value: Any, tokens: int) -> None:
    assert HintSchedule.of(0.0, value, "error").length_at(0) == tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hint_dropout": -0.1}, r"hint_dropout must stay in \[0, 1\], got -0.1"),
        ({"hint_dropout": "linear:0.0->1.5@9"}, r"must stay in \[0, 1\], got linear:0.0->1.5@9"),
        ({"hint_dropout": "often"}, "got 'often'"),
        ({"max_hint_length": -1}, "max_hint_length must not be negative, got -1"),
        (
            {"max_hint_length": "linear:9->1@9"},
            "a max_hint_length that changes needs truncation 'hint'.* got linear.* 'error'",
        ),
        (
            {"hint_dropout": 0.5, "hint": ()},
            r"depends on the optimizer step \(hint_dropout 0.5\), and there are no hints",
        ),
        (
            {"max_hint_length": "linear:9->1@9", "truncation": "hint", "hint": ()},
            r"\(max_hint_length 1 to 9\), and there are no hints",
        ),
    ],
)
def test_errors_of_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HintCollator(models.tokenizer(), **settings)


def test_rows_are_not_made_without_a_step() -> None:
    made = collator(dropout=0.25)
    for make in (made, made.contexts, lambda rows: made.from_episodes([episode()])):
        with pytest.raises(ValueError, match=r"\(hint_dropout 0.25\): give this collator, or"):
            make([ROW])
    # what has no hints needs no step
    assert made.prompts([ROW])["prompt_ids"].shape[0] == 1
    student, teacher = made.without_hints([ROW], completed=True)
    assert student == teacher
    assert words(made.references([ROW])["input_ids"][0]).endswith("5 . <|im_end|>")
    fixed = made.at(0, SEED).without_hints([ROW])
    assert fixed[0] == fixed[1]


def test_collators_around_one_with_a_plan() -> None:
    inside = collator(dropout=0.5)
    around = MessagesCollator(inside)
    assert hint_schedule_of(around) is inside.hint_plan
    rows = [{"messages": [user(f"What is {i} ?"), reply("3")], "hint": "Hint"} for i in "12345678"]
    batch = collator_at_step(around, 2, SEED)(rows)
    assert 0 < batch[DROPPED].sum() < 8
    parts = [row | {"prompt": row["messages"][:1], "completion": [reply("3")]} for row in rows]
    assert same(batch, inside.at(2, SEED)(parts))
    assert around.collator is inside  # as it was
    assert hint_schedule_of(MessagesCollator(collator(dropout=0.0))) is None
    assert hint_schedule_of(models.Pad()) is None
    assert hint_schedule_of(inside.at(0)) is None
