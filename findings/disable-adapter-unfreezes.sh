#!/usr/bin/env bash
# PEFT: a frozen adapter is trainable after `with model.disable_adapter()`.
#
# A good engineer would guess: the context manager leaves the model as it found it. An adapter
# that PeftModel.from_pretrained loaded for inference (is_trainable=False, every parameter
# frozen) is still frozen when the context ends, and so is one that requires_grad_(False) froze.
# What happens: when the context ends, requires_grad is True for all parameters of the active
# adapter, whatever it was before. A frozen teacher, compared once with its base model,
# collects gradients from then on, and an optimizer made afterwards trains it. No warning.
# Reported: huggingface/peft issue 3447.
# Versions: peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   trainable tensors: loaded 0, after disable_adapter 8 (with gradients: 8);
#   requires_grad_(False) 0, after disable_adapter 8
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/adapter"
"$work/venv/bin/python" - <<'PYTHON'
import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
base = LlamaForCausalLM(config)
state = {name: value.clone() for name, value in base.state_dict().items()}
lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
get_peft_model(base, lora).save_pretrained(os.environ["FOLDER"])


def trainable(model):
    return sum(parameter.requires_grad for parameter in model.parameters())


fresh = LlamaForCausalLM(config)
fresh.load_state_dict(state)
loaded = PeftModel.from_pretrained(fresh, os.environ["FOLDER"])
ids = torch.arange(3, 20)[None]
counts = [trainable(loaded)]
with torch.no_grad(), loaded.disable_adapter():
    loaded(input_ids=ids)
counts.append(trainable(loaded))
loaded(input_ids=ids, labels=ids).loss.backward()
gradients = sum(parameter.grad is not None for parameter in loaded.parameters())

loaded.requires_grad_(False)
counts.append(trainable(loaded))
with loaded.disable_adapter():
    pass
counts.append(trainable(loaded))

print(
    f"trainable tensors: loaded {counts[0]}, after disable_adapter {counts[1]} "
    f"(with gradients: {gradients}); requires_grad_(False) {counts[2]}, "
    f"after disable_adapter {counts[3]}"
)
assert counts[0] == 0 and counts[2] == 0, "changed: the adapter was not frozen to begin with"
assert counts[1] == 8 and gradients == 8, "changed: an adapter loaded for inference stays frozen"
assert counts[3] == 8, "changed: an adapter frozen by hand stays frozen"
PYTHON
