"""Where texts and replies begin and end: tokens around texts, ends of turns, begun replies."""

from typing import Any

import pytest
from transformers import AddedToken

from hf_distill import CrossTokenizerCollator, Hint, HintCollator
from hf_distill.data.episodes import Episode
from hf_distill.data.turn_ends import find_turn_ends, tell_end_tokens
from tests.hf_distill.data import templates
from tests.hf_distill.data.templates import TEMPLATES, characters, family
from tests.hf_distill.data.test_chat import reply, user

ASK = [user("1+1=?")]
DIALOGUE = [reply("it is 2"), user("and 2+2=?"), reply("that is 4")]
PLACES = {
    "user": Hint(separator=" "),
    "system": Hint(where="system"),
    "before": Hint(where="before"),
    "after": Hint(where="after"),
}


def row(prompt: Any, completion: Any = "2", hint: str = "two") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "hint": hint}


def scored(collator: HintCollator, made: dict[str, Any]) -> list[str]:
    """The scored tokens of a row, as text, one string a stretch; the same on both sides."""
    batch = collator([made])
    labels = batch["labels"][0].tolist()
    at = [i for i, label in enumerate(labels) if label != -100]
    starts = [i for i in at if i - 1 not in at]
    stretches = [[] for _ in starts]
    for i in at:
        stretches[sum(start <= i for start in starts) - 1].append(labels[i])
    return [collator.tokenizer.decode(x) for x in stretches]


# ---- texts


@pytest.mark.parametrize("around", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("where", ["user", "system"])
def test_a_text_goes_on_without_the_token_that_ends_texts(around: str | None, where: str) -> None:
    tokenizer = characters(around=around)
    collator = HintCollator(tokenizer, Hint(where=where, separator=" "))
    start = "<s>" * bool(around and around.startswith("<s>"))
    shown = {"user": "1+1= two", "system": "two 1+1="}[where]
    contexts = collator.contexts([row("1+1=")])
    assert tokenizer.decode(contexts["prompt_ids"][0]) == f"{start}1+1="
    assert tokenizer.decode(contexts["teacher_prompt_ids"][0]) == start + shown
    batch = collator([row("1+1=")])
    assert tokenizer.decode(batch["input_ids"][0]) == f"{start}1+1=2</s>"
    assert tokenizer.decode(batch["teacher_input_ids"][0]) == f"{start}{shown}2</s>"
    assert scored(collator, row("1+1=")) == ["2</s>"]


def test_a_classifier_and_a_separator_are_a_start_and_an_end() -> None:
    tokenizer = characters(around="<s> $A </s>")
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    collator = HintCollator(tokenizer, [])
    assert tokenizer.decode(collator.prompts([row("ab")])["prompt_ids"][0]) == "<s>ab"
    assert tokenizer.decode(collator.prompts([row("")])["prompt_ids"][0]) == "<s>"
    assert scored(collator, row("ab", "c")) == ["c"]  # no token that ends completions is known
    told = collator.with_end_tokens([tokenizer.sep_token_id])
    assert scored(told, row("ab", "c")) == ["c</s>"]


@pytest.mark.parametrize("where", ["user", "system"])
def test_a_rendered_prompt_gets_no_second_start_token(where: str) -> None:
    template = TEMPLATES["llama3"][0]
    tokenizer = characters(template, ["<|header|>", "<|/header|>", "<|eot_id|>"], "<s> $A")
    collator = HintCollator(tokenizer, Hint(where=where, separator=" "))
    text = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    as_text, as_chat = (collator.contexts([row(x)]) for x in (text, ASK))
    assert as_text["prompt_ids"].tolist() == as_chat["prompt_ids"].tolist()
    teacher = tokenizer.decode(as_text["teacher_prompt_ids"][0])
    assert teacher.count("<s>") == 1
    assert teacher.startswith("<s>")
    # and its completion ends as a reply of the chat does
    assert scored(collator, row(text)) == ["2<|eot_id|>"]
    assert scored(collator, row(ASK)) == ["2<|eot_id|>"]


def test_an_end_token_that_the_user_wrote_stays() -> None:
    collator = HintCollator(characters(around="<s> $A </s>"), [])
    ids = collator.prompts([row("ab</s>")])["prompt_ids"][0]
    assert collator.tokenizer.decode(ids) == "<s>ab</s>"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ending", ["", "{end}", "{end}\n", "{end}\n</s>"])
def test_a_text_completion_ends_once(name: str, ending: str) -> None:
    tokenizer, _ = family(name)
    end = TEMPLATES[name][1]
    made = row(ASK, "2" + ending.format(end=end))
    assert scored(HintCollator(tokenizer), made) == [f"2{end}"]


def test_an_end_token_inside_a_completion_is_not_its_end() -> None:
    assert scored(HintCollator(characters()), row("1", "a</s>b")) == ["a</s>b</s>"]


# ---- ends of turns


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_ends_with_the_token_that_ends_turns(name: str, told: bool) -> None:
    tokenizer, end = family(name)
    collator = HintCollator(tokenizer)
    if told:  # Phi 3's model names the opening of a reply as an end token as well
        opening = tokenizer.convert_tokens_to_ids("<|assistant|>")
        collator = collator.with_end_tokens([end, opening, tokenizer.eos_token_id])
    assert collator.ends.turn == end
    found = scored(collator, row(ASK, DIALOGUE))
    assert [x.count(TEMPLATES[name][1]) for x in found] == [1, 1]
    assert all(x.endswith(TEMPLATES[name][1]) for x in found)
    whole = tokenizer.apply_chat_template([*ASK, *DIALOGUE], return_dict=True)["input_ids"]
    ids = collator([row(ASK, DIALOGUE)])["input_ids"][0].tolist()
    assert whole[: len(ids)] == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_dialogue_that_was_sampled_is_the_templates(name: str) -> None:
    tokenizer, _ = family(name)
    collator = HintCollator(tokenizer)
    batch = collator([row(ASK, DIALOGUE)])
    labels = batch["labels"][0]
    texts = scored(collator, row(ASK, DIALOGUE))
    first = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    one = Episode(row(ASK), ASK, completions=[first], texts=["it is 2"], said=[DIALOGUE[1:2]])
    context = collator.next_context(one)
    template = tokenizer.apply_chat_template([*ASK, *DIALOGUE[:2]], add_generation_prompt=True)
    assert context == template["input_ids"]
    second = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    one.completions.append(second)
    one.texts.append("that is 4")
    sampled, _ = collator.from_episodes([one])
    assert all(sampled[x].tolist() == batch[x].tolist() for x in batch)
    assert labels.tolist().count(-100) == len(labels) - len(first) - len(second)
    assert [collator.text(x) for x in (first, second)] == [
        x.removesuffix(TEMPLATES[name][1]).replace("<|end_response|>", "") for x in texts
    ]


def test_a_reply_that_ended_with_another_end_token_is_not_closed_again() -> None:
    tokenizer, end = family("phi3")
    first = [*tokenizer("it is 2")["input_ids"], tokenizer.eos_token_id]
    one = Episode(row(ASK), ASK, completions=[first], texts=["it is 2"], said=[DIALOGUE[1:2]])
    context = HintCollator(tokenizer).next_context(one)
    assert tokenizer.decode(context) == (
        "<|user|>\n1+1=?<|end|>\n<|assistant|>\nit is 2</s>\n<|user|>\nand 2+2=?<|end|>\n"
        "<|assistant|>\n"
    )
    one.completions[0] = first[:-1]  # cut off
    closed = HintCollator(tokenizer).next_context(one)
    assert closed == [end if token == tokenizer.eos_token_id else token for token in context]


def test_an_end_of_turn_that_is_a_plain_word_is_told_by_the_model() -> None:
    template = TEMPLATES["chatml"][0]
    tokenizer = characters(template, words=["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    collator = HintCollator(tokenizer, [])
    assert collator.ends.turn is None
    told = collator.with_end_tokens([end])
    assert scored(told, row(ASK, DIALOGUE)) == ["it is 2<|im_end|>", "that is 4<|im_end|>"]
    assert told.text([*tokenizer("ab")["input_ids"], end]) == "ab"
    assert collator.ends.turn is None  # the one that was not told is as it was


ENDED = "{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}"


def test_a_special_token_that_was_only_added_ends_a_turn() -> None:
    tokenizer = characters(ENDED)
    tokenizer.add_tokens(AddedToken("<|stop|>", special=True))
    assert find_turn_ends(tokenizer, {}).turn == tokenizer.convert_tokens_to_ids("<|stop|>")


def test_a_template_may_be_given_with_its_arguments() -> None:
    tokenizer = characters(special=["<|stop|>"])
    found = find_turn_ends(tokenizer, {"chat_template": ENDED})
    assert found.turn == tokenizer.convert_tokens_to_ids("<|stop|>")


def test_the_next_turns_first_token_may_end_a_reply() -> None:
    special = ["<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = characters(templates.NEXT_TURN, special)
    user_id = tokenizer.convert_tokens_to_ids("<|user|>")
    collator = HintCollator(tokenizer).with_end_tokens([2, user_id])
    assert scored(collator, row(ASK, DIALOGUE)) == ["it is 2<|user|>", "that is 4<|user|>"]
    assert scored(collator, row(ASK)) == ["2<|user|>"]
    first = [*tokenizer("it is 2")["input_ids"], user_id]
    one = Episode(row(ASK), ASK, completions=[first], texts=["it is 2"], said=[DIALOGUE[1:2]])
    template = tokenizer.apply_chat_template([*ASK, *DIALOGUE[:2]], add_generation_prompt=True)
    assert collator.next_context(one) == template["input_ids"]
    one.completions[0] = first[:-1]  # cut off
    assert collator.next_context(one) == template["input_ids"]


# a text, a line break, and nothing: (template, what it writes behind a reply)
IN_TEXT = {
    "word": ("{% for m in messages %}[{{ m.role }}] {{ m.content }} [/E]{% endfor %}"
             "{% if add_generation_prompt %}[assistant] {% endif %}", " [/E]"),
    "line": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
             "{% if add_generation_prompt %}assistant: {% endif %}", "\n"),
    "nothing": (templates.NEXT_TURN, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TEXT)
def test_a_row_whose_template_ends_replies_with_text_ends_with_the_end_token(name: str) -> None:
    template, end = IN_TEXT[name]
    tokenizer = characters(template)
    collator = HintCollator(tokenizer, Hint(separator=" "))
    assert (collator.ends.turn, collator.ends.text) == (None, end)
    assert scored(collator, row(ASK, [reply("2")])) == [f"2{end}</s>"]
    assert scored(collator, row(ASK)) == ["2</s>"]
    begun = row([*ASK, reply("it is")], [reply(" 2")])
    assert scored(collator, begun) == [" 2</s>"]
    assert scored(collator, row(ASK, DIALOGUE)) == [f"it is 2{end}", f"that is 4{end}</s>"]
    ids = collator([row(ASK, DIALOGUE)])["input_ids"][0].tolist()
    whole = tokenizer.apply_chat_template([*ASK, *DIALOGUE], return_dict=True)["input_ids"]
    assert ids == [*whole, tokenizer.eos_token_id]
    (said,) = collator.end_warnings()
    assert f"ends replies with the text {end!r} and no end token" in said
    assert "sampling ends at ['</s>'] only" in said


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_writes_end_tokens_is_no_warning(name: str) -> None:
    tokenizer, _ = family(name)
    assert HintCollator(tokenizer).end_warnings() == []
    assert HintCollator(characters()).end_warnings() == []


def test_no_end_token_at_all_is_told() -> None:
    tokenizer = characters(IN_TEXT["word"][0])
    tokenizer.eos_token = None
    collator = HintCollator(tokenizer)
    (said,) = collator.end_warnings()
    for way in ("tokenizer.eos_token", "generation_config.eos_token_id", ".with_end_tokens("):
        assert way in said
    assert scored(collator, row(ASK, [reply("2")])) == ["2 [/E]"]
    told = collator.with_end_tokens(2).with_end_tokens([])
    assert told.ends.ids == (2,)  # what a user has told stays where a trainer tells more
    assert scored(told, row(ASK, [reply("2")])) == ["2 [/E]</s>"]
    crossing = CrossTokenizerCollator(characters(), tokenizer)
    (said,) = crossing.end_warnings()
    assert said.startswith("for the teacher: no end token is known")


@pytest.mark.parametrize("ids", [None, "</s>", [None], [2.5]])
def test_end_tokens_are_ids(ids: Any) -> None:
    one = characters()
    for collator in (HintCollator(one), CrossTokenizerCollator(one, one)):
        with pytest.raises(ValueError, match="end tokens must be the id of a token, or a sequence"):
            collator.with_end_tokens(ids)


def test_a_template_of_other_dialogues_says_nothing_of_ends() -> None:
    refusing = "{{ raise_exception('tools only') }}"
    assert find_turn_ends(characters(refusing), {}).turn == 2
    assert find_turn_ends(characters(), {}, [5]).ids == (2, 5)


def test_collators_inside_others_are_told() -> None:
    class Around:
        def __init__(self, collator: Any) -> None:
            self.collator = collator

    inner = HintCollator(characters())
    outer = Around(Around(inner))
    told = tell_end_tokens(outer, [7])
    assert told.collator.collator.ends.ids == (2, 7)
    assert inner.ends.ids == (2,)
    assert outer.collator.collator is inner  # the one that was not told is as it was
    plain = Around(len)
    assert tell_end_tokens(plain, [7]) is plain
    crossing = CrossTokenizerCollator(characters(), characters())
    batch = tell_end_tokens(crossing, [4])([row("1", "2" + templates.LETTERS[0])])
    assert batch["labels"][0].tolist()[-1] == 4  # "a" ends it: </s> is not appended
