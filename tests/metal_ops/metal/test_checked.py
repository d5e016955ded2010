"""Every kernel on the checked simulator: results, races, bounds, what is written."""

import pytest
import torch

from metal_ops.backends.metal import launch
from metal_ops.spec import KINDS
from tests.metal_ops.metal.harness import DTYPES, Rows, clipped, divergence, far, hidden, one_side

# 1000 to 1003: every rest of four; 4097: one more than a group of 1024 reads in a step
WIDTHS = (1, 7, 1000, 1001, 1002, 1003, 4097, 32_000, 151_936)
ORDERS = ("forward", "reverse", "random")
name = lambda x: str(x).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_a_kind(kind, checked):
    """Each kind once; a quarter of the widths, orders and dtypes, which the kind rotates."""
    i = KINDS.index(kind)
    for j, width in enumerate((1, 7, 1000, 1001, 1002, 1003)):
        checked.scheduled(ORDERS[(i + j) % 3], seed=width)
        divergence(Rows.make(width, DTYPES[i % 3], strided=(i + j) % 2 == 0), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped(kind, checked):
    i = KINDS.index(kind)
    for j, width in enumerate((7, 1001, 1002)):
        checked.scheduled(ORDERS[(i + j) % 3], seed=width)
        clipped(Rows.make(width, DTYPES[(i + 1) % 3], strided=j < 2), kind)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kind, width, dtype, checked):
    for order in ORDERS:
        checked.scheduled(order, seed=width)
        for strided in (False, True):
            divergence(Rows.make(width, dtype, strided), kind)
            if width > 1:
                clipped(Rows.make(width, dtype, strided), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("order", ORDERS)
def test_one_side(order, dtype, checked):
    checked.scheduled(order)
    for width, num_kept in ((1, 1), (7, 3), (1001, 0), (1002, 100), (1003, 1000), (1003, 1003)):
        one_side(Rows.make(width, dtype, strided=width != 1002), num_kept)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_side_of_every_width(width, dtype, checked):
    for order in ORDERS:
        checked.scheduled(order, seed=width)
        for num_kept in (1, min(width, 100)):
            one_side(Rows.make(width, dtype, strided=num_kept == 1), num_kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden(kind, dtype, checked):
    for i, width in enumerate((1, 7, 1000, 1001, 1002, 1003, 4097)):
        checked.scheduled(ORDERS[i % 3], seed=width)
        hidden(Rows.make(width, dtype, strided=i % 2 == 0), kind)


@pytest.mark.parametrize("group", [32, 64, 96, 448, 992, 1024])
def test_group_sizes(group, monkeypatch, checked):
    """A pipeline may allow fewer threads than a row could use; a row may need fewer still."""
    monkeypatch.setattr(launch, "group_size", lambda *_: group)
    checked.scheduled("random", seed=group)
    for width in (100, 1001, 4099):
        rows = Rows.make(width, torch.float32, strided=True)
        divergence(rows, "jsd")
        one_side(rows, 10)
        hidden(rows, "cosine")


def test_rows_far_apart(fast):
    far()
