"""Small measurements of a teacher during training, taken at logs, for the watchdog."""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill.data.sides import Side
from hf_distill.models.pieces import lies_in_pieces
from hf_distill.models.probe_rows import rows_of
from hf_distill.teachers import ModelTeacher, SelfTeacher, Teacher
from metal_ops import DivergenceSpec, divergence

PROBE_TOKENS = 16  # of a row
PROBE_ROWS = 8
LEAST_GAP = 1e-4  # nats between teacher and student, of which a movement is a share
SAMPLES = 256  # entries of a tensor


def _first_row(side: Side) -> Side:
    """Return the first row with a scored token, and its first scored tokens."""
    row = int(side.predicts.any(1).int().argmax())
    chosen = torch.zeros_like(side.predicts)
    chosen[row] = side.predicts[row] & (side.predicts[row].cumsum(0) <= PROBE_TOKENS)
    one = slice(row, row + 1)
    inputs = rows_of(side.inputs, one)
    if inputs is None:
        return Side(side.inputs, chosen)  # images, say, which need not be one a row
    return Side(inputs, chosen[one])


def some_tokens(side: Side) -> Side:
    """Return the first PROBE_ROWS rows, of each PROBE_TOKENS scored tokens, evenly spread."""
    num_scored, number = side.predicts.sum(1, keepdim=True), side.predicts.cumsum(1) - 1
    at = torch.arange(PROBE_TOKENS, device=number.device)
    wanted = torch.where(num_scored > PROBE_TOKENS, at * num_scored // PROBE_TOKENS, at)
    chosen = side.predicts & (number[:, :, None] == wanted[:, None]).any(-1)
    first = slice(0, PROBE_ROWS)
    inputs = rows_of(side.inputs, first)
    if inputs is None:
        chosen[PROBE_ROWS:] = False
        return Side(side.inputs, chosen)
    return Side(inputs, chosen[first])


class DriftProbe:
    """Compares what a frozen teacher says about a row of the first batch with what it said then.

    It sees every way in which a teacher can follow the student: adapters that stay on, weights that
    are shared, a copy that is trained. It is read at the first, second, fourth, eighth ... log,
    because it takes a forward of one row.

    Args:
        teacher: one that must say the same about the same tokens for the whole run.
        accelerator: of the trainer.
        sharded: whether processes must run the model together.
    """

    def __init__(self, teacher: Teacher, accelerator: Accelerator, sharded: bool) -> None:
        self.teacher, self.accelerator, self.sharded = teacher, accelerator, sharded
        self._kept: tuple[Side, Tensor] | None = None
        self._reads = 0

    def _said(self, student: nn.Module, side: Side) -> Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher.signal(student, side).dense().float().cpu()

    def keep(self, student: nn.Module, student_side: Side, side: Side) -> bool:
        """Take the row from the first batch that is given: the start, or where a run resumes.

        Returns:
            Whether it has one.
        """
        if self._kept is None and _have_tokens(side, self):
            row = _first_row(side)._replace(as_logits=self.sharded)
            self._kept = row, self._said(student, row)
        return self._kept is not None

    def read(self, student: nn.Module) -> dict[str, float]:
        """Return `teacher_drift`: a token's largest JSD, in nats; every process must call it."""
        self._reads += 1
        if self._reads & (self._reads - 1):
            return {}
        drift = torch.zeros(1, device=self.accelerator.device)
        if self._kept is not None:
            side, before = self._kept
            said = self._said(student, side)
            drift += divergence(said, before, DivergenceSpec("jsd")).max().to(drift.device)
        worst: Any = self.accelerator.gather(drift)
        return {"teacher_drift": float(worst.max())}


class LiveProbe:
    """Measures how far a live teacher has moved on some rows of the first batch, with their hints.

    The measure is its mean JSD from what it said at the start, as a share of the JSD between the
    teacher and the student there: what the student has to learn. A teacher that moves as far as the
    student does follows it instead of teaching it, long before the completions show it. It is read
    at every log, which takes a forward of PROBE_ROWS rows.

    Args:
        teacher: of kind "live".
        accelerator: of the trainer.
        sharded: whether processes must run the model together.
    """

    def __init__(self, teacher: SelfTeacher, accelerator: Accelerator, sharded: bool) -> None:
        self.teacher, self.accelerator, self.sharded = teacher, accelerator, sharded
        self._kept: tuple[Side, Tensor, float] | None = None

    def _said(self, student: nn.Module, side: Side) -> Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher.signal(student, side).dense().float().cpu()

    def keep(self, student: nn.Module, student_side: Side, side: Side) -> bool:
        """Take the rows from the first batch that is given: the start, or where a run resumes.

        Returns:
            Whether it has some.
        """
        if self._kept is not None or not _have_tokens(side, self):
            return self._kept is not None
        rows, own = (some_tokens(x)._replace(as_logits=self.sharded) for x in (side, student_side))
        before, unaided = self._said(student, rows), self._said(student, own)
        self._kept = rows, before, max(_mean_jsd(unaided, before), LEAST_GAP)
        return True

    def read(self, student: nn.Module) -> dict[str, float]:
        """Return `teacher_moved`, over all processes; every process must call it."""
        moved = torch.full((1,), torch.nan, device=self.accelerator.device)
        if self._kept is not None:
            rows, before, gap = self._kept
            moved[0] = _mean_jsd(self._said(student, rows), before) / gap
        mean = float(cast(Tensor, self.accelerator.gather(moved)).nanmean())
        return {} if math.isnan(mean) else {"teacher_moved": mean}


def _mean_jsd(one: Tensor, other: Tensor) -> float:
    return float(divergence(one, other, DivergenceSpec("jsd")).mean()) if len(one) else 0.0


def _sample(tensors: Iterable[Tensor]) -> Tensor:
    """Return about SAMPLES entries of each tensor, evenly spread, as one float32 CPU vector."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        parts.append(flat[:: max(1, len(flat) // SAMPLES)].float())
    return torch.cat(parts).cpu()


class AverageProbe:
    """Measures where an EMA teacher is between its start and the student, by sampled weights.

    Args:
        teacher: of kind "ema", prepared.
        accelerator: of the trainer.
        sharded: whether each process holds pieces of the parameters.
    """

    def __init__(self, teacher: SelfTeacher, accelerator: Accelerator, sharded: bool) -> None:
        self.teacher, self.accelerator, self.sharded = teacher, accelerator, sharded
        self._start: tuple[Tensor, Tensor] | None = None

    def _samples(self, student: nn.Module) -> tuple[Tensor, Tensor]:
        average, weights = zip(*self.teacher.averaged(student), strict=True)
        return _sample(weights), _sample(average)

    def _size(self, difference: Tensor) -> float:
        """Return the norm of a difference, over all processes if each holds pieces."""
        square = difference.square().sum()
        if self.sharded:
            square = cast(Tensor, self.accelerator.reduce(square.to(self.accelerator.device)))
        return float(square.sqrt())

    def keep(self, student: nn.Module, student_side: Side, side: Side) -> bool:
        """Take both as they are at the first call: the start, or where a run resumes."""
        if self._start is None:
            self._start = self._samples(student)
        return True

    def read(self, student: nn.Module) -> dict[str, float]:
        """Return `ema_moved` and `ema_distance` of the average, over the student's way so far."""
        if self._start is None:
            return {}
        weights, average = self._samples(student)
        way = self._size(weights - self._start[0])
        if way == 0.0:
            return {}
        moved, distance = self._size(average - self._start[1]), self._size(average - weights)
        return {"ema_moved": moved / way, "ema_distance": distance / way}


def _have_tokens(side: Side, probe: DriftProbe | LiveProbe) -> bool:
    """Return whether there are tokens to ask about; on all processes if they run together."""
    found = bool(side.predicts.any())
    if not probe.sharded:
        return found
    each = torch.tensor([found], device=probe.accelerator.device)
    return bool(cast(Tensor, probe.accelerator.gather(each)).all())


Probe = DriftProbe | AverageProbe | LiveProbe


def make_probe(teacher: Teacher, accelerator: Accelerator, sharded: bool) -> Probe | None:
    """Make the probe for a teacher; None for one that may change in ways that are not known.

    Args:
        teacher: of the run.
        accelerator: of the trainer.
        sharded: whether parameters of the student lie in pieces on several processes.
    """
    own = isinstance(teacher, SelfTeacher)
    if own and teacher.kind == "ema":
        return AverageProbe(teacher, accelerator, sharded)
    if own and teacher.kind == "live":
        return LiveProbe(teacher, accelerator, sharded)
    frozen = isinstance(teacher, ModelTeacher) or (
        isinstance(teacher, SelfTeacher) and teacher.kind == "base"
    )
    together = own or (isinstance(teacher, ModelTeacher) and lies_in_pieces(teacher.model))
    return DriftProbe(teacher, accelerator, sharded and together) if frozen else None
