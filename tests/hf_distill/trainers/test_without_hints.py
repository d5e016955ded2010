"""Without hints an OPSDTrainer is on-policy distillation from another model, and no more."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    Hint,
    HintCollator,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    SelfTeacher,
)
from hf_distill.data.sides import IGNORE_INDEX
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_text_ends import seen

WAYS = {
    "no hints": lambda: HintCollator(models.tokenizer(), []),
    "no column": lambda: HintCollator(models.tokenizer()),
    "no collator": lambda: None,
}


NOTHING = "there are no hints, and the teacher is the student itself"


def rows(count: int = 8, **more: Any) -> list[dict[str, Any]]:
    kept = ("prompt", "completion")
    return [{x: row[x] for x in kept} | more for row in models.problems(count, chat=True)]


def opsd(folder: Path, collator: Any, data: Any = None, **changes: Any) -> OPSDTrainer:
    teacher = changes.pop("teacher", None)
    settings = {"max_completion_length": 6, "max_steps": 2} | changes
    return OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, **settings)),
        collator,
        rows() if data is None else data,
        rows(4),
        processing_class=models.tokenizer(),
        teacher=teacher,
    )


class Counted(ModelTeacher):
    """Keeps the rows that it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.asked: list[Any] = []

    def signal(self, student: nn.Module, side: Any) -> Any:
        self.asked.append(side)
        return super().signal(student, side)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_teacher_reads_the_students_rows_once(
    tmp_path: Path, way: str, on_policy: bool
) -> None:
    changes = {"on_policy": on_policy, "watchdog": {"action": "off"}}
    trained = []
    # a hint that no row has makes rows of the teacher's own, with the same ids
    for collator in (WAYS[way](), HintCollator(models.tokenizer(), Hint(lambda row: None))):
        teacher = Counted(models.llama(1))
        trainer = opsd(tmp_path, collator, teacher=teacher, **changes)
        batches = seen(trainer)
        trained.append(models.weights(trainer.model))
        assert len(teacher.asked) == len(batches) == 2
        for side, batch in zip(teacher.asked, batches, strict=True):
            assert torch.equal(side.inputs["input_ids"], batch["input_ids"])
            assert torch.equal(side.predicts[:, :-1], batch["labels"][:, 1:] != IGNORE_INDEX)
        has_own = any(name.startswith("teacher_") for batch in batches for name in batch)
        assert has_own == (len(trained) == 2)
    assert models.difference(*trained) == 0.0
    assert "eval_loss" in trainer.evaluate()


def test_off_policy_it_is_a_distill_trainer(tmp_path: Path) -> None:
    trainer = opsd(
        tmp_path, HintCollator(models.tokenizer()), teacher=models.llama(1), on_policy=False
    )
    trainer.train()
    config = DistillConfig(
        **models.options(tmp_path, max_steps=2),
        temperature=1.0, alpha=1.0, divergence="jsd", temperature_scaling="none",
    )  # fmt: skip
    other = DistillTrainer(
        models.llama(), config, HintCollator(models.tokenizer(), []), rows(), rows(4),
        processing_class=models.tokenizer(), teacher=models.llama(1),
    )  # fmt: skip
    other.train()
    assert models.difference(models.weights(trainer.model), models.weights(other.model)) == 0.0


def test_some_rows_have_hints(tmp_path: Path) -> None:
    data = [*rows(2), *rows(2, hint="think first")]
    teacher = Counted(models.llama(1))
    off = {"watchdog": {"action": "off"}}
    opsd(tmp_path, None, data, teacher=teacher, max_steps=1, **off).train()
    lengths = teacher.asked[0].inputs["attention_mask"].sum(1) - teacher.asked[0].predicts.sum(1)
    alone = [len(HintCollator(models.tokenizer()).context_ids(row["prompt"])) for row in data]
    assert (lengths - torch.tensor(alone)).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_student_as_its_own_teacher_needs_hints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_policy: bool
) -> None:
    for data in (rows(), Dataset.from_list(rows())):
        trainer = opsd(tmp_path, HintCollator(models.tokenizer()), data, on_policy=on_policy)
        with pytest.raises(ValueError, match="the hint needs column 'hint', the row has"):
            trainer.train()
    with caplog.at_level(logging.WARNING):
        opsd(tmp_path, HintCollator(models.tokenizer(), []), on_policy=on_policy)
    assert (
        caplog.text.count("there are no hints, and the teacher is the student itself (base)") == 1
    )


def test_a_distill_trainer_of_the_student_itself_needs_hints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made(collator: Any, teacher: Any) -> DistillTrainer:
        config = DistillConfig(**models.options(tmp_path, max_steps=1))
        return DistillTrainer(models.llama(), config, collator, rows(), teacher=teacher)

    shared = HintCollator(models.tokenizer())
    with pytest.raises(ValueError, match="the hint needs column 'hint'"):
        made(shared, SelfTeacher()).train()
    made(shared, models.llama(1)).train()  # the user's collator is as it was
    assert "there are no hints" not in caplog.text
    made(HintCollator(models.tokenizer(), []), SelfTeacher("ema"))
    assert caplog.text.count(f"{NOTHING} (ema)") == 1


def test_of_several_teachers_another_model_needs_none(tmp_path: Path) -> None:
    teachers = RoutedTeacher({"own": SelfTeacher(), "other": models.llama(1)}, "domain")
    data = rows(4, domain="other")
    opsd(tmp_path, None, data, teacher=teachers, max_steps=1).train()


@pytest.mark.parametrize("column", ["hints", "Hint", "hint_"])
def test_a_column_that_is_nearly_a_hint_is_no_hint_by_mistake(tmp_path: Path, column: str) -> None:
    trainer = opsd(tmp_path, None, rows(**{column: "x"}), teacher=models.llama(1))
    with pytest.raises(ValueError, match=f"needs column 'hint', .*: if it is '{column}', name tha"):
        trainer.train()
