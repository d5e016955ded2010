"""A check at the first step: a self-teacher says what the student says, and stays where it is.

"base" and "ema" begin at the student. Where adapters were trained before, or do not start at the
identity, "base" is the model without them, and a warning says how far the two are apart. Neither
may change with the student's weights.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.structure import unwrap
from hf_distill.monitoring.probes import some_tokens
from hf_distill.teachers import SelfTeacher, Teacher, has_adapters
from metal_ops import DivergenceSpec, divergence

logger = logging.getLogger(__name__)

# Largest JSD of a token, in nats. Rounding gives 1e-10 in float32 and some 1e-4 in bfloat16, whose
# logits are off by a hundredth; the faults give more than 1e-2.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6}
TOLERANCE_16_BIT = 5e-3


class SelfTeacherError(ValueError):
    """A self-teacher is not what it should be."""


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest JSD of a token, in nats, of logits [N, V]."""
    return float(divergence(one, other, DivergenceSpec("jsd")).max())


class Compared:
    """Holds the student on some rows, to compare its teacher with.

    Args:
        model: the student.
        side: its rows, with scored tokens.
        in_16_bit: whether the model computes in 16 bits though its logits may be float32.

    Attributes:
        calm: [N, V] its logits without dropout.
        tolerance: in nats, what rounding may leave between two sides that are the same.
    """

    error: type[SelfTeacherError] = SelfTeacherError
    rows = "on the same rows"  # in messages

    def __init__(self, model: nn.Module, side: Side, in_16_bit: bool) -> None:
        self.model, self.side = model, side
        self.bare = unwrap(model)
        self.reader = Reader("student", "read once, before training")
        self.device = next(self.bare.parameters()).device
        self.calm = self.logits(side)
        wide = all(p.dtype in TOLERANCE for p in self.bare.parameters()) and not in_16_bit
        self.tolerance = (
            TOLERANCE.get(self.calm.dtype, TOLERANCE_16_BIT) if wide else TOLERANCE_16_BIT
        )

    def logits(self, side: Side) -> Tensor:
        """Return [N, V] logits, without dropout."""
        with evaluating(self.model):
            return self.reader.logits(self.model, side)

    def check(self, teacher: SelfTeacher) -> float:
        """Return how far teacher and student are apart, in nats.

        Raises:
            SelfTeacherError: they differ without a reason, or the teacher follows the student, or
                one of them is NaN.
        """
        self.check_numbers("student", self.calm)
        said = teacher.signal(self.model, self.side).dense()
        self.check_numbers("teacher", said)
        found = apart(self.calm, said)
        if not found <= self.tolerance:
            self.explain(teacher, found)
        if teacher.kind in ("base", "ema"):
            self.check_frozen(teacher, said)
        return found

    def check_numbers(self, name: str, logits: Tensor) -> None:
        """Check that no logit is NaN or inf: such sides cannot be compared. -inf masks an entry."""
        bad = int((logits.isnan() | (logits == torch.inf)).any(-1).sum())
        if bad:
            raise self.error(
                f"numbers: the {name}'s logits are NaN or infinite at {bad} of {len(logits)} "
                "tokens, in eval mode and before a step: its weights, or their dtype, are at fault"
            )

    def check_frozen(self, teacher: Teacher, said: Tensor) -> None:
        """Check that a teacher that is not live says the same whatever the adapter's weights."""
        if not has_adapters(self.bare):
            return
        trainable = [p for p in self.bare.parameters() if p.requires_grad]
        kept = [p.detach().clone() for p in trainable]
        with kept_rng(self.device):
            try:
                for parameter in trainable:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                found = apart(teacher.signal(self.model, self.side).dense(), said)
            finally:
                for parameter, value in zip(trainable, kept, strict=True):
                    parameter.copy_(value)
        if not found <= self.tolerance:
            raise self.error(
                "adapter: the teacher must not change with the student's adapter; once its weights "
                f"are others the teacher is {found:.2g} nats from itself (limit "
                f"{self.tolerance:g}): the adapter is not switched off"
            )

    def explain(self, teacher: SelfTeacher, found: float) -> None:
        """Warn where an adapter is the reason, raise where none is known."""
        if has_adapters(self.bare) and teacher.kind in ("base", "lora_scale"):
            logger.warning(
                "adapter: %s the student and its teacher, the model with its adapters off or "
                "weaker, are %.2g nats apart: the adapter was trained before, or does not start "
                "at the identity, and is pulled back towards the base where hints say nothing",
                self.rows,
                found,
            )
            return
        raise self.error(
            f"teacher: {self.rows} it must say what the student says, they are {found:.2g} nats "
            f"apart (limit {self.tolerance:g}) in eval mode: its weights or its adapters are others"
        )


class SelfTeacherCheck:
    """Looks at the first batch of a training that has scored tokens.

    Args:
        teachers: of the run; those that are the student itself are checked.
        in_16_bit: whether the student computes in 16 bits.
    """

    def __init__(self, teachers: Sequence[Teacher], in_16_bit: bool) -> None:
        self.in_16_bit = in_16_bit
        self._left = [x for x in teachers if isinstance(x, SelfTeacher) and x.kind != "live"]

    @property
    def is_done(self) -> bool:
        """Return whether there is nothing left to check."""
        return not self._left

    def skip(self) -> None:
        """Check nothing: it was done, or the student is not at its start."""
        self._left = []

    @torch.no_grad()
    def look(self, model: nn.Module, side: Side) -> None:
        """Check the teachers once, on some tokens of the student's side of a batch.

        Raises:
            SelfTeacherError: see `Compared.check`.
        """
        if not self._left or not model.training:
            return
        few = some_tokens(side)
        if not bool(few.predicts.any()):
            return
        compared = Compared(unwrap(model), few, self.in_16_bit)
        left, self._left = self._left, []
        for teacher in left:
            found = compared.check(teacher)
            logger.info("teacher %s is %.1e nats from the student", teacher.kind, found)
