"""Every bad input, and the words of its error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    Hint,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    SelfTeacher,
)
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

ROW = {"prompt": "What is 1 + 2 ?", "hint": "Hint : 3", "completion": "The answer is 3 ."}


def distill(folder: Path, *, data: Any = None, **changes: Any) -> DistillTrainer:
    model, teacher = changes.pop("model", None), changes.pop("teacher", models.llama(1))
    extra = {k: changes.pop(k) for k in ("compute_loss_func",) if k in changes}
    return DistillTrainer(
        models.llama() if model is None else model,
        DistillConfig(**models.options(folder, **changes)),
        models.Pad(),
        models.rows() if data is None else data,
        teacher=teacher,
        **extra,
    )


def opsd(folder: Path, **changes: Any) -> OPSDTrainer:
    model, data = changes.pop("model", None), changes.pop("data", None)
    collator = changes.pop("collator", None)
    settings = {"max_completion_length": 8} | changes
    return OPSDTrainer(
        models.llama() if model is None else model,
        OPSDConfig(**models.options(folder, **settings)),
        collator,
        models.problems() if data is None else data,
        processing_class=models.tokenizer(),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"completion": None},
            "row 1 of the batch: 'completion' is None, it must be a string or a list",
        ),
        ({"prompt": None}, "row 1 of the batch: 'prompt' is None, it must be"),
        ({"completion": ""}, "row 1 of the batch: the completion must not be empty, got ''"),
        (
            {"completion": " \n"},
            r"row 1 of the batch: the completion must not be empty, got ' \\n'",
        ),
        ({"completion": []}, r"row 1 of the batch: the completion must not be empty, got \[\]"),
        ({"hint": ""}, "row 1 of the batch: the hint must be a non-empty string, got ''"),
        ({"hint": None}, "row 1 of the batch: the hint's column 'hint' must not be None"),
        ({"hint": 3}, "row 1 of the batch: the hint must be a non-empty string, got 3"),
    ],
)
def test_bad_rows(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HintCollator(models.tokenizer())([ROW, ROW | changes])


@pytest.mark.parametrize("text", ["clue", "The {clue} is"])
def test_a_missing_hint_column(text: str) -> None:
    message = r"row 0 of the batch: the hint needs column 'clue', the row has \['completion', 'hin"
    for call in (HintCollator.__call__, HintCollator.contexts):
        with pytest.raises(ValueError, match=message):
            call(HintCollator(models.tokenizer(), text), [ROW])


def test_a_hint_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="the hint must be a non-empty string, got 7"):
        HintCollator(models.tokenizer(), lambda row: 7)([ROW])


def test_a_hint_without_a_user_turn() -> None:
    chat = [{"role": "system", "content": "You are brief ."}]
    with pytest.raises(ValueError, match="a hint in the user turn needs a user message"):
        HintCollator(models.tokenizer())([ROW | {"prompt": chat}])


def test_an_unknown_place() -> None:
    with pytest.raises(
        ValueError,
        match=r"where must be one of \('user', 'system', 'before', 'after'\), got 'prompt'",
    ):
        Hint("hint", where="prompt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ({"beta": 1.1}, r"beta must be in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (
            {"divergence": "kl"},
            r"divergence must be one of \('forward_kl', .*'k3', 'uld', 'spans'\), got "
            "'kl'; do you mean 'forward_kl' or 'reverse_kl' or",
        ),
        ({"divergence": "forward-kl"}, "got 'forward-kl'; do you mean 'forward_kl'"),
        ({"divergence": "zzz"}, r"'spans'\), got 'zzz'$"),
        ({"temperature_scaling": "t"}, r"temperature_scaling must be one of \('none', 't2'\), got"),
    ],
)
@pytest.mark.parametrize("kind", [DistillConfig, OPSDConfig])
def test_bad_settings(tmp_path: Path, kind: type, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(output_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "frozen"}, r"teacher must be one of .*'lora_scale'\), got 'frozen'"),
        ({"self_teacher": {"ema_decay": 1.0}}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"rollout": {"steps_per_rollout": 0}}, "steps_per_rollout must be at least 1, got 0"),
        ({"rollout": {"temperature": -1.0}}, "rollout temperature must not be negative, got -1.0"),
        ({"clip": {"bound": 0.0}}, "clip must be positive and finite, or None, got 0.0"),
        ({"clip": {"level": "row"}}, "clip_level must be one of"),
    ],
)
def test_bad_opsd_settings(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPSDConfig(output_dir=str(tmp_path), **changes)


def test_args_of_another_type(tmp_path: Path) -> None:
    plain = TrainingArguments(**models.options(tmp_path))
    with pytest.raises(TypeError, match="args must be a DistillConfig, got TrainingArguments"):
        DistillTrainer(models.llama(), plain, teacher=models.llama(1))
    config = DistillConfig(**models.options(tmp_path))
    with pytest.raises(TypeError, match="args must be an OPSDConfig, got DistillConfig"):
        OPSDTrainer(models.llama(), config, processing_class=models.tokenizer())
    with pytest.raises(TypeError, match="data_collator must be a HintCollator, got Pad"):
        opsd(tmp_path, collator=models.Pad())


def test_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"alpha 0.5 > 0 needs a teacher; pass teacher="):
        distill(tmp_path, teacher=None)


def test_the_student_as_its_own_teacher(tmp_path: Path) -> None:
    model = models.llama()
    with pytest.raises(ValueError, match="the teacher must not be the student's own object"):
        distill(tmp_path, model=model, teacher=model)


def test_a_teacher_with_another_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 61 entries for the student and 50 for the teacher"):
        distill(tmp_path, teacher=models.llama(1, vocab_size=50))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(models.problems())


def test_repeated_rollouts_need_a_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps_per_rollout 2 > 1 needs a dataset with a length"):
        opsd(tmp_path, data=Stream(), rollout={"steps_per_rollout": 2}).train()


def test_repeated_rollouts_need_a_plain_order(tmp_path: Path) -> None:
    trainer = opsd(
        tmp_path, rollout={"steps_per_rollout": 2}, train_sampling_strategy="group_by_length"
    )
    with pytest.raises(ValueError, match="'random' or 'sequential', got list and 'group"):
        trainer.train()


def test_rows_longer_than_the_model(tmp_path: Path) -> None:
    trainer = opsd(tmp_path, model=models.llama(max_position_embeddings=24), max_steps=1)
    message = (
        r"row 0 of the batch: the teacher's row has \d+ tokens \(context 2\d, completion \d\), "
        "the model takes 24"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def spoiled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    return model


@pytest.mark.parametrize("reads_logits", [False, True])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_logits_that_are_not_numbers(
    tmp_path: Path, side: str, alpha: float, reads_logits: bool
) -> None:
    trainer = distill(tmp_path, alpha=alpha, label_smoothing_factor=0.1 if reads_logits else 0.0)
    trainer.compute_loss(trainer.model, models.Pad()(models.rows(4)))  # the probe sees good weights
    spoiled(trainer.model if side == "student" else trainer.teacher.model)
    tokens = sum(label != -100 for row in models.rows(4) for label in row["labels"][1:])
    other = "teacher" if side == "student" else "student"
    message = rf"the loss must be finite, got nan: {side} logits are NaN at {tokens} of {tokens} "
    with pytest.raises(FloatingPointError, match=message) as caught:
        trainer.train()
    assert other not in str(caught.value)


def test_a_student_that_was_never_a_number_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="student logits are NaN at"):
        distill(tmp_path, model=spoiled(models.llama())).train()


def test_an_infinite_divergence_is_named(tmp_path: Path) -> None:
    trainer = distill(tmp_path, alpha=1.0, divergence="reverse_kl", model=models.phi())
    trainer.teacher.model = models.phi(1)
    with torch.no_grad():
        trainer.teacher.model.lm_head.bias[9] = float("-inf")
    message = (
        r"got inf: the divergence is infinite at \d+ of \d+ tokens \(the teacher gives a token prob"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


@pytest.mark.parametrize("is_set_later", [False, True])
def test_an_infinite_hard_loss_is_not_blamed_on_the_teacher(
    tmp_path: Path, is_set_later: bool
) -> None:
    no_number = lambda *_args, **_kwargs: torch.tensor(float("nan"))
    trainer = distill(tmp_path, alpha=0.5, compute_loss_func=None if is_set_later else no_number)
    trainer.compute_loss_func = no_number
    with pytest.raises(FloatingPointError) as caught:
        trainer.compute_loss(trainer.model, models.Pad()(models.rows(4)))
    assert "infinite at 0 tokens" not in str(caught.value)


def test_no_labels(tmp_path: Path) -> None:
    trainer = distill(tmp_path)
    batch = models.Pad()(models.rows(4))
    del batch["labels"]
    with pytest.raises(ValueError, match=r"a batch needs labels of shape \[rows, positions\], got"):
        trainer.compute_loss(trainer.model, batch)


def test_a_self_teacher_for_distillation_needs_no_other_model(tmp_path: Path) -> None:
    distill(tmp_path, teacher=SelfTeacher("ema"), max_steps=1).train()
