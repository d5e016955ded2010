"""Draws logits for the op tests: where the mass sits decides which mistakes show."""

from collections.abc import Callable

import torch
from torch import Tensor

from metal_ops import DivergenceSpec, SparseTeacher
from metal_ops.spec import MISSING

SHAPES = [
    (3, 1),  # one column: loss and gradient are zero
    (5, 2),  # the smallest softmax
    (4, 33),  # one above a SIMD group of 32
    (0, 33),  # no rows: a batch without a label
    (1, 33),  # one row
    (3, 1023),  # one below a block of 1024
    (2, 1024),  # a block
    (2, 2053),  # two blocks and a rest of five
    (3, 4097),  # one above a block of 4096
]
REAL_SHAPE = (2, 151_936)  # a vocabulary in use (Qwen); flat logits have gradients of 1e-6 here

REVERSE = ("reverse_kl", "skew_reverse_kl", "mixed_kl")  # refused if the rest is dropped

# first and last column of the usual SIMD widths and blocks, the middle, and the end
EDGES = (0, 31, 32, 1023, 1024, 4095, 4096)

Pair = tuple[Tensor, Tensor]


def randn(rows: int, vocab: int) -> Pair:
    """Draw student and teacher; they are independent and nearly flat."""
    return torch.randn(rows, vocab), torch.randn(rows, vocab)


def peaked(rows: int, vocab: int) -> Pair:
    """A few entries hold the mass, as in a trained model."""
    return 4 * torch.randn(rows, vocab), 4 * torch.randn(rows, vocab)


def planted(rows: int, vocab: int) -> Pair:
    """The mass sits in the columns where blocks begin and end."""
    student, teacher = randn(rows, vocab)
    columns = [c % vocab for c in (*EDGES, vocab // 2, vocab - 2, vocab - 1)]
    for row in range(rows):
        student[row, columns[(3 * row) % len(columns)]] += 12
        student[row, columns[-1 - row % len(columns)]] += 11
        teacher[row, columns[(3 * row + 1) % len(columns)]] += 12
        teacher[row, columns[-1 - row % len(columns)]] += 10
    return student, teacher


def near(rows: int, vocab: int) -> Pair:
    """Draw a student close to its teacher, late in training: the terms cancel."""
    student = 2 * torch.randn(rows, vocab)
    return student, student + 0.01 * torch.randn(rows, vocab)


def huge(rows: int, vocab: int) -> Pair:
    """Draw logits of +-1e4: exp overflows without the maximum, and one entry has all the mass."""
    return 2e4 * torch.rand(rows, vocab) - 1e4, 2e4 * torch.rand(rows, vocab) - 1e4


# exp without the maximum loses nothing, all of a side, or the row, from one row to the next
STUDENT_SHIFTS = (-60.0, 30.0, 100.0, 0.0, -30.0, 45.0)
TEACHER_SHIFTS = (0.0, 45.0, -30.0, 100.0, 30.0, -60.0)


def _shift(pair: Pair, shifts: tuple[tuple[float, ...], tuple[float, ...]]) -> Pair:
    rows, vocab = pair[0].shape
    student, teacher = (
        x + torch.tensor([row[(i + vocab) % 6] for i in range(rows)])[:, None]
        for x, row in zip(pair, shifts, strict=True)
    )
    return student, teacher


def shifted(rows: int, vocab: int) -> Pair:
    """Add a constant to every row, another on each side: softmax removes it, exp alone does not."""
    return _shift(peaked(rows, vocab), (STUDENT_SHIFTS, TEACHER_SHIFTS))


def near_shifted(rows: int, vocab: int) -> Pair:
    """Draw a student close to its teacher, both far from zero, by equal or different constants."""
    far = tuple(-x if i % 2 else x for i, x in enumerate(STUDENT_SHIFTS))
    return _shift(near(rows, vocab), (STUDENT_SHIFTS, far))


FAMILIES: dict[str, Callable[[int, int], Pair]] = {
    f.__name__: f for f in (randn, peaked, planted, near, huge, shifted, near_shifted)
}


def lengths(rows: int, hidden: int) -> Pair:
    """Draw hidden states of any length: none at all, below 1e-8, far from the other side's."""
    student, teacher = randn(rows, hidden)
    sizes = torch.tensor([1.0, 0.0, 1e3, 1e-3, 1e-12, 30.0, 1e-3])
    turn = torch.arange(rows) + hidden
    student *= sizes[turn % 7, None]
    return student, teacher * sizes[(turn * turn + 2) % 7, None]


def along(rows: int, hidden: int) -> Pair:
    """Draw hidden states in nearly the same or opposite directions: the cosine cancels."""
    student, noise = randn(rows, hidden)
    factors = torch.tensor([1.0, -1.0, 1.001, 3.0, 2.0, 0.01])
    sizes = torch.tensor([1e-4, 1e-2, 0.0, 1e-5, 0.0])
    turn = torch.arange(rows) + hidden
    return student, student * factors[turn % 6, None] + sizes[turn % 5, None] * noise


HIDDEN_FAMILIES: dict[str, Callable[[int, int], Pair]] = {
    f.__name__: f for f in (randn, peaked, near, lengths, along)
}


def missing_rules(kind: str, beta: float = 0.5) -> tuple[str, ...]:
    """List what may become of the entries outside a kind's support."""
    reverse = DivergenceSpec(kind, beta).resolved().kind in REVERSE
    return tuple(m for m in MISSING if not (reverse and m == "zero"))


def untied(x: Tensor, top_k: int) -> Tensor:
    """Return x with the top_k largest entries of each row well above the others."""
    k = min(top_k, x.shape[-1])
    gap = 2.0**-5 * x.abs().nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    return x.scatter_add(-1, x.topk(k, dim=-1).indices, gap.expand(len(x), k).contiguous())


def sparse(teacher: Tensor, top_k: int, temperature: float, dtype: torch.dtype) -> SparseTeacher:
    """Take the top_k entries of teacher logits and the rest's mass, with a column of padding."""
    log_p = (teacher.double() / temperature).log_softmax(-1)
    log_probs, ids = log_p.topk(min(top_k, teacher.shape[-1]), dim=-1)
    log_tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    pad = (0, 1)
    return SparseTeacher(
        torch.nn.functional.pad(ids, pad, value=-1),
        torch.nn.functional.pad(log_probs, pad).to(dtype),
        log_tail.to(dtype),
        temperature,
    )
