"""The Triton backend on this machine's GPU, or interpreted."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.metal_ops.ops.conftest import poison
from tests.metal_ops.triton import interpreter

__all__ = ["poison"]


@pytest.fixture(autouse=True)
def triton_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are taken by the interpreter, whose NumPy may meet infinities."""
    if interpreter.MISSING:
        pytest.skip("Triton is not installed: pip install triton==3.7.1")
    if interpreter.DEVICE == "cpu":
        monkeypatch.setenv(interpreter.NAME, "1")
    with np.errstate(all="ignore"):
        yield
