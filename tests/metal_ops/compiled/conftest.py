"""The compiled backend needs a compiler; memory that it does not fill starts as NaN."""

import pytest
import torch

from metal_ops.backends import compiled
from tests.metal_ops.ops.conftest import poison

__all__ = ["poison"]


@pytest.fixture(autouse=True)
def compiler() -> None:
    probe = torch.empty(0, 1)
    reason = compiled.unsupported(probe, probe)
    if reason:
        pytest.skip(reason)
