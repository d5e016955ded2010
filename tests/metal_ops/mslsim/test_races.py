"""What orders two accesses and what does not: one cell, few threads, the order they run in."""

import pytest
import torch

from tests.metal_ops.mslsim import GpuError, Library, compile_shader, compilers

pytestmark = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)

GROUP = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD = "simdgroup_barrier(mem_flags::mem_threadgroup);"

NOTHING = "threadgroup_barrier(mem_flags::mem_none);"  # all threads meet, no memory is ordered


def read(*threads: int) -> str:
    return "".join(f"if (tid == {t}) {{ v += shared[0]; }} " for t in threads)


def write(*threads: int) -> str:
    return "".join(f"if (tid == {t}) {{ shared[0] = 2.0f; }} " for t in threads)


# Threads 0 to 31 are a simdgroup, 32 to 63 another; all in one group. They start in this order.
RACES = {
    "two lanes write": write(0, 1),
    "two simdgroups write": write(0, 32),
    "one writes, a lane reads": write(0) + read(1),
    "one writes, another simdgroup reads": write(0) + read(32),
    "one reads, a lane writes": read(0) + write(1),
    "two lanes read, the first writes": read(0, 1) + NOTHING + write(0),
    "two simdgroups read, the first writes": read(0, 32) + NOTHING + write(0),
    "two lanes read, the second writes": read(0, 1) + write(1),
    "two simdgroups read, the second writes": read(0, 32) + write(32),
    "three read, one of two in a simdgroup writes": read(0, 32, 33) + write(33),
    "a simdgroup's barrier for two": write(0) + SIMD + write(32),
    "a simdgroup's barrier between read and write": read(0) + SIMD + write(32),
    "a simdgroup's barrier with a reader elsewhere": read(0, 32) + SIMD + write(33),
    "a simdgroup's barrier, then two lanes": read(0) + SIMD + read(0, 1) + write(1),
    "a barrier before, none after": write(0) + GROUP + read(32) + write(0),
    "a barrier that orders nothing": write(0) + NOTHING + read(1),
    "a barrier of device memory": write(0) + GROUP.replace("threadgroup)", "device)") + read(1),
}
ORDERED = {
    "one alone": write(5) + read(5) + write(5),
    "many read": write(0) + GROUP + read(0, 1, 32, 33),
    "a barrier of the group": write(0) + GROUP + write(1) + GROUP + write(32) + GROUP + read(0, 33),
    "readers before a barrier": read(0, 1, 32) + GROUP + write(33),
    "a barrier of the simdgroup": write(0) + SIMD + write(1) + SIMD + read(2, 3),
    "readers before a simdgroup's barrier": read(0, 1) + SIMD + write(2),
    "read again behind a simdgroup's barrier": read(0, 1) + SIMD + read(1) + write(1),
}
CASES = [*RACES.values(), *ORDERED.values()]
KERNEL = """
kernel void case_{i}(device float* out, uint tid [[thread_position_in_threadgroup]]) {{
  threadgroup float shared[1];
  float v = 1.0f;
  if (tid == 7) {{ shared[0] = 0.0f; }}
  {group}
  {body}
  out[tid] = v;
}}
"""
TEXT = "using namespace metal;\n" + "".join(
    KERNEL.format(i=i, group=GROUP, body=body) for i, body in enumerate(CASES)
)


@pytest.fixture
def library() -> Library:
    return compile_shader(TEXT, check=True)


def _run(library: Library, name: str, table: dict[str, str]) -> None:
    kernel = getattr(library, f"case_{CASES.index(table[name])}")
    kernel(torch.zeros(64), threads=64, group_size=64)


@pytest.mark.parametrize("name", RACES)
def test_races(library: Library, name: str):
    with pytest.raises(GpuError, match=r"race: \w+ after a \w+ of shared\+0 bytes"):
        _run(library, name, RACES)


@pytest.mark.parametrize("name", ORDERED)
def test_ordered(library: Library, name: str):
    _run(library, name, ORDERED)


BETWEEN_GROUPS = """
using namespace metal;
kernel void f(
    device float* x,
    constant long* writer,
    uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_position_in_threadgroup]]) {
  float v = x[0];
  threadgroup_barrier(mem_flags::mem_device);
  if (long(group) == writer[0] && tid == 0) {
    x[0] = v + 1.0f;
  }
}
"""


@pytest.mark.parametrize("writer", [0, 1, 2])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_no_barrier_orders_groups(writer: int, order: str):
    """All three read: whoever writes races with the others, whichever ran last."""
    library = compile_shader(BETWEEN_GROUPS, check=True, order=order, complete=False)
    with pytest.raises(GpuError, match="race: "):
        library.f(torch.zeros(1), [writer], threads=96, group_size=32)
    library.f(torch.zeros(1), [3], threads=96, group_size=32)
