"""What is stored of a teacher as padded columns, so that a data loader can carry it in a batch.

That is a sparse teacher, or hidden states [N, H].

Shapes: B rows, C scored tokens of the longest, N of all rows, H hidden.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from metal_ops import SparseTeacher

COUNTS = "counts"  # [B] scored tokens of each row
HIDDEN = "hidden"


def named_columns(teacher: SparseTeacher | Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor [N, ...] of a teacher, by name."""
    if isinstance(teacher, Tensor):
        yield HIDDEN, teacher
        return
    yield from (("ids", teacher.ids), ("log_probs", teacher.log_probs))
    yield "log_tail", teacher.log_tail
    if teacher.samples is not None:
        yield from ((f"samples.{k}", x) for k, x in teacher.samples._asdict().items())
    if teacher.powers is not None:
        yield "powers.log_sums", teacher.powers.log_sums
        yield "powers.num_tail", teacher.powers.num_tail


def _replaced(like: SparseTeacher, columns: Mapping[str, Tensor]) -> SparseTeacher:
    """Return a teacher of the same kind with other tensors."""
    samples, powers = like.samples, like.powers
    if samples is not None:
        names = samples._fields
        samples = samples._replace(**{k: columns[f"samples.{k}"] for k in names})
    if powers is not None:
        sums, count = columns["powers.log_sums"], columns["powers.num_tail"]
        powers = powers._replace(log_sums=sums, num_tail=count)
    own = {name: columns[name] for name in ("ids", "log_probs", "log_tail")}
    return like._replace(**own, samples=samples, powers=powers)


def select_tokens(teacher: SparseTeacher, at: Tensor) -> SparseTeacher:
    """Select some of the teacher's tokens, [n] int64, in that order."""
    return _replaced(teacher, {name: x[at] for name, x in named_columns(teacher)})


def move_to_device(teacher: SparseTeacher, device: torch.device) -> SparseTeacher:
    """Move the teacher's tensors to a device."""
    return _replaced(teacher, {name: x.to(device) for name, x in named_columns(teacher)})


def pad_tokens(teacher: SparseTeacher | Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Return its columns, each row's tokens in a row of their own: [B, C, ...], and `counts`."""
    counts = torch.tensor(lengths)
    inside = torch.arange(int(counts.max()) if lengths else 0) < counts[:, None]
    at = torch.where(inside, inside.reshape(-1).cumsum(0).view(inside.shape) - 1, 0)
    found = {COUNTS: counts}
    for name, x in named_columns(teacher):
        found[name] = x[at] if len(x) else x.new_zeros(*at.shape, *x.shape[1:])
    return found


def unpad_tokens(
    columns: Mapping[str, Tensor], like: SparseTeacher | Tensor
) -> SparseTeacher | Tensor:
    """Return the teacher of which `pad_tokens` made columns; `like` says of which kind it is."""
    width = next(x.shape[1] for name, x in columns.items() if name != COUNTS)
    counts = columns[COUNTS]
    inside = torch.arange(width, device=counts.device) < counts[:, None]
    rows, places = inside.nonzero().unbind(1)  # asked once, not for each column
    rest = {name: x[rows, places] for name, x in columns.items() if name != COUNTS}
    return rest[HIDDEN] if isinstance(like, Tensor) else _replaced(like, rest)
