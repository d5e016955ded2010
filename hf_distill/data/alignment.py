"""The proof that student and teacher score the same tokens.

Shapes: B rows, T positions, C completion tokens of the longest row, N scored tokens of the batch.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill.data import sides
from hf_distill.data.packed_batches import by_rows
from hf_distill.data.sides import (
    INDEX_MAPS,
    NO_TOKEN,
    predicts_from_index,
    predicts_from_labels,
    targets,
)

SHOWN = 3  # ids in an error


class AlignmentError(ValueError):
    """Student and teacher rows do not hold the same completion tokens where their maps say."""


class _Rows(NamedTuple):
    """Holds one side of a batch: ids, attention mask and which are scored, [B, T] each."""

    ids: Tensor
    real: Tensor
    scored: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, predicts: Tensor) -> "_Rows":
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return cls(ids, real, _shifted(predicts))

    def tokens(self, width: int) -> Tensor:
        """Return [B, width] the scored ids of each row in order, then NO_TOKEN."""
        # others land in a column of their own that is cut off
        at = torch.where(self.scored, self.scored.cumsum(1) - 1, width).clamp_max(width)
        table = self.ids.new_full((len(self.ids), width + 1), NO_TOKEN)
        return table.scatter_(1, at, self.ids)[:, :width]

    def on_padding(self) -> Tensor:
        """Return [B, T] scored positions that are padding, or that padding would predict."""
        return self.scored & ~(self.real & _shifted(self.real))

    def ends(self, end_ids: Sequence[int]) -> Tensor:
        """Mark a row's last position [B, T] if it is an unscored end token behind a scored one."""
        is_end = torch.zeros_like(self.real)
        for token in end_ids:  # no tensor of ids: copying it to the device would synchronise
            is_end |= self.ids == token
        is_last = self.real.clone()
        is_last[:, :-1] &= ~self.real[:, 1:]
        return is_end & is_last & ~self.scored & _shifted(self.scored)


def _shifted(flags: Tensor) -> Tensor:
    """Return [B, T] the flags of the position before; False at the first."""
    result = torch.zeros_like(flags)
    result[:, 1:] = flags[:, :-1]
    return result


def _outside(index: Tensor, num_positions: int) -> Tensor:
    return (index != NO_TOKEN) & ((index < 1) | (index >= num_positions))


# What each rule of `_broken` asks for
RULES = {
    "index": "completion_index must hold positions from 1 on and inside the row (nothing predicts "
    "the first token), or -1",
    "teacher_index": "teacher_completion_index must hold positions from 1 on and inside the row "
    "(nothing predicts the first token), or -1",
    "padding": "a scored token and the token before it must not be padding for the student",
    "teacher_padding": "a scored token and the token before it must not be padding for the teacher",
    "labels": "labels must be the input_ids at their positions, or -100",
    "map": "labels must stand at the positions that completion_index names, and nowhere else",
    "tokens": "student and teacher must score the same tokens",
    "pairs": "with tokens of its own for the teacher, both index maps must have one shape, ascend, "
    "and pair each row with a scored token at least once",
    "spans": "spans must be numbered from 0 in the order of the text beside both index maps, and "
    "each must have tokens on both sides",
    "end": "the end token behind the last scored token must be scored",
}

NEEDED = ("input_ids", "labels", "teacher_completion_index")


def _descends(index: Tensor) -> Tensor:
    """Return [B, C] bool: the positions that are not behind all those before them in their row."""
    before = torch.full_like(index, -1)
    before[:, 1:] = index.cummax(1).values[:, :-1]
    return (index >= 0) & (index <= before)


def _unpaired(index: Tensor, teacher_index: Tensor) -> Tensor:
    """Return [B, C] bool, True where `RULES["pairs"]` is broken, without synchronisation."""
    if index.shape != teacher_index.shape:
        return torch.ones_like(index, dtype=torch.bool)
    real, beside = index >= 0, teacher_index >= 0
    alone = real & ~beside.any(1, keepdim=True)
    return _descends(index) | _descends(teacher_index) | (beside & ~real) | alone


def _numbers(index: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return [B, C] numbers of spans, and where `RULES["spans"]` is broken on this side alone."""
    if spans is None or spans.shape != index.shape:
        return torch.full_like(index, NO_TOKEN), torch.ones_like(index, dtype=torch.bool)
    outside = (index < 0) & (spans >= 0) | (spans < NO_TOKEN) | (spans >= max(index.shape[1], 1))
    before = torch.full_like(spans, -1)
    before[:, 1:] = spans.cummax(1).values[:, :-1]
    return spans, outside | _descends(index) | ((spans >= 0) & (spans < before))


def _broken_spans(batch: Mapping[str, Any]) -> Tensor:
    """Return [B, C] bool, True where `RULES["spans"]` is broken, without synchronisation."""
    names = (sides.SPANS_OF_STUDENT, sides.SPANS)
    found = [_numbers(batch[x], batch.get(y)) for x, y in zip(INDEX_MAPS, names, strict=True)]
    width = max(spans.shape[1] for spans, _ in found) + 1
    tables = []
    for spans, _ in found:  # which numbers there are, [B, width]
        there = torch.zeros(len(spans), width + 1, dtype=torch.bool, device=spans.device)
        at = torch.where((spans < 0) | (spans >= width), width, spans)
        tables.append(there.scatter_(1, at, True)[:, :width])
    one, other = tables
    gap = torch.zeros_like(one)
    gap[:, 1:] = one[:, 1:] & ~one[:, :-1]
    alone = found[1][0].eq(NO_TOKEN) & batch[INDEX_MAPS[1]].ge(0)  # the teacher is asked in vain
    wrong = [(one != other) | gap, found[0][1], found[1][1], alone]
    return torch.cat(wrong, dim=1)


def _sides(batch: Mapping[str, Any]) -> tuple[_Rows, _Rows]:
    needed = (*NEEDED, *INDEX_MAPS[:1]) if sides.has_own_tokens(batch) else NEEDED
    if batch.get("teacher_position_ids") is None:  # packed rows have no padding
        needed = (*needed, "teacher_attention_mask")
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        raise AlignmentError(f"a batch with teacher_input_ids needs {missing[0]}, it has none")
    student = _Rows.of(
        batch["input_ids"], batch.get("attention_mask"), predicts_from_labels(batch["labels"])
    )
    ids = batch["teacher_input_ids"]
    predicts = predicts_from_index(batch["teacher_completion_index"], ids.shape[1])
    teacher = _Rows.of(ids, batch.get("teacher_attention_mask"), predicts)
    if len(teacher.ids) != len(student.ids):
        raise AlignmentError(
            f"student and teacher must have the same rows, got {len(student.ids)} for the student "
            f"and {len(teacher.ids)} for the teacher"
        )
    return student, teacher


def _views(batch: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the batch by each context of the teacher, with the words for it in an error."""
    words = (f"in contrast {i + 1}, " if i else "in the contrast, " for i in count())
    return [("", batch), *zip(words, sides.contrast_batches(batch), strict=False)]


def _broken(batch: Mapping[str, Any], end_ids: Sequence[int]) -> dict[str, Tensor]:
    """Return [B, positions] bool for each rule, True where it is broken; no synchronisation."""
    student, teacher = _sides(batch)
    ids, index = batch["input_ids"], batch.get("completion_index")
    width = max(ids.shape[1], teacher.ids.shape[1])
    broken = {
        "teacher_index": _outside(batch["teacher_completion_index"], teacher.ids.shape[1]),
        "padding": student.on_padding(),
        "teacher_padding": teacher.on_padding(),
        "labels": student.scored & (batch["labels"] != ids),
    }
    if index is not None:
        broken["index"] = _outside(index, ids.shape[1])
        broken["map"] = _shifted(predicts_from_index(index, ids.shape[1])) != student.scored
    if batch.get(sides.SPANS) is not None:
        broken["spans"] = _broken_spans(batch)
    elif sides.has_own_tokens(batch):
        broken["pairs"] = _unpaired(batch["completion_index"], batch["teacher_completion_index"])
    else:
        broken["tokens"] = student.tokens(width) != teacher.tokens(width)
    broken["end"] = student.ends(end_ids)
    return broken


def _detail(batch: Mapping[str, Any], rule: str, row: int, column: int) -> str:
    """Say where a rule is broken first."""
    if rule == "tokens":
        one, other = (int(side.tokens(column + 1)[row, column]) for side in _sides(batch))
        return (
            f"row {row}, completion token {column} is id {one} for the student, {other} for the "
            f"teacher ({NO_TOKEN}: no token)"
        )
    if rule in ("index", "teacher_index"):
        name = INDEX_MAPS[rule == "teacher_index"]
        ids = batch["teacher_input_ids" if rule == "teacher_index" else "input_ids"]
        at = int(batch[name][row, column])
        return f"row {row} names position {at} of {ids.shape[1]}"
    found = f"row {row}, position {column}"
    if rule == "spans":
        spans = [batch[x][row].tolist() for x in (sides.SPANS_OF_STUDENT, sides.SPANS)]
        return f"row {row} has {spans[0]} for the student and {spans[1]} for the teacher"
    if rule in ("labels", "end"):
        label, token = (int(batch[x][row, column]) for x in ("labels", "input_ids"))
        return f"{found} has label {label}, and id {token}"
    return found


def assert_aligned(batch: Mapping[str, Any], end_ids: Sequence[int] = ()) -> None:
    """Check a batch with teacher rows: both sides score the same tokens, and the right ones.

    Args:
        batch: input_ids, labels [B, T]; teacher_input_ids, teacher_attention_mask [B, T of the
            teacher]; teacher_completion_index [B, C]; and if it has them attention_mask [B, T] and
            completion_index [B, C]. Packed rows (`packed_batches`) are compared row by row.
        end_ids: ids that end a completion. One that is a row's last token, behind a scored token,
            must be scored as well.

    If the batch has rows of the teacher's second context, they are checked in the same way.

    Raises:
        AlignmentError: naming the rule (`RULES`), and the first row and token that break it.
    """
    for name, view in _views(by_rows(batch)):
        for rule, where in _broken(view, end_ids).items():
            if bool(where.any()):
                row, column = where.nonzero()[0].tolist()
                raise AlignmentError(f"{name}{RULES[rule]}: {_detail(view, rule, row, column)}")


def assert_completions(
    batch: Mapping[str, Tensor], completions: Sequence[Sequence[Sequence[int]]]
) -> None:
    """Check that each row scores replies as they were sampled: whole, with their end tokens.

    Args:
        batch: with labels [B, T].
        completions: the ids of the replies of each row; not all need be scored.

    Raises:
        AlignmentError: naming the first row that scores something else.
    """
    labels = by_rows(batch)["labels"]
    predicts = predicts_from_labels(labels)
    for i, replies in enumerate(completions):
        scored = targets(labels[i : i + 1], predicts[i : i + 1]).tolist()
        ends = {0}  # where, in what is scored, a reply may begin
        for reply in replies:
            ends |= {at + len(reply) for at in ends if scored[at : at + len(reply)] == list(reply)}
        if len(scored) not in ends:
            sampled = [list(reply[-SHOWN:]) for reply in replies]
            raise AlignmentError(
                f"row {i} must score replies as they were sampled, whole and with their end token; "
                f"it scores {len(scored)} tokens that end in {scored[-SHOWN:]}, the replies have "
                f"{[len(reply) for reply in replies]} and end in {sampled}"
            )


class AlignmentMeter:
    """Runs `assert_aligned` on every batch of a run, without waiting for the device.

    The first batch, and tensors on the CPU, are checked at once. After that broken rules are
    counted on the device until they are read.

    Args:
        end_ids: see `assert_aligned`.
    """

    def __init__(self, end_ids: Sequence[int] = ()) -> None:
        self._end_ids = end_ids
        self._counts: dict[str, Tensor] = {}
        self.started = False

    def add(self, batch: Mapping[str, Any]) -> None:
        """Check or count a batch; one without teacher rows passes.

        Raises:
            AlignmentError: see `assert_aligned`.
        """
        if batch.get("teacher_input_ids") is None:
            return
        if not self.started or not self._is_costly(batch):
            assert_aligned(batch, self._end_ids)
            self.started = True
            return
        for _, view in _views(by_rows(batch)):
            for rule, where in _broken(view, self._end_ids).items():
                self._counts[rule] = self._counts.get(rule, 0) + where.sum()

    @staticmethod
    def _is_costly(batch: Mapping[str, Any]) -> bool:
        """Return whether looking at values waits for a device."""
        return batch["teacher_input_ids"].device.type != "cpu"

    def read(self, accelerator: Accelerator) -> None:
        """Raise for what was counted since the last reading. Every process must call it.

        Raises:
            AlignmentError: naming every broken rule, and how often over all processes.
        """
        zero = torch.zeros((), dtype=torch.long, device=accelerator.device)
        sums = torch.stack([self._counts.get(rule, zero) for rule in RULES])
        self._counts = {}
        total: Any = accelerator.reduce(sums, reduction="sum")
        counted = zip(RULES.values(), total.tolist(), strict=True)
        found = [f"{rule} ({count} times)" for rule, count in counted if count]
        if found:
            raise AlignmentError("since the last log: " + "; ".join(found))
