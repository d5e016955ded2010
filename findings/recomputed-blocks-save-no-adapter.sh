#!/usr/bin/env bash
# peft: an adapter inside of blocks that torch recomputes for the backward is saved empty.
#
# A good engineer would guess: activation checkpointing changes memory and time, not what is saved.
# torch's checkpoint_wrapper even takes its own name out of the keys of a state dict.
# What happens: PEFT takes from the state dict the keys that begin with the names of its modules,
# and these do have the wrapper's name in them. None fits: adapter_model.safetensors is written
# without a tensor, no error, no warning. accelerate puts this wrapper around each layer where an
# FSDP config has activation_checkpointing, so the adapter that such a training saves is lost.
# Versions: peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU).
# Seen on 2026-12-01:
#   plain: 4 tensors of the adapter saved
#   blocks wrapped by torch: 0; keys of the state dict that name an adapter: 4
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 WORK="$work"
"$work/venv/bin/python" - <<'PYTHON'
import os
from pathlib import Path

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)
found = {}
for recomputes in (False, True):
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    if recomputes:
        apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
        )
    folder = Path(os.environ["WORK"]) / str(recomputes)
    model.save_pretrained(folder)
    found[recomputes] = len(load_file(folder / "adapter_model.safetensors"))
keys = [name for name in model.state_dict() if "lora_" in name]
print(f"plain: {found[False]} tensors of the adapter saved")
print(
    f"blocks wrapped by torch: {found[True]}; keys of the state dict that name an adapter: "
    f"{len(keys)}"
)
assert found[False] == 4, "changed: a plain adapter is saved otherwise"
assert not any("_checkpoint_wrapped" in name for name in keys), "changed: keys name the wrapper"
assert found[True] == 0, f"changed: {found[True]} tensors are saved from wrapped blocks"
PYTHON
