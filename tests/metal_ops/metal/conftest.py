"""Every test here needs a C++ compiler, and starts memory that nobody filled as NaN."""

from collections.abc import Iterator

import pytest

from metal_ops.backends import metal
from tests.metal_ops.metal.harness import CHECKED, FAST, Simulator
from tests.metal_ops.mslsim import compilers
from tests.metal_ops.ops.conftest import poison

__all__ = ["poison"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = compilers.unavailable()
    if reason is None:
        return
    for item in items:
        if item.path.parent.name == "metal":
            item.add_marker(pytest.mark.skip(reason=f"the Metal simulator {reason}"))


@pytest.fixture
def fast() -> Iterator[Simulator]:
    """The backend takes tensors on the CPU."""
    with metal.simulated(FAST):
        yield FAST


@pytest.fixture
def checked() -> Iterator[Simulator]:
    """As `fast`; races, bounds, unwritten outputs and more raise."""
    with metal.simulated(CHECKED):
        yield CHECKED.scheduled("forward")
