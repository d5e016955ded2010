"""A setting that a run does not read is named; one that it reads is not."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    Feedback,
    HintCollator,
    OPSDTrainer,
    SelfTeacher,
)
from hf_distill.teachers import Teacher
from hf_distill.trainers.opsd_config import OPSDConfig
from hf_distill.trainers.unread_settings import OF_TEACHER
from tests.hf_distill.trainers import models

ROLLOUT = {"temperature": 1.0, "steps_per_rollout": 2, "importance_clip": 2.0}

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def named(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [x.split(": ")[1] for x in lines if x.startswith("a setting is not used")]


CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {}, []),
    ({"rollout": ROLLOUT}, {}, []),
    (
        {"on_policy": False, "rollout": ROLLOUT},
        {},
        [
            "rollout.importance_clip needs on_policy",
            "rollout.steps_per_rollout needs on_policy",
            "rollout.temperature needs on_policy",
        ],
    ),
    ({"on_policy": False, "rollout": {"temperature": 0.7}}, {}, []),  # the default
    ({"rollout": {"max_turns": 2}}, {}, ["rollout.max_turns needs an environment"]),
    ({"rollout": {"max_turns": 2}}, {"environment": lambda x: [Feedback() for _ in x]}, []),
    (
        {"rollout": {"importance_clip": 2.0}},
        {},
        ["rollout.importance_clip needs steps_per_rollout > 1"],
    ),
    ({"on_policy": False, "max_completion_length": 256}, {}, []),  # the default
    (
        {"on_policy": False, "max_completion_length": 8},
        {},
        ["max_completion_length needs on_policy"],
    ),
    (
        {"teacher": "ema"},
        {"teacher": SelfTeacher("live")},
        ["teacher 'ema' gives way to the trainer's argument teacher="],
    ),
    (
        {"contrast": {"kind": "target"}, "contrast_weight": 0.5},
        {},
        [
            "contrast.kind needs a HintCollator with a contrast",
            "contrast_weight needs a HintCollator with a contrast",
        ],
    ),
    ({"self_teacher": {"ema_decay": 0.9}}, {}, ["self_teacher.ema_decay needs teacher 'ema'"]),
    ({"teacher": "ema", "self_teacher": {"ema_decay": 0.9}}, {}, []),
    (
        {"teacher": "ema", "self_teacher": {"lora_scale": 0.1}},
        {},
        ["self_teacher.lora_scale needs teacher 'lora_scale'"],
    ),
    ({"teacher": "lora_scale", "self_teacher": {"lora_scale": 0.1}}, {}, []),
    (
        {"teacher": "ema", "self_teacher": {"ema_decay": 0.9}},
        {"teacher": SelfTeacher("live")},
        [
            "teacher 'ema' gives way to the trainer's argument teacher=",
            "self_teacher.ema_decay needs teacher 'ema'",
        ],
    ),
]


@pytest.mark.parametrize(("settings", "arguments", "said"), CASES)
def test_what_is_not_read_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    arguments: dict[str, Any],
    said: list[str],
) -> None:
    tokenizer = models.tokenizer()
    OPSDTrainer(
        models.lora(models.llama()),
        OPSDConfig(**models.options(tmp_path, **settings)),
        HintCollator(tokenizer),
        models.problems(),
        processing_class=tokenizer,
        **arguments,
    )
    assert named(caplog) == said
    assert all(r.levelno == logging.WARNING for r in caplog.records if "not used" in r.message)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"entropy": 1.0}, []),
        ({"reasoning": 0.5}, []),
        ({"reasoning": 0.5, "markers": ["a", "b"]}, []),
        ({"reasoning": 1.0, "markers": ["<think>", "</think>"]}, []),
        ({"entropy": -1.0, "entropy_floor": 0.2}, []),
        (
            {"entropy": 1.0, "entropy_floor": 0.2},
            ["token_weights.entropy_floor needs a token_weights.entropy below 0"],
        ),
        ({"position": "early", "position_floor": 0.2, "position_width": 0.2}, []),
        (
            {"skip_first": 2, "position_floor": 0.2, "position_middle": 0.2},
            [
                "token_weights.position_floor needs a token_weights.position",
                "token_weights.position_middle needs a token_weights.position",
            ],
        ),
        (
            {"entropy": 1.0, "markers": ["a", "b"]},
            ["token_weights.markers needs a token_weights.reasoning other than 1"],
        ),
    ],
)
@pytest.mark.parametrize("kind", [DistillTrainer, OPSDTrainer])
def test_markers_that_are_not_read_are_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type[DistillTrainer],
    settings: dict[str, Any],
    said: list[str],
) -> None:
    config = OPSDConfig if kind is OPSDTrainer else DistillConfig
    args = config(**models.options(tmp_path, token_weights=settings))
    rows, tokenizer = models.problems(), models.tokenizer()
    kind(models.llama(), args, None, rows, processing_class=tokenizer, teacher=models.llama(1))
    assert named(caplog) == said


NO_BETA = (
    "beta needs a divergence that has it ('alpha', 'jsd', 'mixed_kl', 'skew_kl', "
    "'skew_reverse_kl'), got "
)
TOO_LONG = "watchdog.too_long needs completions that the student samples"


class Sparse(Teacher):
    """It knows some entries; `missing` says what becomes of the others."""

    dense = False


# settings, the teacher, and what is said; None is another model
BOTH: list[tuple[dict[str, Any], Any, list[str]]] = [
    ({"beta": 0.1}, None, [f"{NO_BETA}'forward_kl'"]),
    ({"beta": 0.1, "divergence": "k3"}, None, [f"{NO_BETA}'k3'"]),
    ({"beta": 0.5}, None, []),
    ({"beta": 0.1, "divergence": "jsd"}, None, []),
    ({"missing": "zero"}, None, ["missing needs a support other than 'full'"]),
    ({"missing": "zero", "support": "union", "top_k": 4}, None, []),
    ({"missing": "renormalise"}, Sparse(), []),
    ({"clip": {"level": "token"}}, None, ["clip.level needs a clip.bound"]),
    ({"clip": {"level": "token", "bound": 1.0}}, None, []),
    ({"clip": {"level": "vocab_entry"}}, None, []),
    ({"temperature_scaling": "none"}, None, []),
    ({"hidden": {"loss": "l1"}}, None, ["hidden.loss needs hidden_layers"]),
    ({"hidden_weight": 1.0}, None, ["hidden_weight needs hidden_layers"]),
    (
        {"hidden_layers": "last", "hidden_weight": 0.0},
        None,
        ["hidden_layers needs a hidden_weight or a hidden.attention_weight above 0"],
    ),
    ({"hidden_layers": "last", "hidden": {"loss": "l1"}}, None, []),
    ({"watchdog": {"action": "off"}}, None, []),
    (
        {"watchdog": {"action": "off", "window": 2}},
        None,
        ["watchdog.window needs an action other than 'off'"],
    ),
    ({"watchdog": {"action": "stop", "window": 2, "dead_signal": 0.1}}, None, []),
    ({"watchdog": {"too_long": 3.0, "endless": None}}, None, [TOO_LONG]),
    ({"watchdog": {"clipped": 0.1}}, None, ["watchdog.clipped needs a clip.bound"]),
    ({"watchdog": {"clipped": 0.1}, "clip": {"bound": 1.0}}, None, []),
    ({"watchdog": {"ema_still": 0.1}}, None, ["watchdog.ema_still needs a self-teacher 'ema'"]),
    ({"watchdog": {"ema_same": 0.1}}, SelfTeacher("ema"), []),
    (
        {"watchdog": {"teacher_moves": 0.2}},
        SelfTeacher("base"),
        ["watchdog.teacher_moves needs a self-teacher 'live'"],
    ),
    ({"watchdog": {"teacher_follows": 0.2}}, SelfTeacher("base"), []),
    ({"watchdog": {"teacher_follows": 0.2}}, None, []),
    (
        {"watchdog": {"teacher_follows": 0.2}},
        SelfTeacher("live"),
        ["watchdog.teacher_follows needs a teacher that is another model, or 'base'"],
    ),
]


@pytest.mark.parametrize(("settings", "teacher", "said"), BOTH)
def test_a_distill_trainer_names_what_it_does_not_read(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    teacher: Any,
    said: list[str],
) -> None:
    args = DistillConfig(**models.options(tmp_path, **settings))
    teacher = models.llama(1) if teacher is None else teacher
    DistillTrainer(models.llama(), args, models.Pad(), models.rows(), teacher=teacher)
    assert named(caplog) == said


def test_limits_of_completions_are_read_where_these_are_sampled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = models.tokenizer()
    for on_policy in (True, False):
        OPSDTrainer(
            models.llama(),
            OPSDConfig(**models.options(tmp_path, on_policy=on_policy, watchdog={"too_long": 3.0})),
            HintCollator(tokenizer),
            models.problems(),
            processing_class=tokenizer,
        )
        assert named(caplog) == ([] if on_policy else [TOO_LONG])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"watchdog": {"action": "off"}}, []),
        (
            {"temperature": 1.0, "divergence": "jsd", "beta": 0.1, "hidden_layers": "last"},
            [
                f"{x} needs a teacher"
                for x in ("divergence", "temperature", "beta", "hidden_layers")
            ],
        ),
        (
            {"clip": {"bound": 1.0}, "watchdog": {"window": 2}, "missing": "zero"},
            [f"{x} needs a teacher" for x in ("missing", "clip", "watchdog")],
        ),
    ],
)
def test_without_a_teacher_nothing_of_the_soft_loss_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: list[str]
) -> None:
    args = DistillConfig(**models.options(tmp_path, **({"alpha": 0.0} | settings)))
    DistillTrainer(models.llama(), args, models.Pad(), models.rows())
    assert named(caplog) == said


def test_every_field_has_a_reader_that_is_known() -> None:
    """A field that is new here needs a look: when is it not read?"""
    plain = {x.name for x in dataclasses.fields(TrainingArguments)}
    found = {x.name for x in dataclasses.fields(OPSDConfig)} - plain
    always = {"alpha", "on_policy", "token_weights"}  # token_weights without a teacher: an error
    # without on_policy; without FSDP 2 or a teacher; without forecast_rows; without teacher "base"
    errors = {"anchor_weight", "log_completions", "forecast_rows", "shard_loss", "forecast_steps"}
    errors.add("log_token_values")
    errors |= {"base_kl_weight", "max_tokens_per_batch"}  # the latter with on_policy
    of_opsd = {"teacher", "self_teacher", "rollout", "max_completion_length"}
    of_opsd |= {"contrast", "contrast_weight"}
    assert found == {*OF_TEACHER, *always, *errors, *of_opsd}


def test_a_config_of_another_trainer_is_an_error(tmp_path: Path) -> None:
    args = OPSDConfig(**models.options(tmp_path))
    message = "a DistillTrainer reads a DistillConfig, got OPSDConfig: .* by an OPSDTrainer"
    with pytest.raises(TypeError, match=message):
        DistillTrainer(models.llama(), args, None, models.rows(), teacher=models.llama(1))
    other: Any = DistillConfig(**models.options(tmp_path))
    with pytest.raises(TypeError, match="args must be an OPSDConfig, got DistillConfig"):
        OPSDTrainer(models.llama(), other, None, models.problems())
