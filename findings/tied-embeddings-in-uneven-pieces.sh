#!/usr/bin/env bash
# transformers: tied embeddings that its own FSDP cuts in uneven pieces train to other weights.
#
# A good engineer would guess: DistributedConfig(fsdp_size=2) shards a model of any vocabulary, as
# torch's fully_shard pads uneven pieces; a model on two processes that see the same rows ends with
# the weights of one process.
# What happens: so it does, but for a model whose input embeddings are its output head and whose
# vocabulary the processes do not divide. Its weights are others after three steps, by a tenth, and
# nothing is said: losses go down as well. With a vocabulary that is divided, and with an uneven one
# whose embeddings are not tied, weights agree to rounding.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU, gloo, two processes).
# Seen on 2026-12-01, largest difference of a weight from one process:
#   vocabulary 63, two matrices: 0.0e+00
#   vocabulary 63, tied: 1.0e-01
#   vocabulary 64, tied: 0.0e+00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/models"
cat > "$work/train.py" <<'PYTHON'
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")


def saved(vocab, tied):
    """Return the folder of a model that the first process writes."""
    folder = Path(os.environ["FOLDER"]) / f"{vocab}-{tied}"
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    return folder


def train(folder, **given):
    """Return the whole weights after three steps on one row, which all processes have."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(3, 39, 3)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: x.detach() for name, x in model.named_parameters()}
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in weights.items()}


found = {}
for vocab, tied in ((63, False), (63, True), (64, True)):
    folder = saved(vocab, tied)
    alone = train(folder)
    cut = train(folder, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()))
    found[vocab, tied] = max((alone[name] - cut[name]).abs().max().item() for name in alone)
    if dist.get_rank() == 0:
        kind = "tied" if tied else "two matrices"
        print(f"vocabulary {vocab}, {kind}: {found[vocab, tied]:.1e}", flush=True)
assert found[63, False] < 1e-6, "changed: uneven pieces of two matrices train to other weights"
assert found[64, True] < 1e-6, "changed: even pieces of tied embeddings train to other weights"
assert found[63, True] > 1e-2, "changed: uneven pieces of tied embeddings train as one process"
dist.destroy_process_group()
PYTHON
"$work/venv/bin/torchrun" --standalone --nproc_per_node 2 "$work/train.py"
