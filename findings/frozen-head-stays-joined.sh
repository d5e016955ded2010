#!/usr/bin/env bash
# torch FSDP 2: a frozen model keeps its head whole on every process after a forward without gradient.
#
# A good engineer would guess: under no_grad nothing will need the parameters again, so that after
# the forward each process has its pieces only, as it had before. For a frozen model (a teacher, a
# reference of a policy) this is why it is sharded.
# What happens: fully_shard leaves the group of the outermost module joined after a forward, since
# a backward would begin with it. It does so without a backward too: what has no fully_shard of its
# own (the head, the embeddings, the last norm) stays whole until the next forward, with as much
# memory as without FSDP. In a small model these are most of the parameters.
# `fully_shard(model, reshard_after_forward=True)` or `model.reshard()` gives it up.
# Versions: torch 2.13.0 (CPU, two gloo processes).
# Seen on 2026-12-01, elements that a process holds of two blocks of 64 x 64 and a head of 4096 x 64:
#   as it is: a process holds 135232 elements before, 266304 after
#   reshard_after_forward=True: a process holds 135232 elements before, 135232 after
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet numpy==2.3.5
export OMP_NUM_THREADS=1
cat > "$work/run.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes


def held(model):
    pieces = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() for p in pieces)


def work(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for given in ({}, {"reshard_after_forward": True}):
        blocks = [nn.Linear(64, 64) for _ in range(2)]
        model = nn.Sequential(*blocks, nn.Linear(64, 4096, bias=False)).requires_grad_(False)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, **given)
        before = held(model)
        with torch.no_grad():
            model(torch.randn(4, 64))
        after = held(model)
        if rank == 0:
            print(f"{given or 'as it is'}: a process holds {before} elements before, {after} after")
        head = 4096 * 64
        expected = before if given else before + head // 2
        assert after == expected, f"changed: {after} elements are held after a forward {given}"
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(work, (sys.argv[1],), nprocs=2, start_method="spawn")
PYTHON
"$work/venv/bin/python" "$work/run.py" "$work/store"
