"""Which tokens of a teacher with another tokenizer belong to which of the student's.

Shapes: N scored tokens of the student, M tokens of the teacher, S spans, K ids that both have.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class CommonIds:
    """Holds the ids that stand for the same on both sides.

    student, teacher: [K] int64, the ids in one order. of_student: [V] int64, the teacher's id of
    each of the student's, -1 where there is none. all: whether both vocabularies are one, so that
    the others need not be read.
    """

    student: Tensor
    teacher: Tensor
    of_student: Tensor
    all: bool = False

    @classmethod
    def of(cls, pairs: dict[int, int], student_size: int, teacher_size: int) -> "CommonIds":
        """Make them from ids by the student's, of logits of so many entries."""
        inside = {a: b for a, b in pairs.items() if a < student_size and b < teacher_size}
        ids = sorted(inside)
        one, other = (torch.tensor(x, dtype=torch.long) for x in (ids, [inside[i] for i in ids]))
        table = torch.full((student_size,), -1).index_put_((one,), other)
        is_all = student_size == teacher_size and inside == {i: i for i in range(student_size)}
        return cls(one, other, table, is_all)

    def to(self, device: torch.device) -> "CommonIds":
        """Return them on a device."""
        one, other, table = (x.to(device) for x in (self.student, self.teacher, self.of_student))
        return CommonIds(one, other, table, self.all)


@dataclass(frozen=True)
class Spans:
    """Holds spans of tokens that write the same bytes on both sides.

    student: [N] int64, the number of each of the student's scored tokens, -1 for none. teacher: [M]
    int64 that of each of the teacher's, whose ids are targets [M]. size: S, more than any number.
    common: the ids that both have.

    Set by the loss, of each of the student's tokens: rows [N] int64, the row of the teacher's
    signal that is compared with it, any where there is none; single [N] bool, whether it is one
    token on both sides that both vocabularies have; values [N], its share of its span's loss, where
    it is not; pulls [N], its log-probability's weight in the gradient then; gaps [N], its span's
    |A|; said [N], the teacher's log-probability of its span. They are 0 where there is nothing.
    """

    student: Tensor
    teacher: Tensor
    targets: Tensor
    size: int
    common: CommonIds
    rows: Tensor
    single: Tensor
    values: Tensor
    pulls: Tensor
    gaps: Tensor
    said: Tensor

    def at(self, at: slice) -> "Spans":
        """Return what is known of some of the student's tokens."""
        names = ("student", "rows", "single", "values", "pulls", "gaps", "said")
        return replace(self, **{name: getattr(self, name)[at] for name in names})

    @classmethod
    def of(
        cls, student: Tensor, teacher: Tensor, targets: Tensor, size: int, common: CommonIds
    ) -> "Spans":
        """Make spans that no loss has measured."""
        nothing = torch.zeros(len(student), device=student.device)
        no = torch.zeros_like(student, dtype=torch.bool)
        rows = torch.zeros_like(student)
        measured = rows, no, nothing, nothing, nothing, nothing
        return cls(student, teacher, targets, size, common, *measured)
