"""The CUDA translation of every kernel compiles, and without doubles; it is not run here."""

import shutil
from pathlib import Path

import pytest

from tests.metal_ops.mslsim import Library, compile_shader, compilers, cuda, powers

pytestmark = [
    pytest.mark.skipif(
        compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
    ),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.slow,
]
SMALL = (Path(__file__).parent / "kernels" / "small.metal").read_text()
ELF = b"\x7fELF"


@pytest.mark.parametrize("text", [powers.TEXT, SMALL], ids=["powers", "small"])
def test_kernels_compile(text: str):
    cubin, kernels = cuda.compile_cubin(text, "sm_90")
    assert cubin.startswith(ELF)
    for kernel in kernels:
        assert kernel.name.encode() in cubin


def test_a_double_is_refused():
    old = "o.sum = o.sum * exp2(o.top - top) + exp2(x - top);"
    assert powers.FLOAT.count(old) == 1
    text = powers.FLOAT.replace(old, old.replace("= o.sum", "= 1.0 / 3.0 * o.sum"))
    with pytest.raises(SyntaxError, match="double"):
        cuda.compile_cubin(text, "sm_90")


def test_the_comparison_sees_a_wrong_kernel():
    """Which a run on a GPU makes; here with the simulator in place of one."""
    assert cuda.project(compile_shader, ["tvd"], [7]) == []
    old = "0.5f * fabs(less)"

    def wrong(text: str) -> Library:
        return compile_shader(text.replace(old, "0.4f * fabs(less)"))

    found = cuda.project(wrong, ["tvd"], [7])
    assert [f.split(" ")[0] for f in found] == ["tvd"] * 3
