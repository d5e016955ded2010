"""Replies that the prompt begins are continued, with hints beside them."""

import pytest

from hf_distill import Hint, HintCollator
from hf_distill.data.episodes import Episode
from tests.hf_distill.data import templates
from tests.hf_distill.data.templates import TEMPLATES, characters, family
from tests.hf_distill.data.test_chat import reply
from tests.hf_distill.data.test_text_ends import ASK, DIALOGUE, PLACES, row, scored

BEGUN = [*ASK, reply("it is")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_begun_reply_goes_on(name: str, place: str) -> None:
    tokenizer, _ = family(name)
    end = TEMPLATES[name][1]
    collator = HintCollator(tokenizer, PLACES[place])
    template = tokenizer.apply_chat_template(BEGUN, continue_final_message=True)["input_ids"]
    assert tokenizer.decode(template).endswith("it is")
    assert collator.prompts([row(BEGUN)])["prompt_ids"][0].tolist() == template
    contexts = collator.contexts([row(BEGUN)])
    assert contexts["prompt_ids"][0].tolist() == template
    teacher = tokenizer.decode(contexts["teacher_prompt_ids"][0])
    assert teacher.endswith("it is")
    assert "two" in teacher
    for completion in (" 2", [reply(" 2")]):
        made = row(BEGUN, completion)
        assert scored(collator, made) == [f" 2{end}"]
        ids = collator([made])["input_ids"][0].tolist()
        assert ids[: len(template)] == template
        hinted = tokenizer.decode(collator([made])["teacher_input_ids"][0])
        assert hinted == f"{teacher} 2{end}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_dialogue_behind_a_begun_reply(name: str, place: str) -> None:
    tokenizer, _ = family(name)
    end = TEMPLATES[name][1]
    completion = [reply(" 2"), *DIALOGUE[1:]]
    collator = HintCollator(tokenizer, PLACES[place])
    found = scored(collator, row(BEGUN, completion))
    assert found[0] == f" 2{end}"
    assert found[1].strip().startswith("that is 4")
    # the row is the template's of the whole dialogue where the rest is rendered as it is written
    if name not in ("llama2", "command"):
        messages = [*ASK, reply("it is 2"), *DIALOGUE[1:]]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        ids = collator([row(BEGUN, completion)])["input_ids"][0].tolist()
        assert whole[: len(ids)] == ids
    later = Hint(where="before", turn=2, role="user")
    hinted = HintCollator(tokenizer, later)([row(BEGUN, completion)])
    teacher = tokenizer.decode(hinted["teacher_input_ids"][0])
    assert teacher.index("two") > teacher.index("it is 2")


def test_a_begun_reply_that_was_sampled() -> None:
    tokenizer, end = family("chatml")
    collator = HintCollator(tokenizer, PLACES["user"])
    rest = [*tokenizer(" 2")["input_ids"], end]
    one = Episode(row(BEGUN), BEGUN, completions=[rest], texts=[" 2"], said=[DIALOGUE[1:2]])
    assert one.messages == [*ASK, reply("it is 2"), DIALOGUE[1]]
    assert one.seen()["attempt"] == " 2"
    template = tokenizer.apply_chat_template(one.messages, add_generation_prompt=True)
    assert collator.next_context(one) == template["input_ids"]
    one.completions.append([*tokenizer("4")["input_ids"], end])
    one.texts.append("4")
    batch, _ = collator.from_episodes([one])
    text = tokenizer.decode(batch["teacher_input_ids"][0])
    assert text == (
        "<|im_start|>user\n1+1=? two<|im_end|>\n<|im_start|>assistant\nit is 2<|im_end|>\n"
        "<|im_start|>user\nand 2+2=?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    )


@pytest.mark.parametrize("begun", ["it is", "<think>\nLet me"])
def test_a_template_that_rewrites_thoughts_continues_a_begun_reply(begun: str) -> None:
    tokenizer = characters(templates.THINKING, ["<|im_start|>", "<|im_end|>"])
    prompt = [*ASK, reply(begun)]
    context = tokenizer.apply_chat_template(prompt, continue_final_message=True)["input_ids"]
    collator = HintCollator(tokenizer, PLACES["user"])
    for completion in ("\n</think>\n\n2", [reply("\n</think>\n\n2"), *DIALOGUE[1:]]):
        ids = collator([row(prompt, completion)])["input_ids"][0].tolist()
        assert ids[: len(context)] == context
        found = scored(collator, row(prompt, completion))
        assert found[0] == "\n</think>\n\n2<|im_end|>"
    assert found[1].endswith("that is 4<|im_end|>")


def test_a_begun_reply_that_the_template_takes_away_is_an_error() -> None:
    tokenizer = characters(templates.THINKING, ["<|im_start|>", "<|im_end|>"])
    prompt = [*ASK, reply("<think>one</think>")]
    with pytest.raises(ValueError, match="row 0 of the batch: continue_final_message is set but"):
        HintCollator(tokenizer).prompts([row(prompt)])


def test_a_reply_of_the_prompt_that_is_answered_is_not_continued() -> None:
    tokenizer, _ = family("chatml")
    made = row([*ASK, reply("it is 2")], DIALOGUE[1:])
    assert scored(HintCollator(tokenizer), made) == ["that is 4<|im_end|>"]


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (Hint(where="after", turn=1), "a hint must stand before a reply that is scored"),
        (Hint(where="user", turn=1), "a hint in the user turn needs a user message"),
    ],
)
def test_a_hint_cannot_come_between_a_begun_reply_and_its_rest(hint: Hint, message: str) -> None:
    tokenizer, _ = family("chatml")
    for made in (row(BEGUN), row(BEGUN, [reply(" 2")])):
        with pytest.raises(ValueError, match=message):
            HintCollator(tokenizer, hint)([made])
    with pytest.raises(ValueError, match=message):
        HintCollator(tokenizer, hint).contexts([row(BEGUN)])


def test_the_rest_of_a_begun_reply_is_text() -> None:
    tokenizer, _ = family("chatml")
    parts = [{"type": "text", "text": " 2"}]
    made = row(BEGUN, [{"role": "assistant", "content": parts, "tool_calls": None}])
    assert scored(HintCollator(tokenizer), made) == [" 2<|im_end|>"]
    called = row(BEGUN, [reply(" 2") | {"tool_calls": [{"name": "add"}]}])
    with pytest.raises(ValueError, match="must have text and nothing else"):
        HintCollator(tokenizer)([called])


def test_an_assistants_hint_is_no_begun_reply() -> None:
    tokenizer, _ = family("chatml")
    hint = Hint(where="after", role="assistant")
    teacher = HintCollator(tokenizer, hint).contexts([row(ASK)])["teacher_prompt_ids"][0]
    assert tokenizer.decode(teacher).endswith("two<|im_end|>\n<|im_start|>assistant\n")
