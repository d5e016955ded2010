"""A check before training: a self-teacher without a hint must say what the student says.

Several silent faults of self-distillation show here, as a divergence that should be zero: contexts
that a collator of one's own builds differently, padding or positions that reach the logits, a
teacher that is not the student, an adapter that was trained before, dropout.
"""

import logging
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_distill.data.batches import TokenRow, pad, unpad
from hf_distill.data.sides import Side
from hf_distill.models.modes import kept_rng
from hf_distill.models.structure import unwrap
from hf_distill.monitoring.self_teacher_check import Compared, SelfTeacherError, apart
from hf_distill.teachers import SelfTeacher

logger = logging.getLogger(__name__)

FEW = 16  # tokens at either end of a completion


class EmptyHintError(SelfTeacherError):
    """Without a hint the teacher does not say what the student says."""


def _side(rows: Sequence[TokenRow], fill: int, padding: str, device: torch.device) -> Side:
    width = max(len(row.ids) for row in rows)
    predicts = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        shift = width - len(row.ids) if padding == "left" else 0
        predicts[i, [position - 1 + shift for position in row.scored]] = True
    inputs = {
        "input_ids": pad([row.ids for row in rows], fill, padding).to(device),
        "attention_mask": pad([[1] * len(row.ids) for row in rows], 0, padding).to(device),
    }
    return Side(inputs, predicts.to(device))


def _few(row: TokenRow) -> TokenRow:
    """The row with its first and last scored tokens only: a completion's logits can be large."""
    scored = [position for position in row.scored if position > 0]
    return TokenRow(row.ids, sorted({*scored[:FEW], *scored[-FEW:]}))


def _check_contexts(student: Sequence[TokenRow], teacher: Sequence[TokenRow]) -> None:
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


class _Checked(Compared):
    """The student and its rows.

    Args:
        model: the student.
        rows: with few scored tokens.
        pad_token_id: for padding.
        in_16_bit: whether the model computes in 16 bits though its logits may be float32.
    """

    error = EmptyHintError
    rows = "without a hint"

    def __init__(
        self, model: nn.Module, rows: Sequence[TokenRow], pad_token_id: int, in_16_bit: bool
    ) -> None:
        self.token_rows, self.pad_token_id = rows, pad_token_id
        self.device = next(unwrap(model).parameters()).device
        super().__init__(model, self.padded("right", pad_token_id), in_16_bit)

    def padded(self, padding: str, fill: int) -> Side:
        return _side(self.token_rows, fill, padding, self.device)

    def check_padding(self) -> None:
        """Rows padded on either side give the logits of rows alone."""
        sides = [_side([row], self.pad_token_id, "right", self.device) for row in self.token_rows]
        alone = torch.cat([self.logits(side) for side in sides])
        for where in ("right", "left"):
            padded = self.logits(self.padded(where, self.pad_token_id))
            found = apart(padded, alone)
            if found <= self.tolerance:
                continue
            other = next(i for i in range(2) if i != self.pad_token_id)
            read = apart(padded, self.logits(self.padded(where, other)))
            name, why = "padding", "other ids in it change them: does the model use attention_mask?"
            if read <= self.tolerance:
                name, why = (
                    "position ids",
                    "other ids in the padding change nothing, so the model counts positions from "
                    "it: does it use position_ids?",
                )
            raise EmptyHintError(
                f"{name}: rows padded on the {where} must give the logits of rows alone, they are "
                f"{found:.2g} nats apart (limit {self.tolerance:g}); {why}"
            )

    def warn_of_dropout(self) -> None:
        was_training = self.model.training
        with kept_rng(self.device):
            self.model.train()
            try:
                found = apart(self.reader.logits(self.model, self.side), self.calm)
            finally:
                self.model.train(was_training)
        if not found <= self.tolerance:
            logger.warning(
                "dropout: in training the student is %.2g nats from itself without dropout, which "
                "the loss cannot tell from what the hint says; consider no dropout",
                found,
            )


@torch.no_grad()
def check_empty_hint(
    model: nn.Module,
    teacher: SelfTeacher,
    student_rows: Sequence[TokenRow],
    teacher_rows: Sequence[TokenRow],
    pad_token_id: int,
    in_16_bit: bool = False,
) -> float:
    """The largest JSD of a token between student and teacher, in nats, on rows without a hint.

    Args:
        model: the student, before training.
        teacher: prepared.
        student_rows: its rows, of different lengths, with completions.
        teacher_rows: the same rows as the teacher's side is built.
        pad_token_id: for padding.
        in_16_bit: whether the model computes in 16 bits though its logits may be float32.

    Raises:
        EmptyHintError: it is not zero, or depends on padding; the message begins with what differs:
            template, padding, position ids, adapter or teacher.
    """
    _check_contexts(student_rows, teacher_rows)
    rows = [_few(row) for row in student_rows]
    if not any(row.scored for row in rows):
        return 0.0  # empty rows
    checked = _Checked(model, rows, pad_token_id, in_16_bit)
    checked.check_padding()
    found = checked.check(teacher)
    checked.warn_of_dropout()
    return found


def find_lost_context(
    student: Sequence[int], teacher: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str] | None:
    """The first text of the student's row that the teacher's has not, and what it has instead.

    Token ids may be others where a hint touches a word: what counts is the text.
    """
    rest = iter(teacher)
    if all(token in rest for token in student):
        return None
    for tag, a, b, c, d in SequenceMatcher(None, student, teacher, autojunk=False).get_opcodes():
        if tag in ("replace", "delete"):
            lost, instead = (str(tokenizer.decode(list(x))) for x in (student[a:b], teacher[c:d]))
            if lost.strip() not in instead:
                return lost, instead
    return None


def warn_of_lost_context(
    batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> None:
    """Log one warning if the teacher's row has not all that the student's has.

    Rows without hints do not show it: a hint in the system message takes the place of one that the
    chat template writes by itself. Nor do they show another example's context, or one cut short.

    Args:
        batch: with teacher rows.
        tokenizer: of its ids.
        num_rows: how many of its rows to look at.
    """
    sides = (("input_ids", "attention_mask"), ("teacher_input_ids", "teacher_attention_mask"))
    if batch.get("teacher_input_ids") is None:
        return
    rows = [unpad(batch[ids][:num_rows], batch[mask][:num_rows]) for ids, mask in sides]
    for i, (student, teacher) in enumerate(zip(*rows, strict=True)):
        lost = find_lost_context(student, teacher, tokenizer)
        if lost is not None:
            logger.warning(
                "context: the teacher must read what the student reads, and the hint; row %d of "
                "the batch has %r for the student, and %r in its place for the teacher (a hint in "
                "the system message replaces one that the chat template writes by itself: give "
                "such prompts their own)",
                i,
                *lost,
            )
            return
