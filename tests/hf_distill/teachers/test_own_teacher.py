"""What a teacher of one's own may get wrong is an error that names it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import DistillTrainer
from hf_distill.data import Side
from hf_distill.losses import Terms
from hf_distill.models import Signal
from hf_distill.teachers import Teacher, as_teacher
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.own_losses import distill, jsd


class Own(Teacher):
    """Says `said` of logits [B, T, V] and of which positions predict scored tokens [B, T]."""

    def __init__(self, said: Any) -> None:
        self.model, self.said = models.llama(1), said

    @torch.no_grad()
    def signal(self, student: nn.Module, side: Side) -> Signal:
        return self.said(self.model(**side.inputs).logits, side.predicts)


def every_position(logits: Tensor, predicts: Tensor) -> Signal:
    return Signal(logits=logits.flatten(0, 1))


def one_too_few(logits: Tensor, predicts: Tensor) -> Signal:
    return Signal(logits=logits[predicts][1:])


def one(logits: Tensor, predicts: Tensor) -> Signal:
    return Signal(logits=logits[predicts][:1])


def scored(logits: Tensor, predicts: Tensor) -> Signal:
    return Signal(logits=logits[predicts])


@pytest.mark.parametrize("loss", [None, jsd], ids=["built-in", "own"])
@pytest.mark.parametrize("said", [every_position, one_too_few, one])
def test_each_scored_token_has_a_row(tmp_path: Path, said: Any, loss: Any) -> None:
    distill(tmp_path, loss, teacher=Own(scored)).train()
    with pytest.raises(ValueError, match=r"a row for each of \d+ scored tokens .*, got \d+"):
        distill(tmp_path, loss, teacher=Own(said)).train()


def test_a_signal_is_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Own\.signal must return a Signal, got a Tensor"):
        distill(tmp_path, None, teacher=Own(lambda logits, predicts: logits[predicts])).train()
    with pytest.raises(NotImplementedError, match="Teacher must override signal"):
        distill(tmp_path, None, teacher=Teacher()).train()


@pytest.mark.parametrize("given", [jsd, 3, Own], ids=["function", "number", "class"])
def test_what_is_no_teacher_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"teacher must be a model, a name .*, got "):
        as_teacher(given)


def test_token_loss_returns_terms(tmp_path: Path) -> None:
    class Added(DistillTrainer):
        def token_loss(self, student: Signal, teacher: Signal, tokens: Any) -> Terms:
            return super().token_loss(student, teacher, tokens) + super().token_loss(
                student, teacher, tokens
            )

    with pytest.raises(TypeError, match="a loss of tokens must return Terms, got a tuple"):
        distill(tmp_path, None, kind=Added).train()
