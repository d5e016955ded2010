"""Logits for the op tests: where the mass sits decides which mistakes show."""

from collections.abc import Callable

import torch
from torch import Tensor

SHAPES = [
    (3, 1),  # one column: loss and gradient are zero
    (5, 2),  # the smallest softmax
    (4, 33),  # one above a SIMD group of 32
    (0, 33),  # no rows: a batch without a label
    (1, 33),  # one row
    (3, 1023),  # one below a block of 1024
    (5, 4097),  # one above a block of 4096
]
REAL_SHAPE = (3, 151_936)  # a vocabulary in use (Qwen); flat logits have gradients of 1e-6 here

# first and last column of the usual SIMD widths and blocks, the middle, and the end
EDGES = (0, 31, 32, 1023, 1024, 4095, 4096)

Pair = tuple[Tensor, Tensor]


def randn(rows: int, vocab: int) -> Pair:
    """Student, teacher; independent, nearly flat."""
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
    """A student close to its teacher, late in training: the terms cancel."""
    student = 2 * torch.randn(rows, vocab)
    return student, student + 0.01 * torch.randn(rows, vocab)


def huge(rows: int, vocab: int) -> Pair:
    """Logits of +-1e4: exp overflows without the maximum, and one entry has all the mass."""
    return 2e4 * torch.rand(rows, vocab) - 1e4, 2e4 * torch.rand(rows, vocab) - 1e4


FAMILIES: dict[str, Callable[[int, int], Pair]] = {
    f.__name__: f for f in (randn, peaked, planted, near, huge)
}
