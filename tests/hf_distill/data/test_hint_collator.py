"""Hints and HintCollator token by token, with a word-level tokenizer and a ChatML-like template."""

import copy
from typing import Any

import pytest

from hf_distill import Hint, HintCollator
from tests.hf_distill.trainers import models

PROMPT = "What is 1 + 2 ?"
CHAT = [{"role": "user", "content": PROMPT}]
SYSTEM_CHAT = [{"role": "system", "content": "You are brief ."}, *CHAT]
TURNS = [
    *SYSTEM_CHAT,
    {"role": "assistant", "content": "The answer is 3 ."},
    {"role": "user", "content": "What is 3 + 2 ?"},
]
PROMPTS = {"text": PROMPT, "chat": CHAT, "system": SYSTEM_CHAT, "turns": TURNS}
HINT_WORD = "Hint"
SOURCES = {
    "column": "hint",
    "template": "Hint : {answer}",
    "callable": lambda row: f"Hint : {row['answer']}",
}


def row(prompt: Any = PROMPT, completion: Any = "The answer is 3 .") -> dict[str, Any]:
    return {"prompt": prompt, "hint": "Hint : 3", "answer": 3, "completion": completion}


def words(ids: Any) -> str:
    return " ".join(models.WORDS[i] for i in ids)


def expected_teacher(name: str, where: str) -> str:
    """What the teacher reads, written by hand."""
    user, system = "<|im_start|> user", "<|im_start|> system"
    end, reply = "<|im_end|>", "<|im_start|> assistant"
    brief = "You are brief ."
    first = {
        "text": {"user": f"{PROMPT} Hint : 3", "system": f"Hint : 3 {PROMPT}"},
        "chat": {
            "user": f"{user} {PROMPT} Hint : 3 {end} {reply}",
            "system": f"{system} Hint : 3 {end} {user} {PROMPT} {end} {reply}",
        },
        "system": {
            "user": f"{system} {brief} {end} {user} {PROMPT} Hint : 3 {end} {reply}",
            "system": f"{system} {brief} Hint : 3 {end} {user} {PROMPT} {end} {reply}",
        },
    }
    if name in first:
        return first[name][where]
    turns = f"{user} {PROMPT} {end} {reply} The answer is 3 . {end} {user} What is 3 + 2 ?"
    hint_in_system, hint_in_user = (
        " Hint : 3" if where == place else "" for place in ("system", "user")
    )
    return f"{system} {brief}{hint_in_system} {end} {turns}{hint_in_user} {end} {reply}"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("where", ["user", "system"])
@pytest.mark.parametrize("name", PROMPTS)
def test_only_the_teacher_reads_the_hint(name: str, where: str, source: str) -> None:
    prompt, tokenizer = PROMPTS[name], models.tokenizer()
    if isinstance(prompt, str):
        alone = tokenizer(prompt)["input_ids"]
    else:
        template = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        alone = tokenizer(template)["input_ids"]
    collator = HintCollator(tokenizer, Hint(SOURCES[source], where))
    batch = collator([row(prompt)])
    completion = tokenizer("The answer is 3 . <|im_end|>")["input_ids"]
    assert batch["input_ids"].tolist() == [alone + completion]
    assert HINT_WORD not in words(batch["input_ids"][0])
    answer = "The answer is 3 . <|im_end|>"
    assert words(batch["teacher_input_ids"][0]) == f"{expected_teacher(name, where)} {answer}"
    contexts = collator.contexts([row(prompt)])
    assert contexts["prompt_ids"].tolist() == [alone]
    assert words(contexts["teacher_prompt_ids"][0]) == expected_teacher(name, where)


def test_labels_and_maps_point_at_the_completion() -> None:
    batch = HintCollator(models.tokenizer())([row(), row(CHAT, "so 3")])
    for i, text in enumerate(("The answer is 3 . <|im_end|>", "so 3 <|im_end|>")):
        scored = batch["labels"][i][batch["labels"][i] != -100]
        assert words(scored) == text
        for ids, index in (
            ("input_ids", "completion_index"),
            ("teacher_input_ids", "teacher_completion_index"),
        ):
            at = batch[index][i][batch[index][i] >= 0]
            assert words(batch[ids][i, at]) == text


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_end_token_is_scored_and_padding_is_not(pad_is_eos: bool) -> None:
    tokenizer = models.tokenizer(pad_is_eos)
    batch = HintCollator(tokenizer)([row(completion="3"), row(completion="The answer is 3 .")])
    labels, mask = batch["labels"], batch["attention_mask"]
    assert tokenizer.pad_token_id == (models.EOS if pad_is_eos else models.PAD)
    assert words(labels[0][labels[0] != -100]) == "3 <|im_end|>"
    assert (labels[0][mask[0] == 0] == -100).all()
    assert (batch["input_ids"][0][mask[0] == 0] == tokenizer.pad_token_id).all()
    assert mask.sum(1).tolist() == [6 + 2, 6 + 6]


def test_an_end_token_in_the_text_is_not_doubled() -> None:
    batch = HintCollator(models.tokenizer())([row(completion="3 <|im_end|>")])
    assert words(batch["input_ids"][0]) == f"{PROMPT} 3 <|im_end|>"


def test_completion_as_messages_ends_at_its_end_token() -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = models.TEMPLATE.replace("<|im_end|> '", "<|im_end|> , '")
    completion = [{"role": "assistant", "content": "The answer is 3 ."}]
    batch = HintCollator(tokenizer)([row(CHAT, completion)])
    labels = batch["labels"][0]
    assert words(labels[labels != -100]) == "The answer is 3 . <|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_an_error() -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = "{{ messages | length }} " + models.TEMPLATE
    completion = [{"role": "assistant", "content": "3"}]
    with pytest.raises(ValueError, match=r"row 0 of the batch: the chat template must render prom"):
        HintCollator(tokenizer)([row(CHAT, completion)])


def test_a_text_prompt_needs_a_text_completion() -> None:
    completion = [{"role": "assistant", "content": "3"}]
    with pytest.raises(ValueError, match="a text prompt needs a text completion"):
        HintCollator(models.tokenizer())([row(PROMPT, completion)])


@pytest.mark.parametrize("where", ["user", "system"])
def test_rows_are_not_changed(where: str) -> None:
    rows = [row(SYSTEM_CHAT), row(TURNS, [{"role": "assistant", "content": "so 5"}])]
    before = copy.deepcopy(rows)
    collator = HintCollator(models.tokenizer(), Hint("hint", where))
    first = collator(rows)
    assert rows == before
    assert all((first[name] == value).all() for name, value in collator(rows).items())


def test_template_arguments_reach_both_sides() -> None:
    collator = HintCollator(models.tokenizer(), chat_template_kwargs={"think": True})
    batch = collator.contexts([row(CHAT)])
    for ids in (batch["prompt_ids"][0], batch["teacher_prompt_ids"][0]):
        assert words(ids).endswith("<|im_start|> assistant think")
    messages = [{"role": "assistant", "content": "3"}]
    whole = HintCollator(models.tokenizer(), chat_template_kwargs={"think": False})
    assert "think" not in words(whole([row(CHAT, messages)])["input_ids"][0])


def test_contexts_are_padded_on_the_left() -> None:
    batch = HintCollator(models.tokenizer()).contexts([row("Sum of 1 and 2 ?"), row("What is 1 ?")])
    assert words(batch["prompt_ids"][1]) == "<pad> <pad> What is 1 ?"
    assert batch["prompt_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert batch["teacher_prompt_mask"].tolist() == [[1] * 9, [0, 0] + [1] * 7]


def test_other_columns() -> None:
    made = {"question": PROMPT, "solution": "so 3", "answer": 3}
    collator = HintCollator(
        models.tokenizer(),
        "Hint : {answer}",
        prompt_column="question",
        completion_column="solution",
    )
    batch = collator([made])
    assert words(batch["teacher_input_ids"][0]) == f"{PROMPT} Hint : 3 so 3 <|im_end|>"


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [("max_prompt_length", 6), ("max_hint_length", 3), ("max_completion_length", 6)],
)
def test_budgets_are_inclusive(budget: str, allowed: int) -> None:
    tokenizer = models.tokenizer()
    HintCollator(tokenizer, **{budget: allowed})([row()])
    what = budget.split("_")[1]
    message = (
        rf"row 1 of the batch: the {what} of 'What is 1 \+ 2 \?'... has {allowed} tokens, "
        rf"{budget} is {allowed - 1}"
    )
    small = row("3", "3") | {"hint": "3"}
    with pytest.raises(ValueError, match=message):
        HintCollator(tokenizer, **{budget: allowed - 1})([small, row()])


@pytest.mark.parametrize("padding", [None, "eos"])
def test_padding_falls_back_on_the_end_token(padding: str | None) -> None:
    tokenizer = models.tokenizer()
    tokenizer.pad_token = None
    if padding is None:
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="must have a pad or eos token, got neither"):
            HintCollator(tokenizer)([row()])
    else:
        assert HintCollator(tokenizer).pad_token_id == models.EOS


def test_contexts_to_be_sampled_from_end_at_the_right():
    tokenizer = models.tokenizer()
    rows = [{"prompt": "What is 1 + 2 ?"}, {"prompt": "What ?"}]
    batch = HintCollator(tokenizer).prompts(rows)  # no hint is needed yet
    assert batch["rows"] == rows
    assert batch["prompt_mask"].tolist() == [[1] * 6, [0] * 4 + [1] * 2]
    short = tokenizer("What ?")["input_ids"]
    assert batch["prompt_ids"][1].tolist() == [models.PAD] * 4 + short
