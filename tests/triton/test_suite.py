"""The tests of the ops with the Triton backend: a sample, and all of them when slow."""

import pytest
import torch

from metal_ops import DivergenceSpec
from metal_ops.backends import triton
from metal_ops.selftest.inputs import FAMILIES
from tests.ops import test_grid as grid
from tests.ops import test_values as values
from tests.ops.again import again, run
from tests.triton import on_device

SAMPLE = 13


@pytest.mark.parametrize(("test", "arguments"), again(every=SAMPLE))
def test_again(test, arguments, monkeypatch):
    run(on_device.MODULE, test, arguments, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), again())
def test_again_all(test, arguments, monkeypatch):
    run(on_device.MODULE, test, arguments, monkeypatch)


def _narrow(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    """Blocks of 32 columns in float32 and 64 in 16 bit; `units` multiprocessors."""
    monkeypatch.setattr(triton, "BLOCK_BYTES", 128)
    monkeypatch.setattr(triton, "_units", lambda _: units)


@pytest.mark.parametrize("units", [0, 64], ids=["one program a row", "several"])
@pytest.mark.parametrize("spec", values.SPECS, ids=values.name)
def test_many_blocks(spec, units, monkeypatch):
    """Rows of up to 32 blocks, whole or split over up to 32 programs, the last of them ragged."""
    _narrow(monkeypatch, units)
    i = values.SPECS.index(spec)
    family = list(FAMILIES)[i % len(FAMILIES)]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
    monkeypatch.setattr(values, "SHAPES", [(5, 2), (4, 33), (1, 97), (3, 1023)])
    run(
        on_device.MODULE,
        values.test_value_and_gradient,
        locals_of(spec, dtype, family),
        monkeypatch,
    )


def locals_of(spec: DivergenceSpec, dtype: torch.dtype, family: str) -> dict[str, object]:
    return {"spec": spec, "dtype": dtype, "family": family}


@pytest.mark.parametrize(
    ("test", "arguments"),
    again(every=29, tests=(grid.test_supports, grid.test_sparse, values.test_mask_is_selection)),
)
def test_many_blocks_of_supports(test, arguments, monkeypatch):
    _narrow(monkeypatch, 64)
    run(on_device.MODULE, test, arguments, monkeypatch)
