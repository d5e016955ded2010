"""Losses as a user writes them, in plain PyTorch."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.losses import Loss, as_loss
from tests.hf_distill.trainers import models

TEMPERATURE = 2.0  # that of DistillConfig, which an own loss does not read

# Of the built-in losses, which measure them; a loss that does not has none of them in its logs
MEASURED = {"student_entropy", "teacher_entropy", "top1_agreement", "clipped"}


def jsd(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """divergence="jsd" of `DistillConfig`: of half and half, times temperature²."""
    log_q = (student_logits.float() / TEMPERATURE).log_softmax(-1)
    log_p = (teacher_logits.float() / TEMPERATURE).log_softmax(-1)
    log_m = log_p.logaddexp(log_q) - math.log(2)
    twice = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return TEMPERATURE**2 * twice.sum(-1) / 2


def jsd_at_1(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """The bug: another temperature."""
    hot = (TEMPERATURE * x for x in (student_logits, teacher_logits))
    return jsd(*hot, targets)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """The default of `DistillConfig`."""
    log_q = (student_logits.float() / TEMPERATURE).log_softmax(-1)
    log_p = (teacher_logits.float() / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


class Measuring(Loss):
    """The forward KL, and means that can be counted by hand."""

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Any:
        metrics = {
            "target_id": targets,
            "teacher_right": teacher_logits.argmax(-1) == targets,
            "above_30": targets.float().where(targets > 30, float("nan")),
            "width": (student_logits * 0).sum(-1) + student_logits.shape[-1],
        }
        return forward_kl(student_logits, teacher_logits, targets), metrics


class Overrides(DistillTrainer):
    """The JSD by the trainer's method."""

    def token_loss(self, student: Any, teacher: Any, tokens: Any) -> Any:
        loss = as_loss(jsd).with_share(self.loss.alpha, self.loss.measures_hard)
        return loss(student, teacher, tokens)


def distill(folder: Path, loss: Any, **changes: Any) -> DistillTrainer:
    given = {name: changes.pop(name, None) for name in ("model", "teacher", "collator", "words")}
    kind = changes.pop("kind", DistillTrainer)
    args = DistillConfig(**models.options(folder, **changes))
    rows = models.rows()
    return kind(
        given["model"] or models.llama(),
        args,
        given["collator"] or models.Pad(),
        rows,
        rows[:6],
        given["words"],
        teacher=given["teacher"] or models.llama(1),
        loss=loss,
    )
