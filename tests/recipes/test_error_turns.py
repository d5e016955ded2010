"""Dialogues told turn by turn: what a narrator says, which turn is wrong, and the recipe, small."""

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import error_turns
import pytest
from transformers import AutoModelForCausalLM

from helpers import story_dialogues as stories
from helpers import word_problems
from hf_distill import Attempt, HintCollator
from hf_distill.data.episodes import Episode
from hf_distill.rollouts.environments import play

EXAMPLE = {
    "problem": "Tom has 5 apples . he buys 7 more . he eats 2 . how many apples ?",
    "solution": "start 5 ; 5 + 7 = 12 ; 12 - 2 = 10 ; #### 10",
    "reference": "12 10",
    "answer": "10",
}
ROW = {
    "prompt": [{"role": "user", "content": "Tom has 5 apples . he buys 7 more ."}],
    "events": ["Tom has 5 apples . he buys 7 more .", "he eats 2 ."],
    "values": ["12", "10"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_problems.build_tokenizer()


def test_a_story_is_told_event_by_event() -> None:
    assert stories.make_row(EXAMPLE) == ROW


def test_splits_share_no_story_and_events_match_values() -> None:
    train, test = stories.make_splits(60, 40, seed=0)
    told = [{" ".join(row["events"]) for row in rows} for rows in (train, test)]
    assert [len(x) for x in told] == [60, 40]
    assert not told[0] & told[1]
    assert {len(row["events"]) for row in train} == {2, 3}
    for row in train:
        assert len(row["events"]) == len(row["values"])
        assert row["prompt"] == [{"role": "user", "content": row["events"][0]}]
    assert stories.make_splits(60, 40, seed=1)[1] == test != train


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("5 + 7 = 1 2", "12"),
        ("1 2 - 2 = 1 0", "10"),
        ("5 + 7 =", None),
        ("= 1 2", None),
        ("5 + 7 = 1 2 ; 3", None),
        ("", None),
    ],
)
def test_the_value_of_a_reply(reply: str, value: str | None) -> None:
    assert stories.value_of(reply) == value


def attempt(*replies: str) -> Attempt:
    messages = []
    for event, reply in zip(ROW["events"], replies, strict=False):
        messages += [{"role": "user", "content": event}, {"role": "assistant", "content": reply}]
    return Attempt(ROW, messages, replies[-1], True, len(replies) - 1, 0)


def test_the_narrator_goes_on_and_finds_the_first_wrong_turn() -> None:
    right, wrong, later, both = stories.Narrator()(
        [
            attempt("5 + 7 = 1 2"),
            attempt("5 + 7 = 1 1"),
            attempt("5 + 7 = 1 2", "1 2 - 2 = 9"),
            attempt("so", "so"),
        ]
    )
    assert right.messages == wrong.messages == [{"role": "user", "content": "he eats 2 ."}]
    assert later.messages == []
    assert right.columns == {"wrong_turn": None, "correct": None}
    assert wrong.columns == {"wrong_turn": 0, "correct": "12"}
    assert later.columns == {"wrong_turn": 2, "correct": "10"}
    assert both.columns == {"wrong_turn": 0, "correct": "12"}
    (told,) = stories.Narrator(hints=True)([attempt("5 + 7 = 1 2")])
    assert told.messages == [{"role": "user", "content": "he eats 2 . hint : 10"}]


def play_with(replies: list[str], collator: HintCollator) -> Episode:
    """An episode with these replies."""
    episode = Episode(ROW, ROW["prompt"], context=collator.context_ids(ROW["prompt"]))

    def sample(contexts: Any, turn: int) -> list[list[int]]:
        text = f"{replies[turn]} {word_problems.END}"
        return [collator.tokenizer(text, add_special_tokens=False)["input_ids"]]

    play([episode], sample, collator, stories.Narrator(), 3, [collator.eos_token_id])
    return episode


@pytest.mark.parametrize(
    ("replies", "hinted", "scored"),
    [
        (["5 + 7 = 1 1", "1 1 - 2 = 9"], (0, "12"), "5 + 7 = 1 1 <end>"),
        (["5 + 7 = 1 2", "1 2 - 2 = 9"], (1, "10"), "1 2 - 2 = 9 <end>"),
        (["5 + 7 = 1 2", "1 2 - 2 = 1 0"], None, ""),
    ],
    ids=["first", "second", "none"],
)
def test_the_hint_stands_in_the_wrong_turn_and_its_reply_is_scored(
    tokenizer: Any, replies: list[str], hinted: Any, scored: str
) -> None:
    collator = HintCollator(tokenizer, stories.error_hint(), scored="hinted")
    batch, _ = collator.from_episodes([play_with(replies, collator)])
    turns = [
        f"<user> {event} {{}}<end> <assistant> {reply} <end>"
        for event, reply in zip(ROW["events"], replies, strict=True)
    ]

    def expected(*hints: str) -> list[int]:
        text = " ".join(turn.format(hint) for turn, hint in zip(turns, hints, strict=True))
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    hints = ["", ""]
    if hinted:
        hints[hinted[0]] = f"hint : {hinted[1]} "
    assert batch["input_ids"][0].tolist() == expected("", "")
    assert batch["teacher_input_ids"][0].tolist() == expected(*hints)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == scored


def test_warm_up_never_trains_on_a_wrong_value(tokenizer: Any) -> None:
    examples = stories._examples(word_problems.WordEncoder(tokenizer), random.Random(0))
    hints, wrong, turns = 0, 0, 0
    for ids, labels in itertools.islice(examples, 200):
        text = tokenizer.decode(ids)
        hints += text.count("hint :")
        for turn in text.split("<user>")[1:]:
            reply = turn.split("<assistant>")[1].removesuffix("<end>").strip().removesuffix("<end>")
            left, right = reply.replace(" ", "").split("=")
            wrong += eval(left) != int(right)
            turns += 1
        for turn in tokenizer.decode([x for x in labels if x != -100]).split("<end>")[:-1]:
            left, right = turn.replace(" ", "").split("=")
            assert eval(left) == int(right)
    assert 0.15 < wrong / turns < 0.35
    assert 0.35 < hints / turns < 0.65


def test_grading() -> None:
    def told(*texts: str) -> Episode:
        return Episode(ROW, ROW["prompt"], 0, [[1]] * len(texts), list(texts))

    right, wrong = ("5 + 7 = 1 2", "1 2 - 2 = 1 0"), ("5 + 7 = 1 1", "1 2 - 2 = 1 0")
    accuracy = error_turns.grade([told(*right), told(*wrong), told(right[0])])
    assert (accuracy.right, accuracy.total) == (1, 3)
    assert accuracy.ended == pytest.approx(2 / 3)


def test_the_recipe_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings = Path(error_turns.__file__).with_name("error_turns.yaml")
    few = {"max_steps": 2, "warm_up_steps": 2, "num_train": 8, "num_eval": 6, "use_cpu": True}
    few |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "output_dir": tmp_path}
    words = [str(word) for name, value in few.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["error_turns.py", "--config", str(settings), *words])
    error_turns.main()
    found = json.loads((tmp_path / "results.json").read_text())
    names = [f"{view} {when}" for when in ("before", "after") for view in ("unaided", "hinted")]
    assert list(found["accuracies"]) == names
    assert all(value["total"] == 6 for value in found["accuracies"].values())
    assert len(found["dialogues"]) == 6
    assert found["scored_tokens"] > 0
    assert found["config"]["rollout"]["max_turns"] == 3
    assert "unaided after" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path)
