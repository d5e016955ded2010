#!/usr/bin/env bash
# transformers: from_config(config, dtype=...) writes the dtype into the config it was given.
#
# A good engineer would guess: the argument is for this one model, and the caller's config stays as
# it is, so that a student and its teacher can be made of one config in two dtypes.
# What happens: config.dtype is the argument's from then on. The next model of the same object,
# made without an argument, has that dtype too, and a folder that the config is saved to says it:
# models are loaded from there in 16 bits.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   config.dtype None, then torch.bfloat16; the second model, asked for nothing: torch.bfloat16;
#   the saved config: bfloat16
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 WORK="$work"
"$work/venv/bin/python" - <<'PYTHON'
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
)
before = config.dtype
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
after = config.dtype
second = AutoModelForCausalLM.from_config(config).dtype
folder = Path(os.environ["WORK"]) / "saved"
config.save_pretrained(folder)
saved = json.loads((folder / "config.json").read_text()).get("dtype")
print(
    f"config.dtype {before}, then {after}; the second model, asked for nothing: {second}; "
    f"the saved config: {saved}"
)
assert before is None, "changed: a new config has a dtype"
assert after == torch.bfloat16, "changed: the caller's config stays as it was"
assert second == torch.bfloat16, "changed: the second model has a dtype of its own"
assert saved == "bfloat16", "changed: the saved config does not say it"
PYTHON
