"""A check before training: a self-teacher without a hint must say what the student says.

Several silent faults of self-distillation show here, as a divergence that should be zero: contexts
that a collator of one's own builds differently, padding or positions that reach the logits, a
teacher that is not the student, an adapter that was trained before, dropout.
"""

import logging
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_distill.alignment import Rendered, Side, pad
from hf_distill.heads import Reader, evaluating, kept_rng, unwrap
from hf_distill.teachers import SelfTeacher, Teacher, adapters_off
from metal_ops import DivergenceSpec, divergence

logger = logging.getLogger(__name__)

# Largest JSD of a token, in nats. Rounding gives 1e-10 in float32 and some 1e-4 in bfloat16, whose
# logits are off by a hundredth; the faults give more than 1e-2.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6}
TOLERANCE_16_BIT = 5e-3


class EmptyHintError(ValueError):
    """Without a hint the teacher does not say what the student says."""


def _side(rows: Sequence[Rendered], pad_token_id: int, padding: str, device: torch.device) -> Side:
    width = max(len(row.ids) for row in rows)
    predicts = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        shift = width - len(row.ids) if padding == "left" else 0
        predicts[i, [position - 1 + shift for position in row.scored]] = True
    inputs = {
        "input_ids": pad([row.ids for row in rows], pad_token_id, padding).to(device),
        "attention_mask": pad([[1] * len(row.ids) for row in rows], 0, padding).to(device),
    }
    return Side(inputs, predicts.to(device))


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest JSD of a token, in nats, of logits [N, V]."""
    return float(divergence(one, other, DivergenceSpec("jsd")).max())


def _check_contexts(student: Sequence[Rendered], teacher: Sequence[Rendered]) -> None:
    for i, (one, other) in enumerate(zip(student, teacher, strict=True)):
        if list(one.ids) == list(other.ids):
            continue
        pairs = enumerate(zip(one.ids, other.ids, strict=False))
        shorter = min(len(one.ids), len(other.ids))
        at = next((k for k, (a, b) in pairs if a != b), shorter)
        raise EmptyHintError(
            f"template: without a hint row {i} must be the same for both sides; the student has "
            f"{len(one.ids)} tokens, the teacher {len(other.ids)}, and token {at} is the first to "
            f"differ: {list(one.ids[at : at + 3])} and {list(other.ids[at : at + 3])}"
        )


@torch.no_grad()
def check_empty_hint(
    model: nn.Module,
    teacher: Teacher,
    student_rows: Sequence[Rendered],
    teacher_rows: Sequence[Rendered],
    pad_token_id: int,
    in_16_bit: bool = False,
) -> float:
    """The largest JSD of a token between student and teacher, in nats, on rows without a hint.

    Args:
        model: the student, before training.
        teacher: prepared; a teacher that is the student itself.
        student_rows: its rows, of different lengths.
        teacher_rows: the same rows as the teacher's side is built.
        pad_token_id: for padding.
        in_16_bit: whether the model computes in 16 bits though its logits may be float32.

    Raises:
        EmptyHintError: it is not zero, or depends on padding; the message names what differs.
    """
    _check_contexts(student_rows, teacher_rows)
    if not any(len(row.scored) for row in student_rows):
        return 0.0  # prompts of one token
    parameter = next(unwrap(model).parameters())
    reader, device = Reader("student", "read once, before training"), parameter.device
    right = _side(student_rows, pad_token_id, "right", device)
    with evaluating(model):
        alone = torch.cat(
            [reader.logits(model, _side([r], pad_token_id, "right", device)) for r in student_rows]
        )
        padded = {"right": reader.logits(model, right)}
        left = _side(student_rows, pad_token_id, "left", device)
        padded["left"] = reader.logits(model, left)
    in_16_bit = in_16_bit or any(p.dtype not in TOLERANCE for p in unwrap(model).parameters())
    tolerance = TOLERANCE_16_BIT if in_16_bit else TOLERANCE.get(alone.dtype, TOLERANCE_16_BIT)
    for where, logits in padded.items():
        found = _apart(logits, alone)
        if not found <= tolerance:
            raise EmptyHintError(
                f"padding or position ids: rows padded on the {where} must give the logits of rows "
                f"alone, they are {found:.2g} nats apart (limit {tolerance:g}): does the model use "
                "attention_mask and position_ids?"
            )
    side = _side(teacher_rows, pad_token_id, "right", device)
    said = teacher.signal(model, side).dense()
    found = _apart(padded["right"], said)
    if not found <= tolerance:
        _explain(model, teacher, reader, right, said, found, tolerance)
    _warn_of_dropout(model, reader, right, padded["right"], tolerance)
    return found


def _explain(
    model: nn.Module,
    teacher: Teacher,
    reader: Reader,
    side: Side,
    said: Tensor,
    found: float,
    tolerance: float,
) -> None:
    """Warn where an adapter is the reason, raise where none is known."""
    bare = unwrap(model)
    if isinstance(bare, PeftModel):
        with evaluating(model), adapters_off(bare):
            without = reader.logits(model, side)
        weaker = isinstance(teacher, SelfTeacher) and teacher.kind == "lora_scale"
        if weaker or _apart(without, said) <= tolerance:
            logger.warning(
                "adapter: without a hint the student and its teacher, the model with its adapters "
                "off or weaker, are %.2g nats apart: the adapter was trained before, and is pulled "
                "back towards the base where hints say nothing",
                found,
            )
            return
    raise EmptyHintError(
        f"teacher: without a hint it must say what the student says, they are {found:.2g} nats "
        f"apart (limit {tolerance:g}) on the same rows in eval mode: its weights or its adapters "
        "are others"
    )


def _warn_of_dropout(
    model: nn.Module, reader: Reader, side: Side, calm: Tensor, tolerance: float
) -> None:
    was_training, device = model.training, calm.device
    with kept_rng(device):
        model.train()
        try:
            found = _apart(reader.logits(model, side), calm)
        finally:
            model.train(was_training)
    if not found <= tolerance:
        logger.warning(
            "dropout: in training the student is %.2g nats from itself without dropout, which the "
            "loss cannot tell from what the hint says; consider no dropout",
            found,
        )
