#!/usr/bin/env bash
# torch: a TorchDispatchMode that only looks on makes a backward take more memory than without it.
#
# A good engineer would guess: a mode that passes every operator on unchanged (a counter of bytes,
# a tracker of peak memory) sees what runs without it.
# What happens: where a tensor is used several times, autograd adds the parts of its gradient in
# place, into the first. While any dispatch mode is active it takes each operand for something like
# a tensor subclass, and forms each sum in a new tensor instead. So the measured backward holds one
# more tensor of the gradient's size than the one that is meant, and `add_` is never seen.
# Versions: torch 2.13.0 (CPU).
# Seen on 2026-12-01, a weight of 4 MiB that a forward uses four times:
#   alone: 8.2 MiB above the start; operators that add: aten::add_ x 3
#   under a mode: 12.1 MiB; aten::add only (the profiler lists each twice)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet numpy==2.3.5
export OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PYTHON'
from collections import Counter
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


weight = torch.randn(1024, 1024, requires_grad=True)
hidden = torch.randn(8, 1024)


def step():
    weight.grad = None
    x = hidden
    for _ in range(4):
        x = x @ weight
    x.sum().backward()


def watched():
    with Watch():
        step()


def measured(run):
    run()  # the gradient is held before the measured one too
    weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    memory = sorted((x for x in events if x.name() == "[memory]"), key=lambda x: x.start_ns())
    adds = Counter(x.name() for x in events if x.name() in ("aten::add", "aten::add_"))
    return max(accumulate(x.nbytes() for x in memory)) / 2**20, dict(adds)


alone, under = measured(step), measured(watched)
print(f"alone: {alone[0]:.1f} MiB above the start; operators that add: {alone[1]}")
print(f"under a mode: {under[0]:.1f} MiB; {under[1]}")
assert alone[1] == {"aten::add_": 3}, "changed: gradients add up otherwise without a mode"
assert set(under[1]) == {"aten::add"}, "changed: gradients add up in place under a mode"
assert 3.5 < under[0] - alone[0] < 4.5, "changed: a mode costs other memory than one gradient"
PYTHON
