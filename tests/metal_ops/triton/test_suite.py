"""The tests of the ops with the Triton backend: a sample, and all of them when slow."""

import pytest
import torch

from metal_ops import DivergenceSpec, divergence_with_stats
from metal_ops.backends import triton
from metal_ops.selftest.inputs import FAMILIES
from tests.metal_ops.ops import parts
from tests.metal_ops.ops import test_columns as columns
from tests.metal_ops.ops import test_grid as grid
from tests.metal_ops.ops import test_hidden as hidden
from tests.metal_ops.ops import test_values as values
from tests.metal_ops.ops.again import again, run, use
from tests.metal_ops.triton import on_device

SAMPLE = 149


@pytest.mark.parametrize(("test", "arguments"), again(every=SAMPLE))
def test_again(test, arguments, monkeypatch):
    run(on_device.MODULE, test, arguments, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), again())
def test_again_all(test, arguments, monkeypatch):
    run(on_device.MODULE, test, arguments, monkeypatch)


HIDDEN = (hidden.test_value_and_gradient,)


@pytest.mark.parametrize(("test", "arguments"), again(every=5, tests=HIDDEN))
def test_hidden(test, arguments, monkeypatch):
    monkeypatch.setattr(triton, "MAX_BLOCK", 1024)
    run(on_device.MODULE, test, arguments, monkeypatch)


def narrow(monkeypatch: pytest.MonkeyPatch, units: int, block: int = 32) -> None:
    """Blocks of few columns, `units` multiprocessors."""
    monkeypatch.setattr(triton, "MAX_BLOCK", block)
    monkeypatch.setattr(triton, "_units", lambda _: units)


@pytest.mark.parametrize("i", range(len(values.SPECS)), ids=[values.name(s) for s in values.SPECS])
def test_many_blocks(i, monkeypatch):
    """Rows of 4 blocks, whole or split over as many programs, the last of them ragged."""
    narrow(monkeypatch, units=64 * (i % 3 > 0))
    monkeypatch.setattr(values, "SHAPES", [(3, 97)])
    arguments = {
        "spec": values.SPECS[i],
        "dtype": (torch.float32, torch.bfloat16, torch.float16)[i % 3],
        "family": list(FAMILIES)[i % len(FAMILIES)],
    }
    run(on_device.MODULE, values.test_value_and_gradient, arguments, monkeypatch)


def test_flags_that_several_programs_of_a_row_see(monkeypatch):
    """A largest entry that is in two blocks of a row, and entries that are cut in two."""
    narrow(monkeypatch, 64)
    use(on_device.MODULE, monkeypatch)
    student, teacher = torch.zeros(2, 2, 97)
    student[0, [3, 90]], teacher[0, [3, 90]] = 2.0, 5.0
    teacher[1, 40] = 4.0
    spec = DivergenceSpec("forward_kl", clip=0.1)
    _, stats = divergence_with_stats(student, teacher, spec)
    assert stats.top1_agreement.tolist() == [1, 1]  # the second student's entries are all alike
    assert stats.clipped.tolist() == [1, 1]


@pytest.mark.parametrize(("test", "arguments"), again(every=61, tests=(grid.test_supports,)))
def test_many_blocks_of_supports(test, arguments, monkeypatch):
    narrow(monkeypatch, 64, block=512)
    run(on_device.MODULE, test, arguments, monkeypatch)


PARTS = parts.backend(on_device.COLUMNS)


@pytest.mark.parametrize(("test", "arguments"), again(every=89, tests=columns.TESTS))
def test_parts_of_the_columns(test, arguments, monkeypatch):
    narrow(monkeypatch, units=64, block=512)
    run(PARTS, test, arguments, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), again(tests=columns.TESTS))
def test_parts_of_the_columns_all(test, arguments, monkeypatch):
    run(PARTS, test, arguments, monkeypatch)
