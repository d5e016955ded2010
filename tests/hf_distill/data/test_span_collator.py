"""SpanCollator token by token: hints, dialogues, ends, and every set-up that is refused."""

from typing import Any

import pytest
import torch

from hf_distill import Hint, HintCollator, SpanCollator
from hf_distill.data import alignment
from hf_distill.data.alignment import AlignmentError, AlignmentMeter
from hf_distill.data.episodes import Episode
from hf_distill.data.span_collator import find_span_collator
from tests.hf_distill.data import image_processors
from tests.hf_distill.data.families import FAMILIES
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import letters

ONE, OTHER = FAMILIES["byte_level"](), FAMILIES["sentence_piece"]()
ROWS = [
    {"prompt": "What is 1 + 2?", "hint": "it is three", "completion": " The answer is 3."},
    {"prompt": "Say naïve", "hint": "short", "completion": "naïve 🙂"},
]
CHAT = [{"role": "user", "content": "What is 1 + 2?"}]
TURNS = {
    "prompt": CHAT,
    "hint": "think",
    "completion": [
        {"role": "assistant", "content": "The answer"},
        {"role": "user", "content": "the reason?"},
        {"role": "assistant", "content": "is 3."},
    ],
}


def made(rows: Any, one: Any = ONE, other: Any = OTHER, hint: Any = "{hint}", **more: Any) -> dict:
    return SpanCollator(one, other, hint, **more)(rows)


def spans_of(batch: dict, row: int, one: Any = ONE, other: Any = OTHER) -> list[tuple[str, str]]:
    """What each span of a row reads on both sides."""
    found = []
    index, their_index = batch["completion_index"][row], batch["teacher_completion_index"][row]
    mine, theirs = batch["teacher_spans_of_student"][row], batch["teacher_spans"][row]
    for number in range(int(mine.max()) + 1):
        at, their_at = index[mine == number], their_index[theirs == number]
        ids, their_ids = batch["input_ids"][row, at], batch["teacher_input_ids"][row, their_at]
        found.append((one.decode(ids), other.decode(their_ids)))
    return found


def teacher_text(batch: dict, row: int, other: Any = OTHER) -> str:
    mask = batch["teacher_attention_mask"][row].bool()
    return other.decode(batch["teacher_input_ids"][row][mask])


def test_a_batch_of_texts() -> None:
    batch = made(ROWS)
    for row, given in enumerate(ROWS):
        text = f"{given['prompt']}\n\n{given['hint']}{given['completion']}<end>"
        assert teacher_text(batch, row).replace(" ", "") == text.replace(" ", "")
        spans = spans_of(batch, row)
        assert spans[-1] == ("<end>", "<end>")
        for mine, theirs in spans:  # its decoder strips a first space
            assert mine in (theirs, f" {theirs}") or "\ufffd" in mine + theirs
        index = batch["completion_index"][row]
        inside = index[batch["teacher_spans_of_student"][row] >= 0]
        assert ONE.decode(batch["input_ids"][row, inside]) == given["completion"] + "<end>"
    want = HintCollator(ONE, ())(ROWS)
    for name in ("input_ids", "attention_mask", "labels", "completion_index"):
        assert torch.equal(batch[name], want[name]), name
    assert batch["teacher_own_tokens"].tolist() == [True, True]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_dialogue_has_spans_of_each_reply(swapped: bool) -> None:
    both = (OTHER, ONE) if swapped else (ONE, OTHER)
    batch = made([TURNS, TURNS | {"completion": TURNS["completion"][:1]}], *both)
    spans = spans_of(batch, 0, *both)
    text = "The answer<end>is 3.<end>".replace(" ", "")
    assert "".join(x for x, _ in spans).replace(" ", "") == text
    assert [x for x, _ in spans].count("<end>") == 2
    shown = "What is 1 + 2?\n\nthink<end><role>assistant\nThe answer<end><role>user\nthe reason?"
    assert shown.replace(" ", "") in teacher_text(batch, 0, both[1]).replace(" ", "")
    assert "".join(x for x, _ in spans_of(batch, 1, *both)).replace(" ", "") == "Theanswer<end>"


def episode(text: str, prompt: Any = CHAT, ended: bool = True, **more: Any) -> Episode:
    ids = [*ONE(text)["input_ids"], *([1] if ended else [])]
    row = {"prompt": prompt, "hint": "think"}
    return Episode(row, prompt, completions=[ids], texts=[text], **more)


def test_sampled_completions_are_those_of_the_data() -> None:
    collator = SpanCollator(ONE, OTHER, "{hint}")
    for prompt in ("What is 1 + 2?", CHAT):
        found, hints = collator.from_episodes([episode("The answer is 3.", prompt)])
        row = {"prompt": prompt, "hint": "think", "completion": "The answer is 3."}
        want = collator([row])
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(found[name], value), name
        assert hints == [["think"]]


def test_a_completion_that_was_cut_off_has_no_end() -> None:
    """Nor its last span, unless it is one token that both have."""
    collator, text, kinds = SpanCollator(ONE, OTHER, "{hint}"), "The answer is naïve 東京", set()
    for length in range(1, len(text) + 1):
        pair = [episode(text[:length], ended=False), episode(text[:length])]
        batch, _ = collator.from_episodes(pair)
        cut, whole = (spans_of(batch, row) for row in (0, 1))
        assert whole[-1] == ("<end>", "<end>")
        counts = [
            int((batch[x][1] == len(whole) - 2).sum())
            for x in ("teacher_spans_of_student", "teacher_spans")
        ]
        last = pair[1].completions[0][-2]
        theirs = int(batch["teacher_input_ids"][0][batch["teacher_attention_mask"][0].bool()][-1])
        kept = counts == [1, 1] and collator.common_ids.get(last) == theirs
        assert cut == whole[: len(whole) - 2 + kept]
        assert not teacher_text(batch, 0).endswith("<end>")
        kinds.add(kept)
    assert kinds == {True, False}


def test_tokens_that_say_no_text_are_left_out() -> None:
    made = episode("The answer is 3.")
    made.completions[0].insert(3, 2)  # <role>
    batch, _ = SpanCollator(ONE, OTHER, []).from_episodes([made])
    assert batch["teacher_spans_of_student"][0, 3] == -1
    assert "<role>" not in teacher_text(batch, 0).split("assistant")[-1]
    alone = episode("x")
    alone.completions = [[2, 2, 1]]  # no text at all, and an end
    batch, _ = SpanCollator(ONE, OTHER, []).from_episodes([alone])
    assert spans_of(batch, 0) == [("<end>", "<end>")]
    alone.completions = [[2, 2]]
    batch, _ = SpanCollator(ONE, OTHER, []).from_episodes([alone])
    assert batch["teacher_spans_of_student"].tolist() == [[-1, -1]]
    assert batch["teacher_completion_index"].shape == (1, 0)


def test_a_begun_reply_goes_on_with_its_text() -> None:
    begun = [*CHAT, {"role": "assistant", "content": "The answer"}]
    row = {"prompt": begun, "hint": "think", "completion": " is 3."}
    for both in ((ONE, OTHER), (OTHER, ONE)):
        batch = made([row], *both)
        assert teacher_text(batch, 0, both[1]).endswith("The answer is 3.<end>")


def test_with_one_tokenizer_it_is_a_hint_collators_batch() -> None:
    want = HintCollator(ONE, "{hint}")(ROWS)
    found = made(ROWS, ONE, ONE)
    own = {"teacher_spans", "teacher_spans_of_student", "teacher_own_tokens"}
    assert found.keys() - want.keys() == own
    for name, value in want.items():
        assert torch.equal(found[name], value), name
    at = want["completion_index"]
    numbers = torch.arange(at.shape[1]).expand(at.shape).where(at >= 0, -1)
    for name in ("teacher_spans", "teacher_spans_of_student"):
        assert torch.equal(found[name], numbers)


def test_templates_hints_and_their_lengths_are_the_teachers() -> None:
    row = {"prompt": CHAT, "hint": "one two three four", "completion": "3"}
    words = models.tokenizer()
    batch = made([row], ONE, words, teacher_template_kwargs={"think": True})
    assert "think" in teacher_text(batch, 0, words)
    long = len(OTHER(row["hint"], add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=r"the hint of .* has \d+ tokens, max_hint_length is 2"):
        made([row], max_hint_length=2)
    batch = made([row], max_hint_length=long // 2, truncation="hint")
    assert batch["teacher_hint_truncated"].tolist() == [True]
    assert "four" not in teacher_text(batch, 0)
    none = made([row], hint=[])
    assert "one two" not in teacher_text(none, 0)


def test_hints_that_are_dropped_and_that_shrink() -> None:
    options: dict[str, Any] = {"hint_dropout": 1.0}
    collator = SpanCollator(ONE, OTHER, "{hint}", **options)
    with pytest.raises(ValueError, match=r"hint_dropout 1.*collator.at\(step\)"):
        collator(ROWS)
    dropped, kept = collator.at(0, seed=0)(ROWS), collator.at(0)(ROWS)
    assert dropped["teacher_hint_dropped"].tolist() == [True, True]
    assert "three" not in teacher_text(dropped, 0)
    assert "three" in teacher_text(kept, 0)
    for name in ("teacher_spans", "teacher_spans_of_student", "labels"):
        assert torch.equal(dropped[name], kept[name])
    fades = SpanCollator(ONE, OTHER, "{hint}", max_hint_length="linear:64->3@10", truncation="hint")
    lengths = [fades.at(x)(ROWS)["teacher_attention_mask"].sum() for x in (0, 10)]
    assert lengths[1] < lengths[0]


def test_the_anchors_rows_are_the_students() -> None:
    found = SpanCollator(ONE, OTHER, "{hint}").references(ROWS)
    for name, value in HintCollator(ONE, ()).references(ROWS).items():
        assert torch.equal(found[name], value)


def test_what_is_refused() -> None:
    for options, words in (
        ({"packing": True}, "has no packing, got True"),
        ({"contrast": "wrong"}, "has no contrast, got 'wrong'"),
        ({"student_template_kwargs": {"a": 1}}, "has no student_template_kwargs"),
        ({"scored": "hinted"}, "scores all replies, got scored='hinted'"),
    ):
        with pytest.raises(ValueError, match=words):
            SpanCollator(ONE, OTHER, "{hint}", **options)
    begins = TURNS | {"completion": TURNS["completion"][1:]}
    with pytest.raises(ValueError, match=r"begins with a reply, .* got roles \['user', 'assis"):
        made([begins])


def test_end_tokens_of_the_student_and_warnings() -> None:
    told = SpanCollator(ONE, OTHER, Hint("hint")).with_end_tokens([7])
    assert told.ends.ids == (1, 7)
    reply = episode("The answer")
    reply.completions = [[*reply.completions[0][:-1], 7]]
    batch, _ = told.from_episodes([reply])
    assert spans_of(batch, 0)[-1] == (ONE.decode([7]), "<end>")
    assert told.end_warnings() == []
    bare = FAMILIES["byte_level_small"].__wrapped__()
    bare.eos_token, bare.chat_template = None, None
    collator = SpanCollator(bare, OTHER, [])
    assert 9 not in collator.common_ids or collator.common_ids[9] != 1
    assert collator.with_end_tokens([9]).common_ids[9] == 1
    silent = FAMILIES["byte_level_small"].__wrapped__()
    silent.eos_token, silent.chat_template = None, None
    found = SpanCollator(ONE, silent, []).end_warnings()
    assert len(found) == 1
    assert found[0].startswith("for the teacher: no end token is known")


def test_it_is_found_behind_its_methods() -> None:
    collator = SpanCollator(ONE, OTHER, [])
    assert find_span_collator(collator) is find_span_collator(collator.prompts) is collator
    assert find_span_collator(HintCollator(ONE)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_spans", lambda x: x.where(x != 1, 0)),  # a span that the teacher lacks
        ("teacher_spans", lambda x: x.flip(1)),
        ("teacher_spans", lambda x: x.where(x != 0, -1)),  # asked in vain
        ("teacher_spans_of_student", lambda x: x.where(x != 0, -1)),
        ("teacher_spans_of_student", lambda x: x + (x >= 0)),  # not from 0
        ("teacher_spans_of_student", lambda x: x[:, 1:]),
        ("teacher_spans_of_student", lambda x: torch.where((x == 0) | (x == 1), 1 - x, x)),
    ],
)
def test_the_rule_of_spans(name: str, value: Any) -> None:
    batch = made(ROWS)
    alignment.assert_aligned(batch)
    meter = AlignmentMeter()
    meter.add(batch)
    batch[name] = value(batch[name])
    with pytest.raises(AlignmentError, match=r"spans must be numbered from 0 .* row 0 has"):
        alignment.assert_aligned(batch)


def test_the_rule_of_spans_on_both_sides() -> None:
    batch = made(ROWS)
    names = ("teacher_spans", "teacher_spans_of_student")
    later = batch | {name: batch[name] + (batch[name] >= 1) for name in names}  # without a 1
    index = batch["teacher_spans"][1].tolist()
    part = next(i for i, x in enumerate(index) if x >= 0 and index.count(x) > 1)
    asked = batch["teacher_spans"].clone()
    asked[1, part] = -1  # one of several tokens is in no span
    for wrong in (later, batch | {"teacher_spans": asked}):
        with pytest.raises(AlignmentError, match="spans must be numbered from 0"):
            alignment.assert_aligned(wrong)


def test_teachers_of_letters() -> None:
    words, characters = models.tokenizer(), letters()
    batch = made(models.problems()[:2], words, characters)
    spans = spans_of(batch, 1, words, characters)
    assert [x for x, _ in spans] == ["The", "answer", "is", "6", ".", "<|im_end|>"]
    assert [x.replace(" ", "") for _, x in spans] == ["The", "answer", "is", "6", ".", "<end>"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_processor_is_refused(place: int) -> None:
    given = [models.tokenizer(), letters()]
    given[place] = image_processors.processor("llava")
    with pytest.raises(
        ValueError, match="got a processor: give the tokenizer of the LlavaProcessor"
    ):
        SpanCollator(*given)
