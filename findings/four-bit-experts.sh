#!/usr/bin/env bash
# bitsandbytes in transformers 5: load_in_4bit leaves the experts of a mixture in 16 bits.
#
# A good engineer would guess: load_in_4bit makes a quarter of the weights of a mixture of
# experts, as of a dense model: all linear layers but the head, so above all the experts, which
# are most of the model and three nn.Linear each in transformers 4.
# What happens: transformers 5 holds the experts of a layer as two 3D parameters, which
# are no nn.Linear; bitsandbytes replaces nn.Linear only. Attention becomes 4 bit, the experts
# stay bfloat16, the model keeps more than nine tenths of its size. No warning or error.
# Reported: bitsandbytes-foundation/bitsandbytes issue 1849.
# Versions: transformers 5.24.0, bitsandbytes 0.50.2, accelerate 1.15.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   dense Qwen3: 33% of the bytes, ['torch.uint8']; Qwen3 MoE: 92% of the bytes,
#   ['torch.bfloat16', 'torch.uint8']; Mixtral: 96% of the bytes, ['torch.bfloat16',
#   'torch.uint8']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/model"
"$work/venv/bin/python" - <<'PYTHON'
import os

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers import MixtralConfig, Qwen3Config, Qwen3MoeConfig

shape = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
configs = {
    "dense Qwen3": Qwen3Config(**shape),
    "Qwen3 MoE": Qwen3MoeConfig(
        **shape, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "Mixtral": MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=2),
}
kept, dtypes = {}, {}
for name, config in configs.items():
    folder = os.path.join(os.environ["FOLDER"], name)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    four_bit = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    kept[name] = four_bit.get_memory_footprint() / model.get_memory_footprint()
    dtypes[name] = {
        str(parameter.dtype)
        for path, parameter in four_bit.named_parameters()
        if ".experts." in path or path.endswith("q_proj.weight")
    }

print("; ".join(f"{name}: {kept[name]:.0%} of the bytes, {sorted(dtypes[name])}" for name in kept))
assert kept["dense Qwen3"] < 0.5, "changed: a dense model is not made small either"
for name in ("Qwen3 MoE", "Mixtral"):
    assert dtypes[name] == {"torch.uint8", "torch.bfloat16"}, f"changed: {name}: {dtypes[name]}"
    assert kept[name] > 0.9, f"changed: the experts of {name} are quantised: {kept[name]:.0%}"
PYTHON
