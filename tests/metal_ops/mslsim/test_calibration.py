"""PyTorch's own Metal reductions, which run on Macs every day, pass on the simulator."""

from pathlib import Path

import pytest
import torch

from tests.metal_ops.mslsim import GpuError, compile_shader, compilers
from tests.metal_ops.mslsim.powers import TYPES

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)
TEXT = (Path(__file__).parent / "kernels" / "reductions.metal").read_text()


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("check", [False, True], ids=["fast", "checked"])
@pytest.mark.parametrize("threads", [32, 64, 96, 1024])
def test_reductions_of_torch(threads: int, check: bool, order: str):
    library = compile_shader(TEXT, check, order=order, strict=False)
    for dtype, name in TYPES.items():
        x = torch.stack([torch.randperm(threads) % 128 for _ in range(3)]) - 64.0
        x[:, 5] = 100.0
        x, out = x.to(dtype), torch.full((3, 5), torch.nan)
        kernel = getattr(library, f"reductions_{name}")
        kernel(x, out, threads=3 * threads, group_size=threads)
        y = x.double()
        product = torch.where(y > 60, 2.0, 1.0).prod(-1)
        largest, place = y.max(-1)
        expected = torch.stack([y.sum(-1), product, largest, y.amin(-1), place.double()], -1)
        assert torch.equal(out, expected.float())


def test_they_call_simd_sum_in_some_lanes_only():
    """Which Metal allows: the reason why a run can be told not to be strict."""
    library = compile_shader(TEXT, check=True)
    x, out = torch.zeros(64), torch.zeros(1, 5)
    with pytest.raises(GpuError, match="simd-divergence: only lanes 00000003 of simdgroup 0"):
        library.reductions_float(x, out, threads=64, group_size=64)


def test_torch_embeds_headers_as_here():
    """The function that `torch.mps.compile_shader` passes a text through."""
    source = Path(torch.mps.__file__).read_text()
    assert "from torch.utils._cpp_embed_headers import _embed_headers" in source
