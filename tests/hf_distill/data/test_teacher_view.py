"""What the teacher's context has of its own: template, system message, the reference alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import Hint, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.alignment import assert_aligned
from tests.hf_distill.data import templates
from tests.hf_distill.data.test_hint_collator import CHAT, PROMPT, SYSTEM_CHAT, TURNS, row, words
from tests.hf_distill.trainers import models

END, USER, REPLY = "<|im_end|>", "<|im_start|> user", "<|im_start|> assistant"
SYSTEM = "<|im_start|> system"
THINKS = {"teacher_template_kwargs": {"think": True}, "student_template_kwargs": {"think": False}}
DIALOGUE = [
    {"role": "assistant", "content": "The answer is 3 ."},
    {"role": "user", "content": "What is 3 + 2 ?"},
    {"role": "assistant", "content": "5"},
]


def collator(hint: Any = "hint", **settings: Any) -> HintCollator:
    return HintCollator(models.tokenizer(), hint, **settings)


def contexts(made: HintCollator, prompt: Any) -> list[str]:
    """What student and teacher read in front of a reply."""
    batch = made.contexts([row(prompt)])
    return [words(batch[f"{side}prompt_ids"][0]) for side in ("", "teacher_")]


def rows_of(batch: dict[str, torch.Tensor]) -> tuple[str, str, str, str]:
    """Both rows, and what each of them scores."""
    found = []
    for prefix in ("", "teacher_"):
        ids, mask = batch[f"{prefix}input_ids"][0], batch[f"{prefix}attention_mask"][0].bool()
        at = batch[f"{prefix}completion_index"][0]
        found += [words(ids[mask]), words(ids[at])]
    student, scored, teacher, theirs = found
    return student, teacher, scored, theirs


def test_each_side_has_arguments_of_its_own() -> None:
    student, teacher = contexts(collator(**THINKS), CHAT)
    assert student == f"{USER} {PROMPT} {END} {REPLY}"
    assert teacher == f"{USER} {PROMPT} Hint : 3 {END} {REPLY} think"
    both = {"chat_template_kwargs": {"think": True}}
    assert [x.endswith("think") for x in contexts(collator(**both), CHAT)] == [True, True]
    student, teacher = contexts(collator(**both, student_template_kwargs={"think": False}), CHAT)
    assert (student.endswith("think"), teacher.endswith("think")) == (False, True)


@pytest.mark.parametrize("scored", ["all", "hinted"])
@pytest.mark.parametrize("completion", ["The answer is 3 .", DIALOGUE])
def test_both_sides_score_the_students_tokens(completion: Any, scored: str) -> None:
    hint = (
        Hint("hint", where="user", turn=2)
        if scored == "hinted" and completion is DIALOGUE
        else "hint"
    )
    given = row(CHAT, completion)
    plain = collator(hint, scored=scored)([given])
    batch = collator(hint, scored=scored, **THINKS)([given])
    student, teacher, one, other = rows_of(batch)
    assert one == other
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["labels"], plain["labels"])
    assert REPLY + " think" in teacher
    assert "think" not in student


def test_a_thinking_template_that_writes_replies_otherwise() -> None:
    """Qwen3's kind writes an empty thought in front of the last reply unless thinking is off."""
    off_too = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    template = templates.THINKING.replace("assistant\n{%", f"assistant\n{off_too}{{% endif %}}{{%")
    assert template != templates.THINKING
    ends = ["<|im_start|>", "<|im_end|>"]
    tokenizer = templates.characters(template, ends, words=["<think>", "</think>"])
    given = {"prompt": [{"role": "user", "content": "2+2?"}], "hint": "it is 4"}
    given["completion"] = [{"role": "assistant", "content": "4"}]
    off, on = ({"enable_thinking": x} for x in (False, True))
    sides = [HintCollator(tokenizer, [], chat_template_kwargs=x)([given]) for x in (off, on)]
    counts = [int((x["labels"] != -100).sum()) for x in sides]
    assert counts[0] < counts[1], "rendered alone, the teacher would score its empty thought"
    made = HintCollator(tokenizer, "hint", student_template_kwargs=off, teacher_template_kwargs=on)
    batch = made([given])
    assert_aligned(batch)
    assert torch.equal(batch["labels"], sides[0]["labels"])


@pytest.mark.parametrize("completion", [DIALOGUE, DIALOGUE[:1]])
@pytest.mark.parametrize("scored", ["all", "after_hint"])
def test_replies_as_ids_are_those_that_the_template_writes(completion: Any, scored: str) -> None:
    """With an argument that no template reads, rows are those without it."""
    given = row(SYSTEM_CHAT, completion)
    plain = collator(scored=scored)([given])
    other = collator(scored=scored, teacher_template_kwargs={"unread": 1})([given])
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_without_hints_the_teacher_still_has_its_view() -> None:
    batch = collator([], **THINKS)([row(CHAT)])
    student, teacher, one, other = rows_of(batch)
    assert teacher == student.replace(REPLY, f"{REPLY} think")
    assert one == other == "The answer is 3 . <|im_end|>"


@pytest.mark.parametrize(
    ("hint", "prompt", "expected"),
    [
        ("hint", CHAT, f"{SYSTEM} get {END} {USER} {PROMPT} Hint : 3 {END} {REPLY}"),
        ("hint", SYSTEM_CHAT, f"{SYSTEM} get {END} {USER} {PROMPT} Hint : 3 {END} {REPLY}"),
        (
            Hint("hint", where="system"),
            SYSTEM_CHAT,
            f"{SYSTEM} get Hint : 3 {END} {USER} {PROMPT} {END} {REPLY}",
        ),
        (
            Hint("hint", where="after", turn=0),
            CHAT,
            f"{SYSTEM} get {END} {USER} {PROMPT} {END} {USER} Hint : 3 {END} {REPLY}",
        ),
    ],
)
def test_a_system_message_of_the_teachers_own(hint: Any, prompt: Any, expected: str) -> None:
    student, teacher = contexts(collator(hint, teacher_system_prompt="get"), prompt)
    assert teacher == expected
    assert "get" not in student


def test_replies_stay_where_they_are_behind_a_system_message() -> None:
    hint = Hint("hint", where="user", turn=2)
    made = collator(hint, teacher_system_prompt="get", scored="hinted")
    student, teacher, one, other = rows_of(made([row(CHAT, DIALOGUE)]))
    first = f"{USER} {PROMPT} {END} {REPLY} The answer is 3 . {END} {USER} What is 3 + 2 ?"
    assert teacher == f"{SYSTEM} get {END} {first} Hint : 3 {END} {REPLY} 5 {END}"
    assert student == f"{first} {END} {REPLY} 5 {END}"
    assert one == other == f"5 {END}"


@pytest.mark.parametrize(
    ("prompt", "settings", "expected"),
    [
        (PROMPT, {}, "Hint : 3"),
        (CHAT, {}, f"{USER} Hint : 3 {END} {REPLY}"),
        (SYSTEM_CHAT, {}, f"{SYSTEM} You are brief . {END} {USER} Hint : 3 {END} {REPLY}"),
        (TURNS, {}, f"{SYSTEM} You are brief . {END} {USER} Hint : 3 {END} {REPLY}"),
        (
            TURNS,
            {"teacher_system_prompt": "get", **THINKS},
            f"{SYSTEM} get {END} {USER} Hint : 3 {END} {REPLY} think",
        ),
        (
            [*CHAT, {"role": "assistant", "content": "The"}],
            {},
            f"{USER} Hint : 3 {END} {REPLY} The",
        ),
    ],
)
def test_a_teacher_that_sees_the_reference_only(
    prompt: Any, settings: dict[str, Any], expected: str
) -> None:
    student, teacher = contexts(collator(teacher_sees="reference", **settings), prompt)
    assert teacher == expected
    assert "Hint" not in student


def test_two_hints_of_the_reference_only() -> None:
    hints = [Hint("hint"), Hint("{answer}", separator=" = ")]
    for prompt, ends in ((PROMPT, ""), (CHAT, f" {END} {REPLY}")):
        _, teacher = contexts(collator(hints, teacher_sees="reference"), prompt)
        assert teacher == ("Hint : 3 = 3" if not ends else f"{USER} Hint : 3 = 3{ends}")


def test_the_reference_only_of_a_dialogue() -> None:
    made = collator(teacher_sees="reference")
    _, teacher, one, other = rows_of(made([row(SYSTEM_CHAT, DIALOGUE)]))
    start = f"{SYSTEM} You are brief . {END} {USER} Hint : 3 {END} {REPLY} The answer is 3 . {END}"
    assert teacher == f"{start} {USER} What is 3 + 2 ? {END} {REPLY} 5 {END}"
    assert one == other == f"The answer is 3 . {END} 5 {END}"


def test_a_budget_counts_what_hints_add_and_nothing_else() -> None:
    settings = {**THINKS, "teacher_system_prompt": "You are brief .", "max_hint_length": 3}
    assert contexts(collator(**settings), CHAT)[1].count("Hint : 3") == 1
    with pytest.raises(ValueError, match="has 3 tokens, max_hint_length is 2"):
        contexts(collator(**settings | {"max_hint_length": 2}), CHAT)
    cut = collator(**settings | {"max_hint_length": 2}, truncation="hint")
    assert contexts(cut, CHAT)[1].endswith(f"{PROMPT} Hint : {END} {REPLY} think")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_sees": "hints"}, r"teacher_sees must be one of \('prompt', 'reference'\), got"),
        ({"teacher_system_prompt": " "}, "teacher_system_prompt must have text, or be None, got"),
        (
            {"teacher_sees": "reference", "max_hint_length": 4},
            "a teacher that sees the reference only has not, got 4",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator(**settings)


def test_what_a_row_must_have() -> None:
    with pytest.raises(ValueError, match="row 0 of the batch: teacher_system_prompt needs prompts"):
        contexts(collator(teacher_system_prompt="get"), PROMPT)
    with pytest.raises(ValueError, match="reference only needs a hint in each row, got none"):
        contexts(collator([], teacher_sees="reference"), CHAT)


def test_a_training_step_with_a_teacher_that_thinks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The check without hints compares like with like; what was sampled is scored on both sides."""
    made = collator(**THINKS, teacher_system_prompt="You are brief .")
    args = OPSDConfig(**models.options(tmp_path, max_steps=1, max_completion_length=4))
    rows = models.problems(8, chat=True)
    trainer = OPSDTrainer(models.llama(), args, made, rows, processing_class=models.tokenizer())
    caplog.set_level(logging.INFO)
    trainer.train()
    (step,) = models.steps(trainer)
    assert step["soft"] > 0.01
    assert step["tokens"] == step["completion_length"] * 4
    said = [record.getMessage() for record in caplog.records]
    assert any(x.startswith("without a hint student and teacher are 0.0e+00") for x in said)
    assert not any("does not contain" in x for x in said)
