"""Several teachers, each for some of the rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill.data.sides import TEACHER_ROUTE, Side, places, unpacked
from hf_distill.models.pieces import will_lie_in_pieces
from hf_distill.models.signals import Signal, join, without_padding
from hf_distill.run import Run
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.model import ModelTeacher, as_teacher
from hf_distill.teachers.self_teacher import SelfTeacher

SEPARATOR = ":"  # between a teacher's name and its own key in a checkpoint


class RoutedTeacher(Teacher):
    """Holds several teachers; a column of the data says which one each row asks.

    The batch carries `teacher_route` [B] int64, the number of each row's teacher in the order of
    `teachers`. A trainer makes its data collator add it.

    Args:
        teachers: the teachers by name. Each one is a model, a name for `from_pretrained`, or a
            teacher.
        column: the column of the data that contains one of these names.

    Attributes:
        vocab: entries of the vocabulary that are read of each teacher, the first; None is all. The
            trainer sets it where vocabularies are padded differently.

    Raises:
        ValueError: there is no teacher, or a name is not a text without ":".
    """

    def __init__(self, teachers: Mapping[str, Teacher | nn.Module | str], column: str) -> None:
        if not teachers:
            raise ValueError("a RoutedTeacher needs at least one teacher, got none")
        for name in teachers:
            if not isinstance(name, str) or SEPARATOR in name:
                raise ValueError(
                    f"a teacher's name must be a text without {SEPARATOR!r}, got {name!r}"
                )
        self.column = column
        self.vocab: int | None = None
        self.names = list(teachers)
        made = [as_teacher(teacher) for teacher in teachers.values()]
        # a teacher with two names is asked, updated and saved once, by its first name
        first = [next(i for i, other in enumerate(made) if other is mine) for mine in made]
        self._first = torch.tensor(first)
        self.teachers = {self.names[i]: made[i] for i in sorted(set(first))}

    def route(self, row: Mapping[str, Any]) -> int:
        """Return the number of the teacher that a row of the data asks.

        Raises:
            ValueError: the row lacks the column, or the column names no teacher.
        """
        known = ", ".join(map(repr, self.names))
        if self.column not in row:
            raise ValueError(
                f"each row needs a column {self.column!r} with its teacher's name ({known}), got "
                f"the columns {', '.join(map(repr, row)) or 'none'}"
            )
        name = row[self.column]
        if name not in self.names:
            raise ValueError(f"column {self.column!r} must name a teacher ({known}), got {name!r}")
        return self.names.index(name)

    @property
    def dense(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return whether all teachers are dense."""
        return all(teacher.dense for teacher in self.teachers.values())

    def each(self) -> Sequence[Teacher]:
        """Return the teachers that rows ask."""
        return list(self.teachers.values())

    def check(self, run: Run) -> None:
        """Check each teacher's run."""
        for teacher in self.each():
            teacher.check(run)

    def inputs(self) -> Sequence[str]:
        """Return the names of a batch's inputs that some teacher reads."""
        return [name for teacher in self.each() for name in teacher.inputs()]

    def collator(self, collator: Any) -> Any:
        """Wrap the collator, so that each row's teacher is in the batch."""
        if isinstance(collator, RoutedCollator):
            return collator
        return RoutedCollator(collator, self)

    def keep_vocab(self, size: int | None) -> None:
        """Read the first `size` entries of each teacher's vocabulary, or all."""
        self.vocab = size

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Prepare each teacher.

        Raises:
            ValueError: as the teachers do; or the student is sharded and is its own teacher for
                some rows, which the processes would not ask for at the same time.
        """
        own = [name for name, t in self.teachers.items() if isinstance(t, SelfTeacher)]
        if own and will_lie_in_pieces(accelerator, student):
            raise ValueError(
                "a sharded student must be read by all processes at once, a routed teacher is "
                f"asked for some rows only; got {accelerator.distributed_type.value} and the "
                f"self-teacher {own[0]!r}"
            )
        for teacher in self.teachers.values():
            if isinstance(teacher, ModelTeacher):
                teacher.is_asked_together = False
            teacher.prepare(accelerator, student, refusal)

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return each teacher's view of its own rows, the scored tokens in the batch's order.

        Raises:
            ValueError: the batch has no route, or one that is out of range.
        """
        side = unpacked(side)  # rows of one sequence may ask several
        route = self._checked_route(side)
        row_of_token = places(side.predicts)[0]
        signals, tokens = [], []
        for name, teacher in self.teachers.items():
            mine = route == self.names.index(name)
            token = mine[row_of_token].nonzero()[:, 0]
            if len(token):
                signals.append(self._cut(teacher.signal(student, _rows(side, mine))))
                tokens.append(token)
        if not signals:  # no token is scored: any teacher's empty answer
            return next(iter(self.teachers.values())).signal(student, side._replace(route=None))
        return join(signals, torch.cat(tokens).argsort())

    def _cut(self, signal: Signal) -> Signal:
        return signal if self.vocab is None else without_padding(signal, self.vocab)

    def _checked_route(self, side: Side) -> Tensor:
        rows = len(side.predicts)
        if side.route is None:
            raise ValueError(
                f"a RoutedTeacher needs {TEACHER_ROUTE!r} in the batch: outside of a trainer, wrap "
                "the data collator, teacher.collator(collator)"
            )
        if side.route.shape != (rows,):
            raise ValueError(
                f"{TEACHER_ROUTE} must be [{rows}], a number for each row, got "
                f"{list(side.route.shape)}"
            )
        low, high = int(side.route.min()), int(side.route.max())
        if low < 0 or high >= len(self.names):
            raise ValueError(
                f"{TEACHER_ROUTE} must be in [0, {len(self.names)}), got {low if low < 0 else high}"
            )
        return self._first.to(side.route.device)[side.route]

    def update(self, student: nn.Module) -> None:
        """Tell each teacher."""
        for teacher in self.teachers.values():
            teacher.update(student)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teachers' states, with each key behind its teacher's name."""
        return {
            f"{name}{SEPARATOR}{key}": value
            for name, teacher in self.teachers.items()
            for key, value in teacher.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore each teacher.

        Raises:
            ValueError: a key belongs to no teacher, or as the teachers do.
        """
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.teachers}
        for key, value in state.items():
            name, _, own = key.partition(SEPARATOR)
            if name not in parts:
                raise ValueError(
                    f"the checkpoint's teachers must be {', '.join(map(repr, parts))}, got the "
                    f"key {key!r}"
                )
            parts[name][own] = value
        for name, teacher in self.teachers.items():
            teacher.load_state_dict(parts[name])


def _rows(side: Side, mask: Tensor) -> Side:
    """Return some rows of a batch."""
    inputs = {
        key: value[mask] if isinstance(value, Tensor) and len(value) == len(mask) else value
        for key, value in side.inputs.items()
    }
    return Side(inputs, side.predicts[mask])


class RoutedCollator:
    """Adds each row's teacher to a collator's batch.

    Args:
        collator: from rows to a batch, one row of the batch for each.
        teacher: says which teacher a row asks.
        keep_column: whether the collator sees the column too; those that turn every column into a
            tensor fail on texts.

    Attributes:
        columns: what it reads of a row, and what the collator inside says that it reads.
    """

    def __init__(
        self, collator: Callable[..., Any], teacher: RoutedTeacher, keep_column: bool = False
    ) -> None:
        self.collator = collator
        self.teacher = teacher
        self.keep_column = keep_column
        self.columns = (teacher.column, *getattr(collator, "columns", ()))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return the collator's batch with `teacher_route` [B] int64."""
        route = torch.tensor([self.teacher.route(row) for row in rows], dtype=torch.int64)
        if not self.keep_column:
            rows = [{k: v for k, v in row.items() if k != self.teacher.column} for row in rows]
        batch = self.collator(rows)
        batch[TEACHER_ROUTE] = route
        return batch
