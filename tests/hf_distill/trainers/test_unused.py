"""A setting that a run does not read is named; one that it reads is not."""

import logging
from pathlib import Path
from typing import Any

import pytest

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    Feedback,
    HintCollator,
    OPSDTrainer,
    SelfTeacher,
)
from hf_distill.trainers.opsd_config import OPSDConfig
from tests.hf_distill.trainers import models

ROLLOUT = {"temperature": 1.0, "steps_per_rollout": 2, "importance_clip": 2.0}

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

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
        ["self_teacher.ema_decay needs teacher 'ema'"],
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
    lines = [r.getMessage() for r in caplog.records if r.name == "hf_distill.trainers.opsd_trainer"]
    assert [x.split(": ")[1] for x in lines if x.startswith("a setting is not used")] == said
    assert all(r.levelno == logging.WARNING for r in caplog.records if "not used" in r.message)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"entropy": 1.0}, []),
        ({"reasoning": 0.5}, []),
        ({"reasoning": 0.5, "markers": ["a", "b"]}, []),
        ({"reasoning": 1.0, "markers": ["<think>", "</think>"]}, []),
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
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [x.split(": ")[1] for x in lines if x.startswith("a setting is not used")] == said
