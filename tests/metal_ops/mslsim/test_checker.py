"""Bugs planted in clean kernels: a checked run names each, and its line of Metal."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.metal_ops.mslsim import GpuError, compile_shader, compilers, powers

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)

SMALL = (Path(__file__).parent / "kernels" / "small.metal").read_text()


class Bug(NamedTuple):
    old: str
    new: str
    kind: str  # of the report
    at: str  # text on the line that the report names


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
IN_POWERS = {
    "partial results are not published": Bug(
        f"  {BARRIER}\n  float tops", "  float tops", "uninitialised", "lane < simds ? shared[lane]"
    ),
    "a barrier that orders nothing": Bug(
        f"{BARRIER}\n  float tops",
        "threadgroup_barrier(mem_flags::mem_none);\n  float tops",
        "race",
        "lane < simds ? shared[lane]",
    ),
    "a barrier that orders device memory": Bug(
        f"{BARRIER}\n  float tops",
        "threadgroup_barrier(mem_flags::mem_device);\n  float tops",
        "race",
        "lane < simds ? shared[lane]",
    ),
    "a barrier of the simdgroup for one of the group": Bug(
        f"{BARRIER}\n  float tops",
        "simdgroup_barrier(mem_flags::mem_threadgroup);\n  float tops",
        "race",
        "shared[",
    ),
    "threadgroup memory used again without a barrier": Bug(
        f"  {BARRIER}\n  o.top = simd_max(tops);",
        "  shared[lane] = 0.0f;\n  o.top = simd_max(tops);",
        "race",
        "shared[lane] = 0.0f",
    ),
    "32 partial results whatever the size": Bug(
        "lane < simds ? shared[lane] : kFloor", "shared[lane]", "uninitialised", "shared[lane]"
    ),
    "tail guard off by one": Bug(
        "i + kReads <= V", "i + kReads <= V + 1", "out-of-bounds", "return float(row[i])"
    ),
    "tail too long by one": Bug(
        "uint j = i; j < V;", "uint j = i; j < V + 1;", "out-of-bounds", "return float(row[i])"
    ),
    "written behind the row": Bug(
        "uint i = tid; i < V; i += threads) {\n    to[i] = T(exp2",
        "uint i = tid; i < V + 1; i += threads) {\n    to[i] = i == V ? T(0.0f) : T(exp2",
        "out-of-bounds",
        "to[i] = i == V",
    ),
    "return before a barrier": Bug(
        "  Online o = {kFloor, 0.0f};",
        "  if (simd * 128 >= V / 4) return;\n  Online o = {kFloor, 0.0f};",
        "barrier-divergence",
        f"  {BARRIER}",
    ),
    "barrier in a branch": Bug(
        f"{BARRIER}\n  float tops",
        f"if (lane < simds) {{ {BARRIER} }}\n  float tops",
        "barrier-divergence",
        "if (lane < simds) { threadgroup",
    ),
    "simd_sum under lane 0": Bug(
        "  if (lane == 0) {\n",
        "  if (lane == 0) {\n    sum = simd_sum(sum);\n",
        "simd-divergence",
        "    sum = simd_sum(sum);",
    ),
    "simd_max in the lanes with a value": Bug(
        "  o.top = simd_max(tops);",
        "  o.top = tops;\n  if (lane < simds) { o.top = simd_max(tops); }",
        "simd-divergence",
        "if (lane < simds) { o.top",
    ),
    "every thread writes the result": Bug(
        "  if (tid == 0) {\n    tops[row] = o.top;",
        "  if (tid < 2) {\n    tops[row] = o.top;",
        "race",
        "tops[row] = o.top;",
    ),
    "another row's result": Bug(
        "    sums[row] = o.sum;", "    sums[row / 2] = o.sum;", "race", "sums[row / 2]"
    ),
    "result not written": Bug("    sums[row] = o.sum;\n", "", "unwritten", "sums"),
    "a row without weight not written": Bug(
        "      to[i] = T(0.0f);", "      (void)to;", "unwritten", "out"
    ),
    "write through a cast of const": Bug(
        "    sums[row] = o.sum;",
        "    sums[row] = o.sum;\n    ((device float*)weights)[row] = 0.0f;",
        "const-write",
        "((device float*)weights)",
    ),
    "too much threadgroup memory": Bug(
        "shared[2 * kSimd];", "shared[33 * 256];", "threadgroup-memory", "33792 bytes"
    ),
    "threadgroup memory too small": Bug(
        "shared[2 * kSimd];", "shared[kSimd];", "out-of-bounds", "shared[kSimd + simd] = sum"
    ),
    "index outside of a local array": Bug(
        "  Online o = {kFloor, 0.0f};",
        "  float four[4] = {};\n  four[V & 8] = 1.0f;\n  Online o = {kFloor, four[0] * 0.0f};",
        "undefined",
        "four[V & 8]",
    ),
    "32-bit product of row and stride": Bug(
        "x + long(row) * sizes[1]",
        "x + int(row) * (int(sizes[1]) << 21)",
        "undefined",
        "int(row) * (int",
    ),
}


# where only the results are wrong
WRONG = {
    "the merge drops the sums of other simdgroups": (
        "o.sum = simd_sum(sums * exp2(tops - o.top));",
        "o.sum = sum * exp2(top - o.top);",
    ),
    "the merge adds sums of different scales": (
        "simd_sum(sums * exp2(tops - o.top))",
        "simd_sum(sums)",
    ),
    "the running sum keeps its old scale": (
        "o.sum * exp2(o.top - top) + exp2(x - top)",
        "o.sum + exp2(x - top)",
    ),
    "the tail is left out": ("uint j = i; j < V;", "uint j = V; j < V;"),
    "the main loop is left out": ("uint j = 0; j < kReads;", "uint j = kReads; j < kReads;"),
    "a row without weight counts": ("weights[row] == 0.0f", "weights[row] < 0.0f"),
}


def _run(text: str, rows: Tensor, **how: object) -> None:
    library = compile_shader(text, check=True, name="bug.metal")
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    powers.run(library, rows, weights, 128, gap=4, **how)


def _caught(text: str, bug: Bug, reports: list[str]) -> bool:
    """Whether a report of the kind has the bug's text, or names a line that has it."""
    mine = [r for r in reports if r.startswith(f"{bug.kind}:")]
    places = {int(n) for r in mine for n in re.findall(r"bug\.metal:(\d+)", r)}
    lines = text.split("\n")
    return any(bug.at in lines[n - 1] for n in places) or any(bug.at in r for r in mine)


def _reports(text: str, order: str) -> list[str]:
    with pytest.raises(GpuError) as error:
        _run(text, powers.rows(4, 1003, gap=4), order=order)
    return error.value.reports


@pytest.mark.parametrize("name", IN_POWERS)
def test_bugs_in_a_reduction(name: str):
    bug = IN_POWERS[name]
    assert powers.FLOAT.count(bug.old) == 1
    text = powers.FLOAT.replace(bug.old, bug.new)
    for order in ("forward", "reverse", "random"):
        reports = _reports(text, order)
        assert _caught(text, bug, reports), (order, reports)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results(name: str):
    """Of bugs that break no rule of memory or order: exact arithmetic shows them."""
    old, new = WRONG[name]
    assert powers.FLOAT.count(old) == 1
    library = compile_shader(powers.FLOAT.replace(old, new), check=True)
    x, weights = powers.rows(3, 1003), torch.tensor([1.0, 0.0, 2.0])
    found = powers.run(library, x, weights, 128)
    assert powers.differences(found, x, weights)


IN_SMALL = {
    "device memory behind a barrier of the other kind": (
        "through_device",
        Bug("mem_flags::mem_device", "mem_flags::mem_threadgroup", "race", "out[i] = x["),
    ),
    "threadgroup memory behind a barrier of the other kind": (
        "rotate",
        Bug(
            "shared[tid] = x[tid];\n  threadgroup_barrier(mem_flags::mem_threadgroup)",
            "shared[tid] = x[tid];\n  threadgroup_barrier(mem_flags::mem_device)",
            "race",
            "out[tid] = shared",
        ),
    ),
    "another simdgroup's value behind a simdgroup barrier": (
        "within_simdgroups",
        Bug("shared[tid ^ 1]", "shared[tid ^ 32]", "race", "shared["),
    ),
    "another group's element of device memory": (
        "through_device",
        Bug("x[i - tid + (tid + 1", "x[(tid + 1", "race", "x["),
    ),
}


@pytest.mark.parametrize("name", IN_SMALL)
def test_bugs_between_simdgroups_and_groups(name: str):
    kernel, bug = IN_SMALL[name]
    assert SMALL.count(bug.old) == 1
    text = SMALL.replace(bug.old, bug.new)
    for order in ("forward", "reverse", "random"):
        library = compile_shader(text, check=True, name="bug.metal", order=order)
        groups = 2 if kernel == "through_device" else 1
        x, out = torch.randn(2, 64 * groups)
        with pytest.raises(GpuError) as error:
            getattr(library, kernel)(x, out, threads=64 * groups, group_size=64)
        assert _caught(text, bug, error.value.reports), (order, error.value)


def test_a_vector_of_unaligned_elements():
    library = compile_shader(SMALL, check=True, name="bug.metal")
    x = torch.randn(20)
    x = x[1:] if x.data_ptr() % 16 == 0 else x
    out = torch.empty(16)
    aligned = -(x.data_ptr() // 4) % 4
    library.fours(x, out, [aligned], threads=4, group_size=4)
    assert torch.equal(out, x[aligned : aligned + 16])
    with pytest.raises(GpuError, match=r"misaligned: .* at bug.metal:\d+"):
        library.fours(x, out, [aligned - 1 if aligned else 1], threads=4, group_size=4)


def test_a_row_ends_before_the_gap_to_the_next():
    text = powers.FLOAT.replace("uint j = i; j < V;", "uint j = i; j < V + 1;")
    library = compile_shader(text, check=True)
    with pytest.raises(GpuError, match="read of 4 bytes at x row 0, byte 4012 of 4012, at "):
        powers.run(library, powers.rows(4, 1003, gap=4), torch.ones(4), 128)
