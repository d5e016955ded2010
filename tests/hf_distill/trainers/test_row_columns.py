"""Rows of other kinds get an error that says what to do; what a HintCollator reads is kept."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_distill import (
    CachedTeacher,
    CrossTokenizerCollator,
    DistillConfig,
    DistillTrainer,
    Hint,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    cache_teacher,
)
from tests.hf_distill.trainers import models

ASK, REPLY = {"role": "user", "content": "What ?"}, {"role": "assistant", "content": "3"}
SPLIT = r"such as messages\[:-1\] and messages\[-1:\]: HintCollator\(tokenizer, \[\]\) reads"
GIVE = r"HintCollator\(tokenizer, \[\]\) reads prompt and completion: give it as data_collator"
PREFER = "rows of preferences have two completions"
RENAME = "rename 'from' and 'value'"
TOKENISE = "tokenise the text into input_ids"
# rows, what is said without a collator, and by a HintCollator
KINDS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "messages": ({"messages": [ASK, REPLY]}, SPLIT, SPLIT),
    "message": ({"message": [ASK, REPLY]}, SPLIT, SPLIT),
    "conversations": ({"conversations": [{"from": "human", "value": "x"}]}, RENAME, RENAME),
    "texts": ({"prompt": "What ?", "completion": "3"}, GIVE, None),
    "chats": ({"prompt": [ASK], "completion": [REPLY]}, GIVE, None),
    "text": ({"text": "What ? 3"}, TOKENISE, TOKENISE),
    "preferences": ({"prompt": "What ?", "chosen": "3", "rejected": "4"}, PREFER, PREFER),
    "preferred chats": ({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, PREFER, PREFER),
    "misspelt prompt": ({"promt": "What ?", "completion": "3"}, GIVE, "set prompt_column='promt'"),
    "misspelt completion": (
        {"prompt": "What ?", "completions": "3"}, GIVE, "set completion_column='completions'",
    ),
    "only prompts": ({"prompt": "What ?"}, "samples completions of prompts", "no 'completion'"),
    "others": ({"a": "b"}, r"reads one of the columns \['a'\] of the", "there is no 'prompt'"),
    "a message": ({"prompt": ASK, "completion": "3"}, GIVE, "'prompt' must be a string, or a list"),
    "strings": ({"prompt": ["What ?"], "completion": "3"}, GIVE, "'prompt' must be a string, or a"),
    "a string": ({"prompt": "What ?", "completion": [REPLY]}, GIVE, "give the prompt as messages"),
}  # fmt: skip


def distill(folder: Path, collator: Any, data: Any, **changes: Any) -> DistillTrainer:
    teacher = changes.pop("teacher", None)
    settings = {"max_steps": 1, "watchdog": {"action": "off"}} | changes
    return DistillTrainer(
        models.llama(),
        DistillConfig(**models.options(folder, **settings)),
        collator,
        data,
        data,
        processing_class=models.tokenizer(),
        teacher=models.llama(1) if teacher is None else teacher,
    )


@pytest.mark.parametrize("of", [list, Dataset.from_list])
@pytest.mark.parametrize("name", KINDS)
def test_the_error_names_the_way(tmp_path: Path, name: str, of: Any) -> None:
    row, without, with_hints = KINDS[name]
    data = of([row] * 4)
    for call in (DistillTrainer.train, DistillTrainer.evaluate):
        with pytest.raises(ValueError, match=without):
            call(distill(tmp_path, None, data))
        trainer = distill(tmp_path, HintCollator(models.tokenizer(), []), data)
        if with_hints is None:
            call(trainer)
        else:
            with pytest.raises(ValueError, match=f"row 0 of the batch: .*{with_hints}"):
                call(trainer)
    if name != "others":  # with every column kept, only rows of a known kind are refused
        with pytest.raises(ValueError, match=without):
            distill(tmp_path, None, data, remove_unused_columns=False).train()


def test_a_collator_of_ones_own_reads_what_it_likes(tmp_path: Path) -> None:
    made = HintCollator(models.tokenizer(), [])
    own = lambda rows: made([{"prompt": row["text"], "completion": "3"} for row in rows])
    data = [{"text": "What ?"}] * 4
    distill(tmp_path, own, data, remove_unused_columns=False).train()
    with pytest.raises(ValueError, match=r"\(remove_unused_columns=False keeps them for a coll"):
        distill(tmp_path, own, data).train()
    own_columns = Dataset.from_list(data).with_transform(lambda x: {"input_ids": [[3, 4]]})
    trainer = distill(tmp_path, None, own_columns, remove_unused_columns=False)
    assert "input_ids" in next(iter(trainer.get_train_dataloader()))


def wrapped(kind: str, folder: Path, collator: HintCollator, data: Any) -> Any:
    if kind == "routed":
        return RoutedTeacher({"own": models.llama(1)}, "domain")
    if kind == "cached":
        cache_teacher(models.llama(1), data, folder / "cache", data_collator=collator)
        return CachedTeacher(folder / "cache")
    return models.llama(1)


@pytest.mark.parametrize("of", [list, Dataset.from_list])
@pytest.mark.parametrize("kind", ["model", "routed", "cached", "step"])
def test_every_column_reaches_the_hints(tmp_path: Path, kind: str, of: Any) -> None:
    """With the Trainer's default remove_unused_columns=True."""
    data = of([row | {"clue": "Hint", "note": "5", "domain": "own"} for row in models.problems(8)])
    hints = [Hint("{clue} :"), Hint(lambda row: row["note"])]
    dropout = 0.5 if kind == "step" else 0.0
    collator = HintCollator(models.tokenizer(), hints, hint_dropout=dropout)
    teacher = wrapped(kind, tmp_path, collator, data)
    trainer = distill(tmp_path, collator, data, teacher=teacher, temperature=1.0)
    trainer.train()
    trainer.evaluate()


@pytest.mark.parametrize("on_policy", [True, False])
def test_also_in_an_opsd_trainer(tmp_path: Path, on_policy: bool) -> None:
    settings = {"remove_unused_columns": True, "on_policy": on_policy, "max_completion_length": 4}
    config = OPSDConfig(**models.options(tmp_path, max_steps=1, **settings))
    for data in (models.problems(8), Dataset.from_list(models.problems(8))):
        trainer = OPSDTrainer(
            models.llama(), config, HintCollator(models.tokenizer()), data, data,
            processing_class=models.tokenizer(),
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()


def opsd(folder: Path, collator: Any, data: Any, **changes: Any) -> OPSDTrainer:
    settings = {"max_steps": 1, "max_completion_length": 4} | changes
    tokenizer, config = models.tokenizer(), OPSDConfig(**models.options(folder, **settings))
    return OPSDTrainer(models.llama(), config, collator, data, data, processing_class=tokenizer)


SAMPLED = {
    "messages": r"make the messages in front of a reply the column 'prompt', such as mess.*\[:-1\]",
    "conversations": "rename 'from' and 'value' .* make the messages in front",
    "text": "make the beginning of the text the column 'prompt'",
    "preferred chats": "make what both of them begin with the column 'prompt'",
}


@pytest.mark.parametrize("name", SAMPLED)
def test_where_completions_are_sampled_none_is_asked_for(tmp_path: Path, name: str) -> None:
    data = [KINDS[name][0]] * 4
    hint = "; a teacher that is the student itself reads a hint too"
    for call in (OPSDTrainer.train, OPSDTrainer.evaluate):
        with pytest.raises(ValueError, match=SAMPLED[name]) as said:
            call(opsd(tmp_path, None, data))
        assert "completions are sampled, so none is needed" + hint in str(said.value)
        assert "messages[-1:]" not in str(said.value)
        assert "HintCollator(tokenizer, [])" not in str(said.value)
    with pytest.raises(ValueError, match=f"row 0 of the batch: .*{KINDS[name][2]}") as said:
        opsd(tmp_path, None, data, on_policy=False).train()
    assert hint in str(said.value)
    with pytest.raises(ValueError, match=SAMPLED[name]) as said:
        HintCollator(models.tokenizer(), []).prompts(data)
    assert hint not in str(said.value)


@pytest.mark.parametrize("kind", ["on-policy", "off-policy", "crossing"])
def test_whole_dialogues_as_prompts_are_told_once(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def run(column: str, prompt: list[dict[str, str]]) -> list[str]:
        caplog.clear()
        data, tokenizer = [{column: prompt, "completion": "3", "hint": "5"}] * 4, models.tokenizer()
        if kind == "crossing":
            crossing = CrossTokenizerCollator(tokenizer, tokenizer, prompt_column=column)
            trainer: Any = distill(tmp_path, crossing, data, divergence="uld")
        else:
            collator = HintCollator(tokenizer, prompt_column=column)
            trainer = opsd(tmp_path, collator, data, on_policy=kind == "on-policy")
        trainer.train()
        trainer.evaluate()
        return [x for x in caplog.messages if "end in an assistant's message" in x]

    (said,) = run("messages", [ASK, REPLY])
    assert said.startswith("prompts of the column 'messages' end in an assistant's message, which")
    assert run("messages", [ASK]) == []
    assert run("prompt", [ASK, REPLY]) == []  # a reply that is begun
