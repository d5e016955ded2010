"""Rows from dialogues that the student has written: ids as sampled, hints that read the rollout."""

from collections.abc import Sequence
from typing import Any

import pytest

from hf_distill import Hint, HintCollator
from hf_distill.data.chat import ids_between_replies
from hf_distill.data.episodes import Attempt, Episode
from hf_distill.data.turn_ends import TurnEnds
from hf_distill.rollouts.environments import Feedback, play, share_siblings
from tests.hf_distill.data.test_chat import PROMPT, reply, text, user, words
from tests.hf_distill.trainers import models

SAID = [[user("What is 3 + 2 ?")], [user("think then ."), user("What ?")]]
REPLIES = ["3", "so 6", "5 ."]
# 0 system, 1 user, 2 reply, 3 user, 4 reply, 5 user, 6 user, 7 reply
DIALOGUE = [*PROMPT, reply("3"), *SAID[0], reply("so 6"), *SAID[1], reply("5 .")]


def ids(text: str) -> list[int]:
    return [models.WORDS.index(word) for word in text.split()]


def episode(row: dict[str, Any] | None = None, **columns: Any) -> Episode:
    """Three replies, each with its end token."""
    completions = [[*ids(text), models.EOS] for text in REPLIES]
    row = {"prompt": PROMPT} if row is None else row
    return Episode(row, row["prompt"], 0, completions, list(REPLIES), SAID, columns)


def made(hint: Any, episode: Episode, **settings: Any) -> tuple[str, str, str]:
    """The student's row, the teacher's, and what is scored on both, as words."""
    collator = HintCollator(models.tokenizer(), hint, **settings)
    batch, _ = collator.from_episodes([episode])
    student, teacher = (
        words(batch[side][0, index[index >= 0]])
        for side, index in (
            ("input_ids", batch["completion_index"][0]),
            ("teacher_input_ids", batch["teacher_completion_index"][0]),
        )
    )
    assert student == teacher
    return words(batch["input_ids"][0]), words(batch["teacher_input_ids"][0]), student


NONE = Hint(lambda row: None)


def test_rows_are_what_the_template_writes_for_the_whole_dialogue() -> None:
    student, teacher, scored = made(NONE, episode())
    assert student == teacher == text(DIALOGUE)
    assert scored == "3 <|im_end|> so 6 <|im_end|> 5 . <|im_end|>"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (
            Hint("{fix}", turn="wrong", separator=" "),
            [*DIALOGUE[:5], user("think then . Hint : 5"), *DIALOGUE[6:]],
        ),
        (
            Hint("fix", where="after", turn=4),
            [*DIALOGUE[:5], user("Hint : 5"), *DIALOGUE[5:]],
        ),
        (
            Hint("fix", where="before", turn=-1, role="system"),
            [*DIALOGUE[:7], {"role": "system", "content": "Hint : 5"}, DIALOGUE[7]],
        ),
        (
            Hint("fix", where="system", separator=" "),
            [{"role": "system", "content": "You are brief . Hint : 5"}, *DIALOGUE[1:]],
        ),
    ],
    ids=["user", "after", "before", "system"],
)
def test_a_hint_stands_where_it_would_in_the_whole_dialogue(hint: Hint, expected: list) -> None:
    student, teacher, _ = made(hint, episode(wrong=5, fix="Hint : 5"))
    assert student == text(DIALOGUE)
    assert teacher == text(expected)


@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        ("hinted", "so 6 <|im_end|>"),
        ("after_hint", "so 6 <|im_end|> 5 . <|im_end|>"),
    ],
)
def test_the_replies_that_a_hint_concerns_are_scored(scored: str, expected: str) -> None:
    assert made(Hint("fix", turn=3), episode(fix="Hint : 5"), scored=scored)[2] == expected


@pytest.mark.parametrize("scored", ["hinted", "after_hint"])
@pytest.mark.parametrize("prompt", [PROMPT, "What is 1 + 2 ?"], ids=["chat", "text"])
def test_without_a_hint_nothing_is_scored(prompt: Any, scored: str) -> None:
    row = {"prompt": prompt}
    one = Episode(row, prompt, 0, [ids("3 <|im_end|>")], ["3"])
    assert made(NONE, one, scored=scored)[2] == ""
    assert made(NONE, one)[2] == "3 <|im_end|>"
    assert made(Hint(lambda row: "Hint : 3"), one, scored=scored)[2] == "3 <|im_end|>"


def test_ids_are_those_sampled_and_a_cut_reply_is_closed_unscored() -> None:
    one = episode()
    one.completions[0] = ids("3 <s> <pad>")  # as text "3", and without an end token
    one.completions[2] = ids("5 . . .")
    student, _, scored = made(NONE, one)
    begin = text([*PROMPT, reply("3 <s> <pad>"), *SAID[0]])
    assert student.startswith(begin + " ")
    assert scored == "3 <s> <pad> so 6 <|im_end|> 5 . . ."
    assert student.endswith("5 . . .")


def test_hints_read_what_the_student_wrote_and_what_was_said_to_it() -> None:
    seen: list[dict[str, Any]] = []

    def hint(row: Any) -> str:
        seen.append(row)
        return "Hint : " + row["attempt"]

    row = {"prompt": PROMPT, "answer": "5", "feedback": "of the data"}
    _, teacher, _ = made(hint, episode(row, feedback="no"))
    assert "Hint : 5 ." in teacher
    assert seen[0]["dialogue"] == DIALOGUE
    assert (seen[0]["answer"], seen[0]["feedback"], seen[0]["sibling"]) == ("5", "no", None)


def test_hints_of_a_text_prompt_read_the_rollout_too() -> None:
    row = {"prompt": "What is 1 + 2 ?"}
    one = Episode(row, row["prompt"], 0, [ids("5 <|im_end|>")], ["5"], columns={"feedback": "no"})
    _, teacher, _ = made(Hint("Hint : {attempt} , {feedback}", separator=" "), one)
    assert teacher == "What is 1 + 2 ? Hint : 5 , no 5 <|im_end|>"


def test_a_sibling_is_the_best_other_attempt_that_has_succeeded() -> None:
    def attempt(group: int, text: str, **columns: Any) -> Episode:
        return Episode({}, "", group, texts=["first", text], columns=columns)

    group = [attempt(0, "a", score=0.0), attempt(0, "b", score=2.0), attempt(0, "c", score=1.0)]
    other = [attempt(1, "d", score=3.0), attempt(1, "e", score=-1.0), attempt(2, "f", score=1.0)]
    unscored = [attempt(3, "g"), attempt(3, "h")]
    share_siblings([*group, *other, *unscored])
    found = [e.seen()["sibling"] for e in (*group, *other, *unscored)]
    assert found == ["b", "c", "b", None, "d", None, None, None]


def test_an_optional_hint_is_left_out_where_its_column_is_none() -> None:
    hints = [Hint("said : {sibling}", optional=True), Hint("{feedback}", separator=" ")]
    _, teacher, _ = made(hints, episode(feedback="no"))
    expected = [PROMPT[0], user("What is 1 + 2 ? no"), *DIALOGUE[2:]]
    assert teacher == text(expected)
    with pytest.raises(ValueError, match="the hint's column 'sibling' must not be None"):
        made(Hint("{sibling}"), episode())


def test_hints_that_are_cut_are_told_as_they_stand() -> None:
    collator = HintCollator(
        models.tokenizer(), Hint("{fix}", separator=" "), max_hint_length=2, truncation="hint"
    )
    long, short = episode(fix="1 2 3 4"), episode(fix="5")
    batch, hints = collator.from_episodes([long, short])
    assert [list(x) for x in hints] == [["1 2"], ["5"]]
    assert batch["teacher_hint_truncated"].tolist() == [True, False]


def test_the_next_context_is_the_dialogue_so_far() -> None:
    one = Episode({"prompt": PROMPT}, PROMPT, 0, [ids("3 <|im_end|>")], ["3"], SAID[:1])
    got = words(HintCollator(models.tokenizer()).next_context(one))
    assert got == text(DIALOGUE[:4]) + " <|im_start|> assistant"


def played(
    environment: Any, *replies: list[str], **settings: Any
) -> tuple[list[Episode], list[list[str]]]:
    """Episodes with the replies of each round, and the contexts that each round was given."""
    asked: list[list[str]] = []

    def sample(prompts: Sequence[Sequence[int]], turn: int) -> list[list[int]]:
        asked.append([words(prompt) for prompt in prompts])
        return [ids(text) for text in replies[turn]]

    collator = HintCollator(models.tokenizer())
    row, context = {"prompt": PROMPT}, collator.context_ids(PROMPT)
    episodes = [Episode(row, PROMPT, i, context=context) for i in range(len(replies[0]))]
    settings = {"max_turns": 3, "end_ids": [models.EOS]} | settings
    play(episodes, sample, collator, environment, **settings)
    return episodes, asked


def test_rounds_add_to_what_was_said_and_told() -> None:
    again = [user("What ?")]

    def environment(attempts: Sequence[Attempt]) -> list[Feedback]:
        return [Feedback(again, {f"told {a.turn}": a.text, "last": a.turn}) for a in attempts]

    (one,), asked = played(environment, ["3 <|im_end|>"], ["so 6 <|im_end|>"], max_turns=2)
    begun = text(PROMPT), text([*PROMPT, reply("3"), *again])
    assert asked == [[f"{context} <|im_start|> assistant"] for context in begun]
    assert one.columns == {"told 0": "3", "told 1": "so 6", "last": 1}
    again.clear()  # the environment's list is its own
    assert one.said == [[user("What ?")]]


def test_a_reply_may_end_with_any_of_the_end_tokens() -> None:
    ended: list[list[bool]] = []

    def environment(attempts: Sequence[Attempt]) -> list[Feedback]:
        ended.append([a.ended for a in attempts])
        return [Feedback([user("What ?")]) for _ in attempts]

    end_ids = [models.EOS, *ids("done")]
    rounds = ["5 <|im_end|>", "3 done", "6 ."], [". done", "so ."]
    (first, second, cut), asked = played(environment, *rounds, end_ids=end_ids, max_turns=2)
    assert ended == [[True, True, False], [True, False]]
    closed = text([*PROMPT, reply("3 done"), user("What ?")])
    assert asked[1][1] == f"{closed} <|im_start|> assistant"
    assert (first.texts, second.texts, cut.texts) == (["5", ". done"], ["3 done", "so ."], ["6 ."])


def test_thoughts_that_a_template_drops_later_stay_in_the_row() -> None:
    tokenizer = models.tokenizer()
    # an empty thought is written in front of the last reply only, as Qwen3's template does
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['role'] == 'assistant' and "
        "loop.last %}think done {% endif %}{{ m['content'] }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    one = Episode(
        {"prompt": PROMPT},
        PROMPT,
        0,
        [ids("think so done 3 <|im_end|>"), ids("think done 6 <|im_end|>")],
        ["think so done 3", "think done 6"],
        SAID[:1],
    )
    batch, _ = HintCollator(tokenizer, NONE).from_episodes([one])
    written = [*PROMPT, reply("think so done 3"), *SAID[0], reply("think done 6")]
    assert words(batch["input_ids"][0]) == text(written)


def test_a_template_without_end_tokens_cannot_go_on() -> None:
    with pytest.raises(ValueError, match="the chat template writes none of id 2"):
        ids_between_replies(
            [user("hi")], lambda messages, prompt: [5] * len(messages), TurnEnds((2,), 2)
        )


@pytest.mark.parametrize("name", ["attempt", "dialogue", "sibling"])
def test_the_rollouts_columns_are_its_own(name: str) -> None:
    row = {"prompt": PROMPT, name: "x"}
    with pytest.raises(ValueError, match=f"row 0 of the batch: the column '{name}' is the rollout"):
        made(NONE, episode(row))


def test_a_hint_behind_the_last_reply_is_an_error() -> None:
    with pytest.raises(ValueError, match="the last is message 7; got 'after' of message 7"):
        made(Hint("fix", where="after", turn=7), episode(fix="Hint : 5"))
