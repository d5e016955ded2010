"""The project's kernels: language, CUDA, and the same results by other compilers and arithmetic."""

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch

from metal_ops.backends import metal
from metal_ops.backends.metal.launch import Source, sources, text
from metal_ops.spec import KINDS
from tests.metal_ops.metal import harness
from tests.metal_ops.mslsim import Library, compile_shader, compilers, cuda

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)
CLANG = next((name for name in ("clang++-19", "clang++") if shutil.which(name)), "")


def _every(often: Callable[[Source], bool]) -> list:
    """All texts, those of which that can wait are slow."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(s, marks=marks[often(s)], id="-".join(map(str, s))) for s in sources()]


@pytest.mark.parametrize("source", _every(lambda s: s.dtype == torch.bfloat16 and not s.entries))
def test_language(source: Source):
    static = pytest.importorskip("tests.metal_ops.mslsim.static", reason="needs libclang")
    assert static.problems(text(source)) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", list(sources()), ids=lambda s: "-".join(map(str, s)))
def test_cuda_compiles(source: Source):
    cubin, kernels = cuda.compile_cubin(text(source), "sm_90")
    for kernel in kernels:
        assert kernel.name.encode() in cubin


# Apple's compiler may contract a * b + c, and is free to add as it likes if told to use fast math.
VARIANTS = {
    "not optimised": {"flags": ("-O0",)},
    "contracted": {"flags": ("-ffp-contract=fast", "-mfma")},
    "fast math": {"fast_math": True},
    "noise": {"noise": True, "sum_order": "in turn"},
    "subnormal numbers kept": {"ftz": False, "sum_order": "neighbours"},
    "clang": {"compiler": CLANG},
    "clang, checked": {"compiler": CLANG, "check": True},
    "clang, fast math": {"compiler": CLANG, "fast_math": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_other_compilers_and_arithmetic(name: str, kind: str):
    if VARIANTS[name].get("compiler") == "":
        pytest.skip("needs clang++")
    compile_other: Callable[[str], Library] = partial(compile_shader, **VARIANTS[name])
    with metal.simulated(compile_other):
        for dtype in harness.DTYPES:
            for vocab in (7, 1003, 32000):
                harness.divergence(harness.Rows.make(vocab, dtype, strided=True), kind)
