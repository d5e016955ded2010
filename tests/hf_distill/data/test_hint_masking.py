r"""Hints by what a completion has of them: anchors, shares, sentences, and the teacher's rows."""

import math
from pathlib import Path
from typing import Any

import pytest

from hf_distill import Contrast, Hint, HintCollator, HintMasking, OPSDConfig, OPSDTrainer
from hf_distill.data.episodes import Episode
from hf_distill.data.hinted_rows import _text
from hf_distill.data.rendering import MASKED
from tests.hf_distill.data.test_hint_collator import CHAT, PROMPT, row, words
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

SOLUTION = "First 2 + 3 = 5. Then 5 * 4 = 20\nso the answer is \\boxed{20}."


@pytest.mark.parametrize(
    ("completion", "seen"),
    [
        ("nothing", 0),
        ("2 + 3 = 5", 3),
        ("it is 20, of 4", 2),
        ("3,000 and 25 and 0.5", 0),  # none of them is the number
        (SOLUTION, 5),
    ],
)
@pytest.mark.parametrize("most", [1.0, 0.5])
def test_the_hidden_share_is_the_overlap(completion: str, seen: int, most: float) -> None:
    """Of the anchors 2, 3, 5, 4 and 20; of 17 words."""
    assert len(SOLUTION.split()) == 17
    for masks, share in (("seen", seen / 5), ("unseen", 1 - seen / 5)):
        hidden = math.floor(most * share * 17 + 1e-9)
        found = HintMasking(masks, most=most)(SOLUTION, completion)
        kept = SOLUTION.split()[: 17 - hidden]
        assert found.split() == [*kept, *(["..."] if hidden else [])]
        assert found.startswith(SOLUTION[: len(found) - 3])
        assert (found == SOLUTION) == (hidden == 0)


@pytest.mark.parametrize(
    ("hint", "completion", "overlap"),
    [
        # formulas are one anchor each, without blanks, and their numbers are others
        ("so $x + 1 = 4$", "then $x+1=4$ holds", 1.0),
        ("so $x + 1 = 4$", "x is 1", 1 / 3),
        (r"\boxed{\frac{1}{2}} it is", r"we get \frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{2}} it is", "1 or 2", 2 / 3),
        (r"\(a - b\) it is", "a-b", 1.0),
        (r"$$a$$ or \boxed{x}", "y", 0.0),
        (r"it is \boxed{5}", "15", 0.0),  # a number is not found in another
        ("1,000 or 2", "1000", 0.5),
        ("1,2 or 2", "2", 0.5),
        ("3.5 it is", "3", 0.0),
        ("7 7 7 8", "7", 0.5),  # each is counted once
    ],
)
def test_what_the_anchors_of_a_hint_are(hint: str, completion: str, overlap: float) -> None:
    """The words that stay are as many as the overlap says."""
    n = len(hint.split())
    found = HintMasking("unseen")(hint, completion)
    hidden = n - len(found.removesuffix("...").split())
    assert hidden == math.floor(n * (1 - overlap) + 1e-9)


def test_words_are_anchors_too() -> None:
    masking = HintMasking(anchors="words", mask="[hidden]")
    assert masking("Add the tens first", "we ADD tens!") == "Add the [hidden]"
    assert masking("Add the tens first", "tensor") == "Add the tens first"


def test_a_hint_without_anchors_is_not_masked() -> None:
    for masks in ("seen", "unseen"):
        for part in ("end", "sentences"):
            assert HintMasking(masks, part)("think of the tens", "12") == "think of the tens"


@pytest.mark.parametrize(
    ("masks", "completion", "expected"),
    [
        ("seen", "2 + 3 = 5", "... Then 5 * 4 = 20\nso the answer is \\boxed{20}."),
        ("seen", "20", "First 2 + 3 = 5. Then 5 * 4 = 20\n..."),
        ("seen", SOLUTION, "..."),  # masks that follow each other are one
        ("unseen", "2", "First 2 + 3 = 5. ..."),
        ("unseen", "20", "... Then 5 * 4 = 20\nso the answer is \\boxed{20}."),
        ("unseen", "no", "..."),
    ],
)
def test_sentences_and_lines(masks: str, completion: str, expected: str) -> None:
    assert HintMasking(masks, "sentences")(SOLUTION, completion) == expected


def test_sentences_without_anchors_stay() -> None:
    hint = "Think first. It is 4.5 then. Well done"
    assert HintMasking(part="sentences")(hint, "4.5") == "Think first. ... Well done"


def rows(prompt: Any, **changes: Any) -> list[dict[str, Any]]:
    made = row(prompt, "1 + 2") | {"hint": "Hint : 1 + 4 = 5 done", "wrong": "Hint : 2 = 9"}
    return [made | changes, made | changes | {"completion": "no"}]


def read(batch: dict[str, Any], prefix: str = "teacher_") -> list[str]:
    pairs = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], strict=True)
    return [words(ids[mask.bool()]) for ids, mask in pairs]


def masked(**settings: Any) -> HintCollator:
    """Its mask is a word of the tokenizer; of 7 words a third of the anchors is 2."""
    masking = HintMasking(mask="so", **settings.pop("masking", {}))
    return HintCollator(models.tokenizer(), "hint", hint_masking=masking, **settings)


@pytest.mark.parametrize("prompt", [PROMPT, CHAT])
def test_the_teacher_sees_the_masked_hint(prompt: Any) -> None:
    """Of the data's completions: the same tokens are scored, and the student's row is the same."""
    plain = HintCollator(models.tokenizer(), "hint")(rows(prompt))
    found = masked()(rows(prompt))
    for key in ("input_ids", "labels"):
        assert found[key].tolist() == plain[key].tolist()
    assert found[MASKED].tolist() == [True, False]
    assert MASKED not in plain
    whole, whole_too = read(plain)
    assert read(found) == [whole.replace("1 + 4 = 5 done", "1 + 4 = so"), whole_too]


def test_messages_of_a_completion_are_its_replies() -> None:
    """What others say in it is not the student's."""
    for said, replies in (("4 or 5", ["no", "no"]), ("no", ["no", "1"]), ("no", ["1", "no"])):
        roles = ("assistant", replies[0]), ("user", said), ("assistant", replies[1])
        given = [{"role": role, "content": text} for role, text in roles]
        batch = masked()(rows(CHAT, completion=given)[:1])
        assert batch[MASKED].tolist() == ["1" in replies]
    parts = [{"type": "text", "text": "it is "}, {"type": "image"}, {"type": "text", "text": "1"}]
    assert _text({"role": "assistant", "content": parts}) == "it is 1"
    assert _text({"role": "assistant", "content": None, "tool_calls": []}) == ""


@pytest.mark.parametrize("prompt", [PROMPT, CHAT])
def test_sampled_completions_mask_their_hints(prompt: Any) -> None:
    tokenizer = models.tokenizer()
    texts = ["1 + 2", "no", "1 4 5"]
    episodes = [
        Episode(rows(prompt)[0], prompt, completions=[tokenizer(x)["input_ids"]], texts=[x])
        for x in texts
    ]
    collator = masked()
    for episode in episodes:
        episode.context = collator.context_ids(prompt)
    batch, hints = collator.from_episodes(episodes)
    assert batch[MASKED].tolist() == [True, False, True]
    assert hints == [["Hint : 1 + 4 = so"], ["Hint : 1 + 4 = 5 done"], ["so"]]
    assert ["Hint : 1 + 4 = so" in x for x in read(batch)] == [True, False, False]


def test_wrong_hints_are_masked_by_their_own_overlap() -> None:
    batch = masked(contrast=Contrast(hint="wrong"))(rows(CHAT, completion="2"))
    assert ["Hint : 2 so" in x for x in read(batch, "teacher_contrast_")] == [True, False]
    same = masked(contrast=Contrast(hint="hint"))(rows(CHAT))
    assert same["teacher_uncontrasted"].tolist() == [True, True]
    # what is made of the hints is made of what is seen of them
    both = masked(contrast=Contrast("corrupted_number"))(rows(CHAT))
    for right, wrong in zip(read(both), read(both, "teacher_contrast_"), strict=True):
        assert right != wrong
        assert len(right.split()) == len(wrong.split())
        assert ("= so" in right) == ("= so" in wrong)


def test_hints_are_cut_to_their_budget_behind_the_mask() -> None:
    batch = masked(max_hint_length=7, truncation="hint")(rows(CHAT))
    assert batch[MASKED].tolist() == [True, False]
    assert batch["teacher_hint_truncated"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HintMasking("all"), r"masks must be one of .*'unseen'\), got 'all'"),
        (lambda: HintMasking(part="start"), "part must be one of .*, got 'start'"),
        (lambda: HintMasking(anchors="ids"), "anchors must be one of .*, got 'ids'"),
        (lambda: HintMasking(most=0.0), r"most must be in \(0, 1\], got 0.0"),
        (lambda: HintMasking(part="sentences", most=0.5), "with the part 'end' only, got 0.5"),
        (lambda: HintMasking(mask=" "), "mask must have text, got ' '"),
        (
            lambda: HintCollator(models.tokenizer(), [], hint_masking=HintMasking()),
            "hint_masking needs hints to mask, got none",
        ),
        (lambda: masked().contexts(rows(CHAT)), "a context that is still to be completed has none"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("on_policy", [True, False])
def test_a_training_logs_how_many_hints_are_masked(tmp_path: Path, on_policy: bool) -> None:
    """A teacher whose hint is hidden whole reads the mask, and nothing of the answer."""
    settings = {"on_policy": on_policy, "max_steps": 1, "max_completion_length": 4}
    collator = HintCollator(
        models.tokenizer(),
        Hint(lambda row: "Hint : 5"),
        hint_masking=HintMasking("unseen", mask="so"),
    )
    given = [x | {"completion": "5" if i < 2 else "no"} for i, x in enumerate(models.problems(4))]
    args = OPSDConfig(**models.options(tmp_path, **settings))
    trainer = OPSDTrainer(
        models.llama(), args, collator, given, given, processing_class=models.tokenizer()
    )
    trainer.train()
    (logs,) = models.steps(trainer)
    assert 0.5 <= logs["hints_masked"] <= 1.0 if on_policy else logs["hints_masked"] == 0.5
    assert 0.0 < trainer.evaluate()["eval_hints_masked"] <= 1.0
