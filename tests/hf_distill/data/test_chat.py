"""Hints at any turn of a dialogue, the replies that are scored, and hints that are cut."""

import copy
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from hf_distill import Hint, HintCollator
from tests.hf_distill.trainers import models


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PROMPT = [{"role": "system", "content": "You are brief ."}, user("What is 1 + 2 ?")]
# messages 2 to 6 of the dialogue; the reply at 4 is wrong
COMPLETION = [reply("3"), user("What is 3 + 2 ?"), reply("so 6"), user("What ?"), reply("5 .")]
ROW = {"prompt": PROMPT, "completion": COMPLETION, "hint": "Hint : 5", "wrong": 4}


def words(ids: Any) -> str:
    return " ".join(models.WORDS[i] for i in ids)


def text(messages: list[dict[str, str]]) -> str:
    """What a template writes, up to the last reply's end."""
    parts = [f"<|im_start|> {m['role']} {m['content']} <|im_end|>" for m in messages]
    return " ".join(parts)


def sides(collator: HintCollator, row: dict[str, Any]) -> tuple[str, str, str]:
    """What the student reads, what the teacher reads, and what is scored on both."""
    before = copy.deepcopy(row)
    batch = collator([row])
    assert row == before
    scored = []
    for ids, index in (
        ("input_ids", "completion_index"),
        ("teacher_input_ids", "teacher_completion_index"),
    ):
        scored.append(words(batch[ids][0, batch[index][0]]))
    assert scored[0] == scored[1]
    assert words(batch["labels"][0][batch["labels"][0] != -100]) == scored[0]
    return words(batch["input_ids"][0]), words(batch["teacher_input_ids"][0]), scored[0]


def changed(at: int, message: dict[str, str]) -> list[dict[str, str]]:
    messages = [*PROMPT, *COMPLETION]
    return [*messages[:at], message, *messages[at + 1 :]]


def inserted(at: int, role: str = "user") -> list[dict[str, str]]:
    messages = [*PROMPT, *COMPLETION]
    return [*messages[:at], {"role": role, "content": "Hint : 5"}, *messages[at:]]


PLACES = {
    "the user turn before the wrong reply": (
        Hint("hint", turn=3, separator=" "),
        changed(3, user("What is 3 + 2 ? Hint : 5")),
    ),
    "the last user turn of the prompt": (
        Hint("hint", separator=" "),
        changed(1, user("What is 1 + 2 ? Hint : 5")),
    ),
    "the system message": (
        Hint("hint", "system", separator=" "),
        changed(0, {"role": "system", "content": "You are brief . Hint : 5"}),
    ),
    "before the wrong reply": (Hint("hint", "before", turn="wrong"), inserted(4)),
    "after the wrong reply": (Hint("hint", "after", turn=lambda row: row["wrong"]), inserted(5)),
    "from the end": (Hint("hint", "before", turn=-1, role="system"), inserted(6, "system")),
    "after the prompt": (Hint("hint", "after"), inserted(2)),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_hint_at_any_turn(name):
    hint, expected = PLACES[name]
    student, teacher, scored = sides(HintCollator(models.tokenizer(), hint), ROW)
    assert student == text([*PROMPT, *COMPLETION])
    assert teacher == text(expected)
    assert scored == "3 <|im_end|> so 6 <|im_end|> 5 . <|im_end|>"


@pytest.mark.parametrize(
    ("hint", "scored", "expected"),
    [
        (Hint(turn=3), "hinted", "so 6 <|im_end|>"),
        (Hint(where="before", turn=4), "hinted", "so 6 <|im_end|>"),
        (Hint(where="after", turn=4), "hinted", "5 . <|im_end|>"),
        (Hint(), "hinted", "3 <|im_end|>"),
        (Hint(turn=3), "after_hint", "so 6 <|im_end|> 5 . <|im_end|>"),
        (Hint(where="after", turn=4), "after_hint", "5 . <|im_end|>"),
        (Hint(where="before", turn=4), "after_hint", "so 6 <|im_end|> 5 . <|im_end|>"),
        (Hint(where="system"), "after_hint", "3 <|im_end|> so 6 <|im_end|> 5 . <|im_end|>"),
        ([Hint(), Hint(where="before", turn=6)], "hinted", "3 <|im_end|> 5 . <|im_end|>"),
        (
            [Hint(where="after", turn=4), Hint(where="before", turn=4)],
            "after_hint",
            "so 6 <|im_end|> 5 . <|im_end|>",
        ),
    ],
)
def test_only_the_targeted_replies_are_scored(hint, scored, expected):
    student, _, got = sides(HintCollator(models.tokenizer(), hint, scored=scored), ROW)
    assert got == expected
    last = expected.removesuffix(" <|im_end|>").split("<|im_end|> ")[-1]
    assert student.endswith(f"assistant {last} <|im_end|>")  # nothing behind it is read


def test_several_hints_keep_their_places():
    hints = [
        Hint("hint", "after", turn=4),
        Hint(lambda row: "so Hint", "before", turn=4, role="system"),
        Hint("hint", turn=1, separator=" "),
        Hint("hint", "system", separator=" "),
        Hint(lambda row: None, "system"),
    ]
    _, teacher, _ = sides(HintCollator(models.tokenizer(), hints), ROW)
    assert teacher == text(
        [
            {"role": "system", "content": "You are brief . Hint : 5"},
            user("What is 1 + 2 ? Hint : 5"),
            *COMPLETION[:2],
            {"role": "system", "content": "so Hint"},
            COMPLETION[2],
            user("Hint : 5"),
            *COMPLETION[3:],
        ]
    )


def test_two_hints_of_a_dialogue_without_a_system_message_share_one():
    row = ROW | {"prompt": PROMPT[1:]}
    hints = [Hint("hint", "system", separator=" "), Hint(lambda row: "so", "system", separator=" ")]
    _, teacher, _ = sides(HintCollator(models.tokenizer(), hints), row)
    first = {"role": "system", "content": "Hint : 5 so"}
    assert teacher == text([first, PROMPT[1], *COMPLETION])


@pytest.mark.parametrize(
    ("hint", "options", "message"),
    [
        (Hint(turn=4), {}, "a hint in the user turn needs a user message, got .* at 4"),
        (Hint(where="before", turn=7), {}, "must name one of 7 messages, got 7"),
        (Hint(where="before", turn="nowhere"), {}, "turn needs column 'nowhere'"),
        (
            Hint(where="after", turn=-1),
            {"scored": "hinted"},
            r"must have a reply to score \('hinted'\), got roles .* and 1 hints",
        ),
        (
            Hint(lambda row: None),
            {"scored": "after_hint"},
            r"must have a reply to score \('after_hint'\), got roles .* and 0 hints",
        ),
    ],
)
def test_errors_name_the_row_the_rule_and_the_value(hint, options, message):
    collator = HintCollator(models.tokenizer(), hint, **options)
    with pytest.raises(ValueError, match="row 0 of the batch: .*" + message):
        collator([ROW])


def test_errors_of_arguments():
    with pytest.raises(ValueError, match=r"scored must be one of \('all', .* got 'last'"):
        HintCollator(models.tokenizer(), scored="last")
    with pytest.raises(ValueError, match=r"truncation must be one of .* got 'prompt'"):
        HintCollator(models.tokenizer(), truncation="prompt")
    with pytest.raises(ValueError, match="a hint in the system message has no turn, got 3"):
        Hint(where="system", turn=3)
    row = ROW | {"prompt": "What ?", "completion": "3"}
    with pytest.raises(ValueError, match="needs chat messages, got text"):
        HintCollator(models.tokenizer(), Hint(where="after"))([row])


def test_a_template_that_rewrites_earlier_replies_is_an_error():
    """As those that drop the reasoning of every reply but the last."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.role }} "
        "{% if m.role != 'assistant' or loop.last %}{{ m.content }} {% endif %}<|im_end|> "
        "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    with pytest.raises(ValueError, match="renders message 2 otherwise once others follow it"):
        HintCollator(tokenizer)([ROW])
    _, _, scored = sides(HintCollator(tokenizer, Hint(turn=3), scored="hinted"), ROW)
    assert scored == "so 6 <|im_end|>"


@pytest.mark.parametrize("completion", ["so 3", [reply("so 3")]])
@pytest.mark.parametrize("prompt", ["What is 1 + 2 ?", PROMPT])
def test_a_hint_over_its_budget_is_cut_at_its_end_and_counted(prompt, completion):
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = PROMPT
    row = ROW | {"prompt": prompt, "completion": completion, "hint": "Hint : 1 + 2 = 3 ."}
    options = {"truncation": "hint", "max_hint_length": 3}
    collator = HintCollator(models.tokenizer(), Hint(separator=" "), **options)
    batch = collator([row, row | {"hint": "Hint"}])
    assert batch["teacher_hint_truncated"].tolist() == [True, False]
    teacher = words(batch["teacher_input_ids"][0])
    assert "Hint : 1 " in teacher
    assert "=" not in teacher
    added = batch["teacher_attention_mask"].sum(1) - batch["attention_mask"].sum(1)
    assert added.tolist() == [3, 1]
    contexts = collator.contexts([row])
    assert "Hint : 1 " in words(contexts["teacher_prompt_ids"][0]) + " "
    assert contexts["teacher_hint_truncated"].tolist() == [True]


def test_the_longest_hint_is_cut_first_and_none_to_nothing():
    hints = [Hint(lambda row: "Hint : 3 ."), Hint(lambda row: "so", "system")]
    row = ROW | {"prompt": "What ?", "completion": "3"}
    options = {"truncation": "hint", "max_hint_length": 3}
    batch = HintCollator(models.tokenizer(), hints, **options)([row])
    assert words(batch["teacher_input_ids"][0]) == "so What ? Hint : 3 <|im_end|>"
    options["max_hint_length"] = 1
    with pytest.raises(ValueError, match=r"the hint of .* has 2 tokens, max_hint_length is 1"):
        HintCollator(models.tokenizer(), hints, **options)([row])


def bytewise() -> PreTrainedTokenizerFast:
    """A token for each byte, as where a vocabulary lacks a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(
    ("hint", "budget", "kept"), [("ab\U0001f642c", 5, "ab"), ("\u6570\u5b66", 5, "\u6570")]
)
def test_a_character_of_several_tokens_is_cut_as_a_whole(hint, budget, kept):
    options = {"truncation": "hint", "max_hint_length": budget}
    collator = HintCollator(bytewise(), Hint(lambda row: hint, separator=""), **options)
    ids = collator.contexts([{"prompt": "hi"}])["teacher_prompt_ids"][0]
    assert collator.tokenizer.decode(ids) == "hi" + kept


def test_the_longest_hint_is_that_of_most_tokens():
    options = {"truncation": "hint", "max_hint_length": 6}
    hints = [Hint(lambda row, x=x: x, separator="") for x in ("abc", "\u6570\u5b66")]
    ids = HintCollator(bytewise(), hints, **options).contexts([{"prompt": "hi"}])
    assert bytewise().decode(ids["teacher_prompt_ids"][0]) == "hiabc\u6570"


def test_a_character_longer_than_the_budget_is_an_error():
    options = {"truncation": "hint", "max_hint_length": 2}
    collator = HintCollator(bytewise(), Hint(lambda row: "\U0001f642", separator=""), **options)
    with pytest.raises(ValueError, match="has 4 tokens, max_hint_length is 2"):
        collator.contexts([{"prompt": "hi"}])


@pytest.mark.parametrize("text", ["wrong", "Hint : {wrong}", "{wrong[0]}", "{wrong.a:>3}"])
def test_a_column_that_is_none_is_an_error(text):
    row = ROW | {"wrong": None}
    with pytest.raises(ValueError, match="the hint's column 'wrong' must not be None"):
        HintCollator(models.tokenizer(), Hint(text))([row])


def test_a_column_may_have_any_name():
    row = {"prompt": "What ?", "meta.hint:v2": "Hint : 5"}
    ids = HintCollator(models.tokenizer(), "meta.hint:v2").contexts([row])["teacher_prompt_ids"]
    assert words(ids[0]) == "What ? Hint : 5"


@pytest.mark.parametrize("where", ["user", "system"])
def test_content_in_parts_gets_a_part_more(where):
    parts = [{"type": "text", "text": "What ?"}]
    prompt = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
    before = copy.deepcopy(prompt)
    hinted = Hint(where=where).insert(prompt, "5")
    assert prompt == before
    at = 0 if where == "system" else 1
    assert hinted[at]["content"] == [*parts, {"type": "text", "text": "\n\n5"}]
    assert hinted[1 - at] == prompt[1 - at]
    with pytest.raises(ValueError, match="needs a message with content to append to"):
        Hint().insert([{"role": "user", "content": None}], "5")


def test_a_turn_of_numpy():
    row = ROW | {"wrong": np.int64(4)}
    _, teacher, _ = sides(HintCollator(models.tokenizer(), Hint(where="before", turn="wrong")), row)
    assert teacher == text(inserted(4))


def test_a_hint_that_no_scored_reply_reads_is_an_error():
    row = ROW | {"completion": [*COMPLETION, user("What ?")]}
    for hint in (Hint(turn=-1), [Hint(), Hint(where="after", turn=6)]):
        with pytest.raises(ValueError, match="must stand before a reply that is scored, the last"):
            HintCollator(models.tokenizer(), hint)([row])
