#!/usr/bin/env bash
# accelerate: Trainer with fsdp=True and use_cpu=True shards nothing and does not say so.
#
# A good engineer would guess: two CPU processes try FSDP out before the GPUs are paid for (torch
# shards on CPU with gloo), or the combination is refused as one that is not supported.
# What happens: with a CPU accelerate takes the kind of run to be MULTI_CPU before it looks at
# FSDP. The Trainer wraps the model in DistributedDataParallel, every process keeps all
# parameters, the training ends well, and no line says that fsdp was set aside (the one trace is
# DDP's own warning about find_unused_parameters). What such a run tests (checkpoints, an own
# loss, memory) says nothing about FSDP. torch's own fully_shard shards the same model in the
# same processes.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU, gloo, two processes).
# Seen on 2026-11-30:
#   of 22688 parameters: fsdp=True, use_cpu=True: DistributedDataParallel, 22688 in each process;
#   torch's fully_shard: 11344
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/run"
cat > "$work/train.py" <<'PYTHON'
import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def held(model):
    """The numbers that this process holds of all parameters."""
    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(parameter.numel() for parameter in parameters)


torch.manual_seed(0)
model = LlamaForCausalLM(config)
whole = held(model)
row = list(range(3, 20))
arguments = TrainingArguments(
    os.environ["FOLDER"],
    fsdp=True,
    fsdp_config={"fsdp_version": 2},
    use_cpu=True,
    per_device_train_batch_size=1,
    max_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 4)
trainer.train()
wrapper = type(trainer.model_wrapped).__name__
trained = held(trainer.model_wrapped)

sharded = LlamaForCausalLM(config)
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
by_torch = held(sharded)

if trainer.is_world_process_zero():
    print(
        f"of {whole} parameters: fsdp=True, use_cpu=True: {wrapper}, {trained} in each process; "
        f"torch's fully_shard: {by_torch}"
    )
assert by_torch == whole // 2, "changed: torch does not shard on CPU"
assert wrapper == "DistributedDataParallel", f"changed: fsdp with use_cpu is a {wrapper}"
assert trained == whole, "changed: fsdp with use_cpu shards the parameters"
torch.distributed.destroy_process_group()
PYTHON
"$work/venv/bin/torchrun" --standalone --nproc_per_node 2 "$work/train.py"
