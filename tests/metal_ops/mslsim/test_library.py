"""The simulator runs Metal text: every type, size, schedule and build gives the exact result."""

import pytest
import torch

from tests.metal_ops.mslsim import compile_shader, compilers, powers

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)

DTYPES = tuple(powers.TYPES)
# threads of a group, vocabulary: tails of 0 to 3, one element, several steps, less than a simdgroup
SIZES = [(32, 1), (64, 1000), (128, 1001), (128, 1002), (256, 1003), (1024, 4097), (32, 31)]


@pytest.mark.parametrize("check", [False, True], ids=["fast", "checked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group_size", "v"), SIZES)
def test_results_are_exact(group_size: int, v: int, dtype: torch.dtype, check: bool):
    library = compile_shader(powers.TEXT, check, name=powers.NAME)
    x, weights = powers.rows(3, v, dtype, gap=3), torch.tensor([1.0, 0.0, 2.0])
    for order in ("forward", "reverse", "random"):
        found = powers.run(library, x, weights, group_size, gap=5, order=order)
        assert not powers.differences(found, x, weights)


def test_traffic():
    library = compile_shader(powers.TEXT, check=True)
    x, weights = powers.rows(3, 1001, torch.bfloat16), torch.tensor([1.0, 0.0, 2.0])
    powers.run(library, x, weights, 128)
    stats = library.powers_bfloat.stats
    assert stats.buffers["x"] == (2 * 2 * 1001 * 2, 0, 0)  # two of three rows, read twice
    assert stats.buffers["out"] == (0, 3 * 1001 * 2, 3 * 1001 * 2)
    assert stats.buffers["tops"] == (0, 3 * 4, 3 * 4)
    assert stats.threadgroup_bytes == 2 * 32 * 4
