"""Mistakes planted in the real kernels, each of which the tests of this folder must find."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from metal_ops.backends import metal
from metal_ops.backends.metal import launch
from tests.metal_ops.metal.harness import (
    Rows,
    Simulator,
    clipped,
    divergence,
    far,
    hidden,
    one_side,
)
from tests.metal_ops.mslsim import GpuError


def divergences() -> None:
    for width in (100, 1000, 1001, 1002, 1003):
        divergence(Rows.make(width, torch.float32, strided=True), "jsd")
    steps()


def steps() -> None:
    """A thread goes through the row in several steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "group_size", lambda *_: 64)
        rows = Rows.make(1003, torch.float32, strided=True)
        divergence(rows, "jsd")
        one_side(rows, 10)
        hidden(rows, "cosine")


def several_dispatches() -> None:
    rows = Rows.make(101, torch.float32, strided=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "MAX_ENTRIES", 210)  # two rows of four
        patch.setattr(Simulator, "complete", False)
        divergence(rows, "jsd")


def clips() -> None:
    clipped(Rows.make(1001, torch.float32, strided=True), "forward_kl")


def sides() -> None:
    for width, num_kept in ((1001, 900), (1003, 10)):
        one_side(Rows.make(width, torch.float32, strided=True), num_kept)


def states() -> None:
    for kind in ("mse", "cosine"):
        hidden(Rows.make(1003, torch.float32, strided=True), kind)


class Mutant(NamedTuple):
    """A mistake, the text it replaces and what with, and the work that shows it."""

    name: str
    old: str
    new: str
    work: Callable[[], None] = divergences
    check: bool = True  # on the checked simulator


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
FIRST = f"  {BARRIER}  on_s = get_online"
SECOND = f"  {BARRIER}  f = get_sum"
SKIP = "  if (weights[row] == 0.0f) {"
LOOP = "i < V; i += num_threads * kReads) {\n    if (i + kReads"

MUTANTS = [
    Mutant(
        "the merge drops the sums of the other simdgroups",
        "o.s = simd_sum(s * precise::exp((m - o.m) * inv_t));",
        "o.s = slots[(slot + 1) * kSimd] * precise::exp((slots[slot * kSimd] - o.m) * inv_t);",
    ),
    Mutant(
        "a sum of one simdgroup only", "lane < num_sg ? slots[slot *", "lane < 1 ? slots[slot *"
    ),
    Mutant(
        "a sum is not taken over the lanes",
        "put(slots, slot, simd_sum(v), lane, sg);",
        "put(slots, slot, v, lane, sg);",
    ),
    Mutant(
        "slots are used again without a barrier",
        "put_sum(slots, 4, f, lane, sg);",
        "put_sum(slots, 0, f, lane, sg);",
    ),
    Mutant("no barrier after the first pass", FIRST, "  on_s = get_online"),
    Mutant("no barrier after the second pass", SECOND, "  f = get_sum"),
    Mutant("a barrier that orders no memory", FIRST, FIRST.replace("mem_threadgroup", "mem_none")),
    Mutant("a barrier of one simdgroup", FIRST, FIRST.replace("threadgroup_b", "simdgroup_b", 1)),
    Mutant("32 partial sums of any group", "float s = lane < num_sg ?", "float s = lane < 32 ?"),
    Mutant("too few slots", "slots[10 * kSimd]", "slots[9 * kSimd]"),
    Mutant(
        "a barrier that some threads do not reach",
        "  Online on_s = online_nothing();",
        "  if (tid * kReads >= V) {\n    return;\n  }\n  Online on_s = online_nothing();",
    ),
    Mutant(
        "a simdgroup's sum by its first lane",
        "  put(slots, slot, simd_sum(v), lane, sg);",
        "  if (lane == 0) {\n    put(slots, slot, simd_sum(v), lane, sg);\n  }",
    ),
    Mutant(
        "two threads write a row's values",
        "  if (tid == 0) {\n    device float* out = values",
        "  if (tid < 2) {\n    device float* out = values",
    ),
    Mutant(
        "no step of the loop where the row is shorter than a block",
        LOOP,
        LOOP.replace("i < V", "i + num_threads * kReads <= V + 4 * tid", 1),
    ),
    Mutant("the tail is read one too far", "if (i + kReads <= V) {", "if (i + kReads <= V + 1) {"),
    Mutant(
        "the tail is left out", "for (uint j = i; j < V; ++j) {", "for (uint j = V; j < V; ++j) {"
    ),
    Mutant("writes behind the row", "uint end = min(i + kReads, V);", "uint end = i + kReads;"),
    Mutant(
        "an old sum keeps its scale",
        "o.s = o.s * precise::exp((o.m - m) * inv_t) +",
        "o.s = o.s +",
    ),
    Mutant("a masked row is not skipped", SKIP, SKIP.replace("== 0.0f", "< 0.0f")),
    Mutant("a masked row stays unwritten", "    write_zeros(out, V, tid, num_threads);\n", ""),
    Mutant(
        "the student's stride for the teacher", "teacher + row * ints[4]", "teacher + row * ints[3]"
    ),
    Mutant(
        "rows counted from the dispatch",
        "const long row = ints[2] + long(group);",
        "const long row = long(group);",
        several_dispatches,
    ),
    Mutant(
        "32-bit row offsets",
        "student + row * ints[3]",
        "student + uint(row) * uint(ints[3])",
        far,
        check=False,
    ),
    Mutant(
        "no temperature", "e.q = precise::exp(e.log_q);", "e.q = precise::exp(e.log_q / inv_t);"
    ),
    Mutant(
        "the gradient is not centred",
        "clip(Kind::of(e, beta), bound).h - e.q * H",
        "clip(Kind::of(e, beta), bound).h",
    ),
    Mutant("the label of a block", "j == hard.label ?", "i == hard.label ?"),
    Mutant("agreement of the student alone", "x == on_s.m && y == on_t.m", "x == on_s.m"),
    Mutant(
        "a clipped entry keeps its slope",
        "Terms cut = {bound, 0.0f};",
        "Terms cut = {bound, x.h};",
        clips,
    ),
    Mutant("an id next to another is missed", "while (at <= j) {", "while (false) {", sides),
    Mutant(
        "an id at the end of a block is missed",
        "at >= i + kReads) {",
        "at + 1 >= i + kReads) {",
        sides,
    ),
    Mutant("the difference of lengths has the wrong sign", "-apart / b", "apart / b", states),
    Mutant("the loss is not taken off the slope", "  w.of_s -= loss;\n", "", states),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_mutant(mutant):
    sources = list(launch.sources())
    assert any(mutant.old in launch.text(x) for x in sources), "the kernels have changed"
    changed = Simulator(mutant.check, (mutant.old, mutant.new))
    with metal.simulated(changed), pytest.raises((GpuError, AssertionError)) as caught:
        mutant.work()
    lines = str(caught.value).splitlines()
    print(f"{mutant.name}: {caught.type.__name__} {lines[0][:140] if lines else ''}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "work", [divergences, steps, several_dispatches, clips, sides, states, far]
)
def test_the_work_passes_without(work):
    with metal.simulated(Simulator(check=work is not far)):
        work()
