"""How kernels are called and run: torch's rules for arguments and sizes, and the run's options."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.metal_ops.mslsim import GpuError, Library, compile_shader, compilers

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)

SMALL = (Path(__file__).parent / "kernels" / "small.metal").read_text()


@pytest.fixture
def library() -> Library:
    return compile_shader(SMALL, check=True)


@pytest.fixture
def fast() -> Library:
    return compile_shader(SMALL)


@pytest.mark.parametrize("threads", [32, 64, 40, 1024])  # 40: the second simdgroup has 8 lanes
def test_small_kernels(library: Library, threads: int):
    x, out = torch.randn(2, threads)
    library.rotate(x, out, threads=threads, group_size=threads)
    assert torch.equal(out, x.roll(-1))
    library.within_simdgroups(x, out, threads=threads, group_size=threads)
    assert torch.equal(out, x.view(-1, 2).flip(1).flatten())
    whole = torch.randint(-9, 9, (threads,)).float()
    library.simd_sums(whole, out, threads=threads, group_size=threads)
    sums = [part.sum().expand(len(part)) for part in whole.split(32)]
    assert torch.equal(out, torch.cat(sums))


def test_through_device_memory(library: Library):
    x, out = torch.empty(2, 128)
    library.through_device(x, out, threads=128, group_size=64)
    assert torch.equal(out, torch.arange(64.0).roll(-1).repeat(2))


def test_two_dimensions_and_a_ragged_edge(library: Library):
    """5 x 3 threads in groups of 2 x 2: the last column and row of groups are smaller."""
    out = torch.full((3, 5, 5), -1, dtype=torch.int32)
    library.positions(out, threads=(5, 3), group_size=(2, 2))
    y, x = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    width, height = torch.where(x == 4, 1, 2), torch.where(y == 2, 1, 2)
    flat = (y % 2) * width + x % 2
    expected = torch.stack([x // 2, y // 2, width, height, flat], -1)
    assert torch.equal(out, expected.int())


def test_sizes_are_those_of_torch(library: Library):
    out = torch.empty(8, dtype=torch.int32)
    library.fill(out, [7])  # as many threads as the first tensor has elements
    assert out.eq(7).all()
    refusals = [
        (ValueError, {"threads": 2048, "group_size": 2048}),
        (ValueError, {"threads": 0, "group_size": 1}),
        (ValueError, {"threads": 2**32, "group_size": 32}),
        (RuntimeError, {"threads": (8, 1), "group_size": 8}),
    ]
    for error, sizes in refusals:
        with pytest.raises(error):
            library.fill(out, [7], **sizes)
    limited = compile_shader(SMALL, check=True, max_threads=4)
    assert limited.fill.max_threads_per_threadgroup == 4
    with pytest.raises(ValueError, match="Threadgroup size exceeds 4 limit"):
        limited.fill(out, [7], threads=8, group_size=8)


def test_names_are_those_of_torch(library: Library):
    assert "fill" in dir(library)
    with pytest.raises(RuntimeError, match="Failed to create function state object for: missing"):
        _ = library.missing
    with pytest.raises(SyntaxError, match="not ASCII"):
        compile_shader(SMALL + "// \u00e9")
    with pytest.raises(SyntaxError):
        compile_shader(SMALL.replace("float(tid)", "float(tid"))


OUT = torch.zeros(8, dtype=torch.int32)
ARGUMENTS: dict[str, tuple[type[Exception], Callable[[], tuple]]] = {
    "a number as int32": (TypeError, lambda: (OUT, [7], {"arg_casts": "int32"})),
    "a float for a long": (TypeError, lambda: (OUT, [7.0], {})),
    "integers and floats": (TypeError, lambda: (OUT, [7, 7.0], {})),
    "a tensor of another dtype": (TypeError, lambda: (OUT.float(), [7], {})),
    "a dtype that MPS has not": (TypeError, lambda: (OUT.double(), [7], {})),
    "an empty tensor": (ValueError, lambda: (OUT[:0], [7], {})),
    "an empty list": (RuntimeError, lambda: (OUT, [], {})),
    "nothing": (RuntimeError, lambda: (OUT, None, {})),
    "a text": (RuntimeError, lambda: (OUT, "7", {})),
    "more than 4096 bytes": (ValueError, lambda: (OUT, [7] * 513, {})),
    "numbers to be written": (TypeError, lambda: ([7], [7], {})),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_torch_would_misread(library: Library, name: str):
    error, make = ARGUMENTS[name]
    *args, how = make()
    with pytest.raises(error):
        library.fill(*args, threads=8, group_size=8, **how)


def test_counts_of_arguments(library: Library):
    with pytest.raises(TypeError, match="2 buffers, got 1"):
        library.fill(OUT)


def test_written_buffers_may_not_overlap(library: Library):
    x = torch.zeros(48)
    with pytest.raises(ValueError, match="out, which is written, overlaps x"):
        library.rotate(x[:32], x[16:], threads=32, group_size=32)
    library.rotate(x[:32], torch.empty(32), threads=32, group_size=32)


def test_constant_tensors_start_at_four_bytes(library: Library):
    text = "kernel void f(constant half* h, device float* x) { x[0] = float(h[0]); }"
    f = compile_shader(f"using namespace metal;\n{text}").f
    values, out = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16), torch.zeros(1)
    f(values[2:], out, threads=1, group_size=1)
    assert out == 3
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        f(values[1:], out, threads=1, group_size=1)


def test_a_list_that_is_too_short(library: Library):
    text = SMALL.replace("int(ints[0])", "int(ints[1])")
    with pytest.raises(GpuError, match=r"out-of-bounds: read of 8 bytes at ints\+8 bytes, at "):
        compile_shader(text, check=True).fill(OUT, [7], threads=8, group_size=8)


def test_groups_can_be_left_out(fast: Library):
    out = torch.zeros(96, dtype=torch.int32)
    fast.fill(out, [7], threads=96, group_size=32, only_groups=[2])
    assert out.tolist() == [0] * 64 + [7] * 32


def test_subnormal_numbers_are_zero_if_asked(fast: Library):
    x, halves, exps = torch.full((3, 32), 2.0**-126)
    for flush, expected in ((True, 0.0), (False, 2.0**-127)):
        fast.arithmetic(x, halves, exps, threads=32, group_size=32, ftz=flush)
        assert halves.tolist() == [expected] * 32
    assert x[0] * 0.5 != 0  # and the caller's arithmetic is what it was


def test_noise_is_as_large_as_metal_allows(fast: Library):
    x = torch.linspace(-20, 20, 4096)
    runs = []
    for seed in (1, 1, 2):
        halves, exps = torch.empty(2, 4096)
        fast.arithmetic(x, halves, exps, threads=4096, group_size=32, noise=True, seed=seed)
        runs.append(exps)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    exact = x.double().exp()
    ulp = torch.exp2(exact.log2().floor() - 23)
    error = ((runs[0] - exact) / ulp).abs().max()
    assert 3 < error <= 4 + 1  # 4 of noise and at most 1 of the host's exp and of rounding


def _halves(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else _halves(x[: len(x) // 2] + x[len(x) // 2 :])


def _neighbours(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else _neighbours(x[::2] + x[1::2])


def test_simd_sum_adds_in_the_order_asked_for(fast: Library):
    generator = torch.Generator().manual_seed(5)  # most have two sums or one
    x = torch.randn(32, generator=generator) * 10 ** torch.arange(32).remainder(5)
    expected = {
        "halves": _halves(x),
        "in turn": functools.reduce(torch.add, x),
        "neighbours": _neighbours(x),
    }
    assert len({v.item() for v in expected.values()}) == 3
    for order, value in expected.items():
        out = torch.empty(32)
        fast.simd_sums(x, out, threads=32, group_size=32, sum_order=order)
        assert out.eq(value).all()


def test_lanes_that_are_left_out(fast: Library):
    text = SMALL.replace("out[i] = simd_sum(x[i]);", "out[i] = i % 2 ? simd_sum(x[i]) : 0.0f;")
    library = compile_shader(text)
    x, out = torch.ones(2, 32)
    with pytest.raises(GpuError, match="simd-divergence: only lanes aaaaaaaa of simdgroup 0"):
        library.simd_sums(x, out, threads=32, group_size=32)
    library.simd_sums(x, out, threads=32, group_size=32, strict=False)
    assert out.tolist() == [0.0, 16.0] * 16


def test_threads_run_in_the_order_asked_for():
    """The last to write to one place wins, which a checked run would report as a race."""
    library = compile_shader(SMALL.replace("out[i] = int(ints[0]);", "out[0] = int(i);"))

    def last(**run: object) -> int:
        out = torch.zeros(1, dtype=torch.int32)
        library.fill(out, [7], threads=128, group_size=32, **run)
        return int(out)

    assert last(order="forward") == 127
    assert last(order="reverse") == 0
    random = [last(order="random", seed=seed) for seed in range(8)]
    assert len(set(random)) > 4
    assert random == [last(order="random", seed=seed) for seed in range(8)]


def test_options_have_names(library: Library):
    for wrong in ({"order": "backward"}, {"sum_order": "random"}):
        with pytest.raises(ValueError, match="expected one of"):
            library.fill(OUT, [7], **wrong)
    with pytest.raises((TypeError, ValueError)):
        library.fill(OUT, [7], schedule="forward")
