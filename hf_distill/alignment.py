"""Which positions of which row are scored: the same tokens on the student's and teacher's side.

Shapes: B rows, T positions, C completion tokens of the longest row, N scored tokens of the batch.
A token at position t is predicted by the model's output at position t - 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill import pairs

IGNORE_INDEX = -100
NO_TOKEN = -1  # padding of an index map
SHOWN = 3  # ids in an error

TEACHER_PREFIX = "teacher_"
TEACHER_ROUTE = "teacher_route"
TEACHER_STORED = "teacher_stored"
ANCHOR_PREFIX = "anchor_"
INDEX_MAPS = ("completion_index", "teacher_completion_index")
TOKEN_VALUES = ("token_weights", "behaviour_log_probs")  # [B, T] float, aligned with the labels


class AlignmentError(ValueError):
    """Student and teacher rows do not hold the same completion tokens where their maps say."""


class Side(NamedTuple):
    """One model's part of a batch.

    inputs: keyword arguments of the model's forward.
    predicts: [B, T] bool, True where the output predicts a scored token; N are True.
    route: [B] int64, the number of the teacher that each row asks, or None if there is one teacher.
    stored: what a data loader has read from a teacher's cache for these rows, or None.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor
    route: Tensor | None = None
    stored: Mapping[str, Tensor] | None = None


def predicts_from_labels(labels: Tensor) -> Tensor:
    """[B, T] bool: True at the positions whose next token has a label."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return predicts


def predicts_from_index(index: Tensor, num_positions: int) -> Tensor:
    """[B, num_positions] bool from an index map [B, C] of the positions of scored tokens."""
    # NO_TOKEN, and positions that no row has, land in a column of their own that is cut off
    at = torch.where((index < 1) | (index >= num_positions), num_positions, index - 1)
    predicts = torch.zeros(index.shape[0], num_positions + 1, dtype=torch.bool, device=index.device)
    return predicts.scatter_(1, at, True)[:, :num_positions]


def targets(labels: Tensor, predicts: Tensor) -> Tensor:
    """[N]: the scored tokens of labels [B, T], or of values aligned with them, row by row."""
    return labels[:, 1:][predicts[:, :-1]]


def student_side(batch: Mapping[str, Any]) -> Side:
    """The student's part: what is not labels, values of them, index maps or rows of others.

    Raises:
        ValueError: labels are missing or not [B, T].
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        got = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"a batch needs labels of shape [rows, positions], got {got}")
    others = ("labels", *INDEX_MAPS, *TOKEN_VALUES)
    inputs = {
        key: value
        for key, value in batch.items()
        if key not in others and not key.startswith((TEACHER_PREFIX, ANCHOR_PREFIX))
    }
    return Side(inputs, predicts_from_labels(labels))


def teacher_side(batch: Mapping[str, Any], student: Side) -> Side:
    """The teacher's part: its own rows if the batch has them, else the student's."""
    ids, route = batch.get("teacher_input_ids"), batch.get(TEACHER_ROUTE)
    stored = batch.get(TEACHER_STORED)
    if ids is None:
        own = route is None and stored is None
        return student if own else student._replace(route=route, stored=stored)
    inputs = {"input_ids": ids, "attention_mask": batch["teacher_attention_mask"]}
    predicts = predicts_from_index(batch["teacher_completion_index"], ids.shape[1])
    return Side(inputs, predicts, route, stored)


class _Rows(NamedTuple):
    """One side of a batch: ids, attention mask and which positions are scored, [B, T] each."""

    ids: Tensor
    real: Tensor
    scored: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, predicts: Tensor) -> "_Rows":
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return cls(ids, real, _shifted(predicts))

    def tokens(self, width: int) -> Tensor:
        """[B, width] the scored ids of each row in order, then NO_TOKEN."""
        # others land in a column of their own that is cut off
        at = torch.where(self.scored, self.scored.cumsum(1) - 1, width).clamp_max(width)
        table = self.ids.new_full((len(self.ids), width + 1), NO_TOKEN)
        return table.scatter_(1, at, self.ids)[:, :width]

    def on_padding(self) -> Tensor:
        """[B, T] scored positions that are padding, or that padding would predict."""
        return self.scored & ~(self.real & _shifted(self.real))

    def ends(self, end_ids: Sequence[int]) -> Tensor:
        """[B, T] the row's last position if it is an end token behind a scored one, not scored."""
        is_end = torch.zeros_like(self.real)
        for token in end_ids:  # no tensor of ids: copying it to the device would synchronise
            is_end |= self.ids == token
        is_last = self.real.clone()
        is_last[:, :-1] &= ~self.real[:, 1:]
        return is_end & is_last & ~self.scored & _shifted(self.scored)


def _shifted(flags: Tensor) -> Tensor:
    """[B, T] the flags of the position before; False at the first."""
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
    "pairs": pairs.RULE,
    "end": "the end token behind the last scored token must be scored",
}
NEEDED = ("input_ids", "labels", "teacher_attention_mask", "teacher_completion_index")


def _sides(batch: Mapping[str, Any]) -> tuple[_Rows, _Rows]:
    needed = (*NEEDED, *INDEX_MAPS[:1]) if pairs.has_own_tokens(batch) else NEEDED
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        raise AlignmentError(f"a batch with teacher_input_ids needs {missing[0]}, it has none")
    student = _Rows.of(
        batch["input_ids"], batch.get("attention_mask"), predicts_from_labels(batch["labels"])
    )
    ids = batch["teacher_input_ids"]
    predicts = predicts_from_index(batch["teacher_completion_index"], ids.shape[1])
    return student, _Rows.of(ids, batch["teacher_attention_mask"], predicts)


def _broken(batch: Mapping[str, Any], end_ids: Sequence[int]) -> dict[str, Tensor]:
    """[B, positions] bool for each rule, True where it is broken; no synchronisation."""
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
    if pairs.has_own_tokens(batch):
        broken["pairs"] = pairs.broken(batch["completion_index"], batch["teacher_completion_index"])
    else:
        broken["tokens"] = student.tokens(width) != teacher.tokens(width)
    broken["end"] = student.ends(end_ids)
    return broken


def _detail(batch: Mapping[str, Any], rule: str, row: int, column: int) -> str:
    """Where a rule is broken first, in words."""
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
    if rule in ("labels", "end"):
        label, token = (int(batch[x][row, column]) for x in ("labels", "input_ids"))
        return f"{found} has label {label}, and id {token}"
    return found


def assert_aligned(batch: Mapping[str, Any], end_ids: Sequence[int] = ()) -> None:
    """Check a batch with teacher rows: both sides score the same tokens, and the right ones.

    Args:
        batch: input_ids, labels [B, T]; teacher_input_ids, teacher_attention_mask [B, T of the
            teacher]; teacher_completion_index [B, C]; and if it has them attention_mask [B, T] and
            completion_index [B, C].
        end_ids: ids that end a completion. One that is a row's last token, behind a scored token,
            must be scored as well.

    Raises:
        AlignmentError: naming the rule (`RULES`), and the first row and token that break it.
    """
    for rule, where in _broken(batch, end_ids).items():
        if bool(where.any()):
            row, column = where.nonzero()[0].tolist()
            raise AlignmentError(f"{RULES[rule]}: {_detail(batch, rule, row, column)}")


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
    labels = batch["labels"]
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
    """`assert_aligned` for every batch of a run, without waiting for the device.

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
        """Check or count a batch; one without teacher rows is as it is.

        Raises:
            AlignmentError: see `assert_aligned`.
        """
        if batch.get("teacher_input_ids") is None:
            return
        if not self.started or not self._is_costly(batch):
            assert_aligned(batch, self._end_ids)
            self.started = True
            return
        for rule, where in _broken(batch, self._end_ids).items():
            self._counts[rule] = self._counts.get(rule, 0) + where.sum()

    @staticmethod
    def _is_costly(batch: Mapping[str, Any]) -> bool:
        """Whether looking at values waits for a device."""
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


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """[B, T] int64 from rows of different lengths."""
    width = max(map(len, rows), default=0)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [
        [*row, *gap] if side == "right" else [*gap, *row]
        for row, gap in zip(rows, fill, strict=True)
    ]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), width)


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a padded batch [B, T], without the positions where mask is 0."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


class Rendered(NamedTuple):
    """A row of token ids, and the positions of those that are scored, in order."""

    ids: Sequence[int]
    scored: Sequence[int]


def completed(context: Sequence[int], completion: Sequence[int]) -> Rendered:
    """A context with its completion behind it, which is scored."""
    start = len(context)
    return Rendered([*context, *completion], range(start, start + len(completion)))


def _rows(rows: Sequence[Rendered], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, completion_index), padded on the right."""
    mask = pad([[1] * len(row.ids) for row in rows], 0)
    index = pad([row.scored for row in rows], NO_TOKEN)
    return pad([row.ids for row in rows], pad_token_id), mask, index


def build_batch(
    prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """A training batch from token ids, with the same completions behind both contexts.

    Args:
        prompts: B lists of the student's context ids.
        teacher_prompts: B lists of the teacher's context ids.
        completions: B lists of ids, at least one token each. Every id is scored, so that an end
            token in it is learnt; padding is told from it by position, never by its id.
        pad_token_id: id of the padding on the right.

    Returns:
        input_ids, attention_mask, labels [B, T]; teacher_input_ids, teacher_attention_mask
        [B, T of the teacher]; completion_index, teacher_completion_index [B, C]: positions of the
        completion tokens in their row, padded with -1.
    """
    student, teacher = (
        [completed(a, b) for a, b in zip(contexts, completions, strict=True)]
        for contexts in (prompts, teacher_prompts)
    )
    return build_rows(student, teacher, pad_token_id)


def build_rows(
    student: Sequence[Rendered], teacher: Sequence[Rendered], pad_token_id: int
) -> dict[str, Tensor]:
    """`build_batch` from whole rows, whose scored tokens may lie anywhere but at the first place.

    Raises:
        AlignmentError: the scored tokens of a row are not the same ids on both sides.
    """
    ids, mask, index = _rows(student, pad_token_id)
    teacher_ids, teacher_mask, teacher_index = _rows(teacher, pad_token_id)
    scored = torch.zeros_like(mask, dtype=torch.bool)
    scored[:, 1:] = predicts_from_index(index, ids.shape[1])[:, :-1]
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(~scored, IGNORE_INDEX),
        "completion_index": index,
        "teacher_input_ids": teacher_ids,
        "teacher_attention_mask": teacher_mask,
        "teacher_completion_index": teacher_index,
    }
    assert_aligned(batch)
    return batch
