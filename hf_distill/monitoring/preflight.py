"""A check before training: a self-teacher without a hint must say what the student says.

Several silent faults of self-distillation show here, as a divergence that should be zero: contexts
that a collator of one's own builds differently, padding that reaches the logits, a teacher that is
not the student, an adapter that was trained before, dropout.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_distill.data.batches import TokenRow, pad, unpad
from hf_distill.data.packed_batches import by_rows
from hf_distill.data.sides import Side
from hf_distill.models.modes import kept_rng
from hf_distill.models.structure import causal_lm, unwrap
from hf_distill.monitoring.self_teacher_check import Compared, SelfTeacherError, apart
from hf_distill.teachers import SelfTeacher

logger = logging.getLogger(__name__)

FEW = 16  # tokens at either end of a completion


class EmptyHintError(SelfTeacherError):
    """Without a hint the teacher does not say what the student says."""


Images = Mapping[str, Tensor]
"""The inputs that the images of a row make."""

MoreInputs = Callable[[Tensor, Sequence[Images]], Mapping[str, Tensor]]
"""Makes what an image-text model reads besides rows of ids [B, T], from the images of each row."""


def _side(
    rows: Sequence[TokenRow],
    fill: int,
    device: torch.device,
    images: Sequence[Images],
    more_inputs: MoreInputs,
) -> Side:
    """Return the rows, padded on the right, and their images."""
    width = max(len(row.ids) for row in rows)
    predicts = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        predicts[i, [position - 1 for position in row.scored]] = True
    inputs = {
        "input_ids": pad([row.ids for row in rows], fill).to(device),
        "attention_mask": pad([[1] * len(row.ids) for row in rows], 0).to(device),
    }
    more = more_inputs(pad([row.ids for row in rows], fill), images)
    inputs |= {name: value.to(device) for name, value in more.items()}
    return Side(inputs, predicts.to(device))


def _has_dropout(model: nn.Module) -> bool:
    """Return whether a module or the config has dropout: some give attention only a number."""
    if any(isinstance(x, nn.Dropout) and x.p > 0 for x in model.modules()):
        return True
    given = vars(getattr(causal_lm(model), "config", None) or object)
    return any("drop" in name and isinstance(x, float) and x > 0 for name, x in given.items())


def _few(row: TokenRow) -> TokenRow:
    """Keep only the first and last scored tokens of a row: a completion's logits can be large."""
    scored = [position for position in row.scored if position > 0]
    return TokenRow(row.ids, sorted({*scored[:FEW], *scored[-FEW:]}))


def _other(row: TokenRow, images: Images) -> TokenRow:
    """Return another row of the same length, of which nothing is scored.

    One with images is the same, for what stands for them has its order.
    """
    return TokenRow(list(row.ids if images else reversed(row.ids)), [])


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
    """Holds the student and its rows, to check them.

    Args:
        model: the student.
        rows: with few scored tokens.
        pad_token_id: for padding.
        in_16_bit: whether the model computes in 16 bits though its logits may be float32.
        images: of each row.
        more_inputs: makes the inputs of the images.
    """

    error = EmptyHintError
    rows = "without a hint"

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[TokenRow],
        pad_token_id: int,
        in_16_bit: bool,
        images: Sequence[Images],
        more_inputs: MoreInputs,
    ) -> None:
        self.token_rows, self.pad_token_id = rows, pad_token_id
        self.images, self.more_inputs = images, more_inputs
        self.place = next(unwrap(model).parameters()).device
        super().__init__(model, self._side(rows, images, pad_token_id), in_16_bit)

    def _side(self, rows: Sequence[TokenRow], images: Sequence[Images], fill: int) -> Side:
        return _side(rows, fill, self.place, images, self.more_inputs)

    def check_padding(self) -> None:
        """Check that rows padded on the right give the logits of rows alone; none is padded left.

        Raises:
            EmptyHintError: they do not, because the padding is read.
        """
        alone = self.rows_alone(lambda row, _: [row])
        found = apart(self.calm, alone)
        if found <= self.tolerance:
            return
        shown = (
            f"rows padded on the right must give the logits of rows alone, they are {found:.2g} "
            f"nats apart (limit {self.tolerance:g})"
        )
        beside = apart(self.rows_alone(lambda row, x: [row, _other(row, x)]), alone)
        if beside > max(self.tolerance, found / 4):
            logger.warning(
                "batches: %s; without any padding a row beside another is %.2g nats from the row "
                "alone: what the rows of a batch share (the rounding of quantized weights, say) is "
                "the cause; training goes on",
                shown,
                beside,
            )
            return
        other = next(i for i in range(2) if i != self.pad_token_id)
        filled = self._side(self.token_rows, self.images, other)
        if apart(self.calm, self.logits(filled)) > self.tolerance:
            raise EmptyHintError(
                f"padding: {shown}; other ids in it change them: does the model use "
                "attention_mask, and read no token that stands behind?"
            )
        logger.warning(
            "batches: %s; other ids in the padding change nothing, so the width of the batch is "
            "the cause (a choice of the k best among equals, say); training goes on",
            shown,
        )

    def rows_alone(self, around: Callable[[TokenRow, Images], list[TokenRow]]) -> Tensor:
        """Return [N, V] logits of each row in its own batch, with what `around` puts below it."""
        found = []
        for row, images in zip(self.token_rows, self.images, strict=True):
            rows = around(row, images)
            side = self._side(rows, [images] * len(rows), self.pad_token_id)
            found.append(self.logits(side))
        return torch.cat(found)

    def warn_of_dropout(self) -> None:
        was_training = self.model.training
        with kept_rng(self.device):
            self.model.train()
            try:
                noisy, again = (self.reader.logits(self.model, self.side) for _ in range(2))
            finally:
                self.model.train(was_training)
        found = apart(noisy, self.calm)
        if found <= self.tolerance:
            return
        if math.isnan(found):
            logger.warning("training mode: the student's logits are NaN in it, in eval mode not")
        elif apart(noisy, again) <= self.tolerance:
            logger.warning(
                "training mode: in it the student is %.2g nats from itself in eval mode, the same "
                "each time, so this is no dropout; the teacher is read in eval mode",
                found,
            )
        else:
            logger.warning(
                "%s: in training the student is %.2g nats from itself without it, which "
                "the loss cannot tell from what the hint says; consider none",
                "dropout" if _has_dropout(self.bare) else "noise that is no dropout module",
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
    images: Sequence[Images] | None = None,
    more_inputs: MoreInputs = lambda _, __: {},
) -> float:
    """Return a token's largest JSD of student and teacher, in nats, on rows without a hint.

    Args:
        model: the student, before training.
        teacher: prepared.
        student_rows: its rows, of different lengths, with completions.
        teacher_rows: the same rows as the teacher's side is built.
        pad_token_id: for padding.
        in_16_bit: whether the model computes in 16 bits though its logits may be float32.
        images: of each row; None means that there are none.
        more_inputs: makes the inputs of the images.

    Raises:
        EmptyHintError: it is not zero, or depends on the padding that stands behind a row; the
            message begins with what differs: template, numbers, padding, adapter or teacher.
    """
    _check_contexts(student_rows, teacher_rows)
    rows = [_few(row) for row in student_rows]
    if not any(row.scored for row in rows):
        return 0.0  # empty rows
    images = [{}] * len(rows) if images is None else images
    checked = _Checked(model, rows, pad_token_id, in_16_bit, images, more_inputs)
    checked.check_numbers("student", checked.calm)
    checked.check_padding()
    found = checked.check(teacher)
    checked.warn_of_dropout()
    return found


def find_lost_context(
    student: Sequence[int], teacher: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str] | None:
    """Return the first text of the student's row that the teacher's lacks, and its substitute.

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
    batch = by_rows(batch)
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
