"""Faults planted in real runs: what is said of each, and that nothing is said without it."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.alignment import AlignmentError
from hf_distill.data.batches import TokenRow, build_rows
from hf_distill.data.rendering import RenderedSides
from hf_distill.data.sides import INDEX_MAPS
from hf_distill.monitoring.preflight import EmptyHintError
from hf_distill.teachers import initial_adapters
from hf_distill.teachers.held_values import HeldValues
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

Batch = dict[str, Tensor]
BOTH = (True, False)


class Changed(HintCollator):
    """Batches are changed after they were built and checked."""

    def change(self, batch: Batch) -> None:
        raise NotImplementedError

    def _batch(self, made: Sequence[RenderedSides], dialogues: Any) -> Batch:
        batch = super()._batch(made, dialogues)
        self.change(batch)
        return batch


def shift(batch: Batch, names: Sequence[str]) -> None:
    for name in names:
        batch[name] = torch.where(batch[name] > 0, batch[name] - 1, batch[name])


class StudentShifted(Changed):
    def change(self, batch: Batch) -> None:
        shift(batch, INDEX_MAPS[:1])


class TeacherShifted(Changed):
    def change(self, batch: Batch) -> None:
        shift(batch, INDEX_MAPS[1:])


class BothShifted(Changed):
    """Behind the same generation prompt both maps still gather equal ids."""

    def change(self, batch: Batch) -> None:
        shift(batch, INDEX_MAPS)


class AllShifted(BothShifted):
    """Labels too: everything agrees, on the wrong tokens."""

    def change(self, batch: Batch) -> None:
        super().change(batch)
        labels = torch.full_like(batch["labels"], -100)
        index = batch["completion_index"]
        for row, at in enumerate(index):
            at = at[at > 0]
            labels[row, at] = batch["input_ids"][row, at]
        batch["labels"] = labels


class EndsUnlabelled(Changed):
    """The classical line where padding is the end token."""

    def change(self, batch: Batch) -> None:
        batch["labels"][batch["labels"] == models.EOS] = -100


class EndsDropped(EndsUnlabelled):
    """Consistently, in the maps too."""

    def change(self, batch: Batch) -> None:
        super().change(batch)
        for ids, name in zip(("input_ids", "teacher_input_ids"), INDEX_MAPS, strict=True):
            index = batch[name]
            batch[name] = index.masked_fill(
                batch[ids].gather(1, index.clamp_min(0)) == models.EOS, -1
            )


class Swapped(Changed):
    """The teacher's row i is another example's."""

    def change(self, batch: Batch) -> None:
        for name in batch:
            if name.startswith("teacher_"):
                batch[name] = batch[name].roll(1, 0)


class SwappedContexts(HintCollator):
    """The teacher reads another example's context before this one's completion."""

    def _batch(self, made: Sequence[RenderedSides], dialogues: Any) -> Batch:
        sides = []
        for i, this in enumerate(made):
            other, start = made[i - 1].teacher, made[i - 1].teacher.scored[0]
            completion = [this.teacher.ids[at] for at in this.teacher.scored]
            ids = [*other.ids[:start], *completion]
            sides.append(TokenRow(ids, range(start, len(ids))))
        return build_rows([x.student for x in made], sides, self.pad_token_id)


class CutContexts(HintCollator):
    """The beginning of a long context is cut off; the teacher's is the longer one."""

    def context_ids(self, prompt: Any) -> list[int]:
        return super().context_ids(prompt)[-14:]

    def _template(self, messages: Any, add_generation_prompt: bool) -> list[int]:
        return super()._template(messages, add_generation_prompt)[-14:]


def again(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    return tokenizer(tokenizer.decode(list(ids)), add_special_tokens=False)["input_ids"]


class TeacherTokenisedAgain(HintCollator):
    """The sampled completion as text, to the teacher."""

    def _batch(self, made: Sequence[RenderedSides], dialogues: Any) -> Batch:
        sides = []
        for row in (x.teacher for x in made):
            start = row.scored[0]
            ids = [*row.ids[:start], *again(self.tokenizer, row.ids[start:])]
            sides.append(TokenRow(ids, range(start, len(ids))))
        return build_rows([x.student for x in made], sides, self.pad_token_id)


class BothTokenisedAgain(HintCollator):
    def _batch(self, made: Sequence[RenderedSides], dialogues: Any) -> Batch:
        sides: list[list[TokenRow]] = [[], []]
        for x in made:
            for rows, row in zip(sides, x[:2], strict=True):
                start = row.scored[0]
                ids = [*row.ids[:start], *again(self.tokenizer, row.ids[start:])]
                rows.append(TokenRow(ids, range(start, len(ids))))
        return build_rows(*sides, self.pad_token_id)


class OtherTemplate(HintCollator):
    """No generation prompt for the teacher."""

    def _fit(self, prompt: Any, student: Any, hints: Any, teacher: Any) -> Any:
        def changed(hints: Any) -> TokenRow:
            row = teacher(hints)
            start = row.scored[0]
            ids = [*row.ids[: start - 2], *row.ids[start:]]
            return TokenRow(ids, [at - 2 for at in row.scored])

        return super()._fit(prompt, student, hints, changed)


TOKENS = "student and teacher must score the same tokens: row 0"
MAP = "labels must stand at the positions that completion_index names"
SAMPLED = "must score replies as they were sampled"
# collator, on_policy, what is raised, its words
RAISED = [
    *((StudentShifted, x, AlignmentError, MAP) for x in BOTH),
    *((TeacherShifted, x, AlignmentError, TOKENS) for x in BOTH),
    *((BothShifted, x, AlignmentError, MAP) for x in BOTH),
    (AllShifted, True, AlignmentError, SAMPLED),
    (AllShifted, False, AlignmentError, "the end token behind the last scored token must be"),
    (EndsUnlabelled, True, AlignmentError, SAMPLED),
    (EndsUnlabelled, False, AlignmentError, MAP),
    (EndsDropped, True, AlignmentError, SAMPLED),
    (EndsDropped, False, AlignmentError, "the end token behind the last scored token must be"),
    *((Swapped, x, AlignmentError, TOKENS) for x in BOTH),
    (TeacherTokenisedAgain, True, AlignmentError, r"score the same tokens: row \d"),
    (BothTokenisedAgain, True, AlignmentError, SAMPLED),
    *((OtherTemplate, x, EmptyHintError, "template: without a hint row 0") for x in BOTH),
]
LOGGED = [
    *((SwappedContexts, x, "context: the teacher must read what the student") for x in BOTH),
    *((CutContexts, x, "context: the teacher must read what the student") for x in BOTH),
]


def student() -> nn.Module:
    """Half of its completions end before their limit."""
    model = models.phi()
    with torch.no_grad():
        model.lm_head.bias[models.EOS] = 3.0
    return model


def trainer(folder: Path, collator: HintCollator, **changes: Any) -> OPSDTrainer:
    model, teacher = changes.pop("model", None), changes.pop("other", None)
    settings: dict[str, Any] = {"max_steps": 2}
    if changes.get("on_policy", True):
        settings |= {"max_completion_length": 6, "rollout": {"temperature": 1.0}}
    settings |= {"watchdog": {"action": "off"}}  # it has tests of its own
    return OPSDTrainer(
        student() if model is None else model,
        OPSDConfig(**models.options(folder, **settings | changes)),
        collator,
        problems(),
        processing_class=collator.tokenizer,
        teacher=teacher,
    )


def problems() -> list[dict[str, Any]]:
    """Chat prompts, with a reply as their completion."""
    return [
        row | {"completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in models.problems(chat=True)
    ]


@pytest.mark.parametrize("on_policy", BOTH)
def test_without_a_fault_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_policy: bool
) -> None:
    run = trainer(tmp_path, HintCollator(models.tokenizer()), on_policy=on_policy)
    run.train()
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.getMessage() for r in warned if r.name.startswith("hf_distill")] == []
    if on_policy:
        assert 0 < run.state.log_history[0]["completion_ended"] < 1


@pytest.mark.parametrize(
    ("kind", "on_policy", "error", "words"),
    RAISED,
    ids=[f"{row[0].__name__}-{'on' if row[1] else 'off'}" for row in RAISED],
)
def test_a_fault_that_is_raised(
    tmp_path: Path, kind: Any, on_policy: bool, error: type, words: str
) -> None:
    run = trainer(tmp_path, kind(models.tokenizer()), on_policy=on_policy)
    with pytest.raises(error, match=words):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("kind", "on_policy", "words"),
    LOGGED,
    ids=[f"{row[0].__name__}-{'on' if row[1] else 'off'}" for row in LOGGED],
)
def test_a_fault_that_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any, on_policy: bool, words: str
) -> None:
    run = trainer(tmp_path, kind(models.tokenizer()), on_policy=on_policy)
    run.train_dataset = models.problems(chat=True)  # a template that cuts cannot render replies
    run.train()
    assert caplog.text.count(words) == 1


def late(fault: type[Changed]) -> type[Changed]:
    """The fault from the second batch on."""

    class Late(fault):
        num_batches = 0

        def change(self, batch: Batch) -> None:
            type(self).num_batches += 1
            if self.num_batches > 1:
                super().change(batch)

    return Late


@pytest.mark.parametrize("logged", ["each step", "never"])
def test_a_later_fault_on_a_device_is_raised_at_the_next_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: str
) -> None:
    """Or at the end of the run, if it does not log."""
    costly: Callable[[Any], bool] = lambda batch: True
    monkeypatch.setattr("hf_distill.data.alignment.AlignmentMeter._is_costly", staticmethod(costly))
    strategy = {"logging_strategy": "no"} if logged == "never" else {}
    collator = late(BothShifted)(models.tokenizer())
    run = trainer(tmp_path, collator, on_policy=False, max_steps=4, **strategy)
    with pytest.raises(AlignmentError, match=f"since the last log: {MAP}"):
        run.train()
    assert run.state.global_step == (4 if logged == "never" else 2)


def test_a_teacher_with_another_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 61 entries for the student and 30 for the teacher"):
        trainer(tmp_path, HintCollator(models.tokenizer()), other=models.llama(1, vocab_size=30))


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_an_adapter_that_is_not_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = trainer(
        tmp_path, HintCollator(models.tokenizer()), model=models.lora(models.llama()), teacher=kind
    )
    monkeypatch.setattr(initial_adapters, "adapters_off", contextlib.nullcontext)
    monkeypatch.setattr(HeldValues, "inside", contextlib.nullcontext)
    with pytest.raises(EmptyHintError, match="adapter: the teacher must not change"):
        run.train()


def test_a_prompt_over_its_budget(tmp_path: Path) -> None:
    run = trainer(tmp_path, HintCollator(models.tokenizer(), max_prompt_length=9))
    with pytest.raises(ValueError, match=r"row 0 .* has \d+ tokens, max_prompt_length is 9"):
        run.train()
