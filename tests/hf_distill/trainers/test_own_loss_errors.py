"""What is refused of a user's loss, and what is said of settings that it does not read."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import (
    CachedTeacher,
    CrossTokenizerCollator,
    DistillConfig,
    DistillTrainer,
    RemoteTeacher,
    cache_teacher,
)
from hf_distill.cache import HeadSamples, TopK
from hf_distill.losses import Loss, chunks
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import letters
from tests.hf_distill.trainers.own_losses import Measuring, distill, forward_kl, jsd


def shape(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    return forward_kl(student_logits, teacher_logits, targets).mean()


def nothing(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> None:
    forward_kl(student_logits, teacher_logits, targets)


def odd_metric(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Any:
    loss = forward_kl(student_logits, teacher_logits, targets)
    return loss, {"mine": loss.mean()}


def taken_name(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Any:
    loss = forward_kl(student_logits, teacher_logits, targets)
    return loss, {"tokens": loss, "mine": loss}


def some_chunks(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Any:
    loss = forward_kl(student_logits, teacher_logits, targets)
    return loss, {f"of_{len(targets)}": loss}


def agreement(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    return (student_logits.argmax(-1) != teacher_logits.argmax(-1)).float()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (shape, r"a loss must have the shape \[\d+\], one value a token, got \[\] from shape"),
        (nothing, r"a loss must have the shape \[\d+\], .* got NoneType from nothing"),
        (odd_metric, r"mine must have the shape \[\d+\], one value a token, got \[\] from odd_m"),
        (taken_name, r"other names than what a trainer logs itself, got \['tokens'\] from taken_"),
        (some_chunks, r"must have the same names, got \['soft', 'of_7', .* and \['soft', 'of_2'"),
        (Loss(), "Loss must override per_token or soft"),
        (agreement, "the loss agreement must have a gradient for the student's logits"),
    ],
)
def test_what_a_loss_returns_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any, message: str
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 7 * models.VOCAB * chunks.COPIES_ON_CPU)
    trainer = distill(tmp_path, loss)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        trainer.train()


@pytest.mark.parametrize("loss", ["jsd", 3, Measuring], ids=str)
def test_what_is_no_loss_is_refused(tmp_path: Path, loss: Any) -> None:
    with pytest.raises(TypeError, match=r"loss must be a function f\(student_logits, .* got "):
        distill(tmp_path, loss)


class Skewed(Loss):
    def __init__(self, alpha: float) -> None:
        self.alpha = alpha


def test_an_alpha_of_a_loss_is_refused(tmp_path: Path) -> None:
    message = r"takes from its config, got 0.1 in .*Skewed.* and 0.5 in the config"
    with pytest.raises(ValueError, match=message):
        distill(tmp_path, Skewed(0.1))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_loss_needs_a_teacher(tmp_path: Path, alpha: float) -> None:
    args = DistillConfig(**models.options(tmp_path, alpha=alpha))
    with pytest.raises(ValueError, match=r"needs a teacher|compares with a teacher, got .*jsd"):
        DistillTrainer(models.llama(), args, models.Pad(), models.rows(), loss=jsd)


@pytest.mark.parametrize(
    "codec", [HeadSamples(top_k=8, num_samples=4), TopK(8)], ids=lambda x: x.name
)
def test_a_sparse_cache_is_refused(tmp_path: Path, codec: Any) -> None:
    path, given = tmp_path / "cache", {"codec": codec, "data_collator": models.Pad()}
    cache_teacher(models.llama(1), models.rows(), path, **given)
    message = "the loss jsd reads .* the whole vocabulary, of which a CachedTeacher knows some"
    with pytest.raises(ValueError, match=message):
        distill(tmp_path, jsd, teacher=CachedTeacher(path))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_remote_teacher_is_refused(tmp_path: Path, temperature: float) -> None:
    teacher = RemoteTeacher("http://127.0.0.1:1", "teacher", top_k=8)
    message = "the loss jsd reads .* the whole vocabulary, of which a RemoteTeacher knows some"
    with pytest.raises(ValueError, match=message):
        distill(tmp_path, jsd, teacher=teacher, temperature=temperature)


@pytest.mark.parametrize("divergence", ["jsd", "uld"])
def test_a_collator_for_another_tokenizer_is_refused(tmp_path: Path, divergence: str) -> None:
    collator = CrossTokenizerCollator(models.tokenizer(), letters())
    message = "CrossTokenizerCollator needs divergence 'uld', got a loss of your own with"
    with pytest.raises(ValueError, match=message):
        distill(tmp_path, jsd, collator=collator, divergence=divergence)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, r"got nan: the soft loss is NaN at \d+ of \d+ tokens$"),
        (math.inf, r"got inf: the soft loss is infinite at \d+ of \d+ tokens$"),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hidden states", "logits"])
def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, value: float, said: str, smoothing: float
) -> None:
    def odd(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        loss = forward_kl(student_logits, teacher_logits, targets)
        return torch.where(targets % 2 == 0, value, loss)

    with pytest.raises(FloatingPointError, match=said):
        distill(tmp_path, odd, label_smoothing_factor=smoothing).train()


CHANGED: list[dict[str, Any]] = [
    {"divergence": "jsd"},
    {"temperature": 1.0},
    {"temperature_scaling": "none"},
    {"divergence": "jsd", "beta": "linear:0.1->0.9@3"},
    {"support": "teacher_topk", "top_k": 3, "missing": "renormalise"},
    {"clip": {"bound": 1.0}},
    {"taid": {}},
]


@pytest.mark.parametrize("loss", [jsd, None], ids=["own", "built-in"])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": "2.0", "alpha": 0.3, "clip": {}}, *CHANGED], ids=str
)
def test_settings_of_the_built_in_losses_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], loss: Any
) -> None:
    trainer = distill(tmp_path, loss, **changes)
    lines = [x for x in caplog.messages if x.startswith("a setting is not used")]
    unread = [] if loss is None or changes not in CHANGED else sorted(changes)
    assert sorted(x.split(": ")[1].split(" is read by the built")[0] for x in lines) == unread
    if changes == {"taid": {}}:
        assert (trainer._taid is None) == (loss is jsd)
