#!/usr/bin/env bash
# DeepSpeed ZeRO-3: one evaluation forward before training doubles what every later step gathers.
#
# A good engineer would guess: a forward without gradient, done once before the first step, costs
# its own gathering and nothing later. A Trainer with eval_on_start=True does this, and so does any
# check of the model before training.
# What happens: the engine takes the order of modules in its first pass for that of every step. A
# forward alone is another order than forward and backward, the plan never fits again, no new one
# is made, and parameters are gathered module by module, for the forward and for the backward: two
# copies of the model a step instead of one. No line says so, and losses are right.
# Versions: deepspeed 0.19.8 (no compiled operations), torch 2.13.0 (CPU, gloo, two processes).
# Seen on 2026-11-30:
#   gathered in steps 1 to 4, in copies of the model:
#     training alone         [2.0, 1.0, 1.0, 1.0]
#     one evaluation forward [2.0, 2.0, 2.0, 2.0]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet setuptools==81.0.0 wheel==0.45.1 numpy==2.4.1
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
"$work/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cat > "$work/train.py" <<'PYTHON'
import importlib
import sys

import deepspeed
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# DeepSpeed would compile an operation for sums in shared memory; gloo adds as well
importlib.import_module("deepspeed.comm.torch")
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class Gathered(TorchDispatchMode):
    """Counts the bytes of all-gathers."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in str(func):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.bytes += max(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def step_bytes(evaluate_first):
    """Return what each of four training steps gathers."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*blocks)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    x = torch.randn(2, 64)
    if evaluate_first:
        with torch.no_grad():
            engine(x)
    found = []
    for _ in range(4):
        with Gathered() as gathered:
            engine.backward(engine(x).square().mean())
            engine.step()
        found.append(gathered.bytes)
    whole = sum(p.ds_numel * 4 for p in model.parameters())
    return [n / whole for n in found]


deepspeed.init_distributed("gloo")
plain, evaluated = step_bytes(False), step_bytes(True)
if torch.distributed.get_rank() == 0:
    print("gathered in steps 1 to 4, in copies of the model:")
    print("  training alone        ", plain)
    print("  one evaluation forward", evaluated)
assert plain == [2.0, 1.0, 1.0, 1.0], f"changed: training alone gathers {plain}"
assert evaluated == [2.0] * 4, f"changed: after an evaluation forward {evaluated}"
torch.distributed.destroy_process_group()
PYTHON
"$work/venv/bin/torchrun" --standalone --nproc_per_node 2 "$work/train.py"
