#!/usr/bin/env bash
# transformers 5 and mlx-lm: a saved Llama, Mistral or Qwen2 runs with another rotary base.
#
# A good engineer would guess: mlx-lm loads a folder that save_pretrained wrote (mlx-lm itself
# depends on transformers 5) and computes the same logits, or says what it does not know.
# What happens: transformers 5 writes the rotary base into config.json as
# rope_parameters.rope_theta; mlx-lm's Llama and Qwen2 (Mistral runs as its Llama) read a
# rope_theta at the top level, do not find it and take their own default, 10,000 or, for
# Qwen2, 1,000,000. The model loads without a word and its logits are others. Qwen3 is right.
# Adding rope_theta to config.json by hand repairs it.
# A change was proposed: ml-explore/mlx-lm pull request 953.
# Versions: transformers 5.24.0, mlx-lm 0.32.2, mlx 0.32.4 (CPU), torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   largest difference of the logits, as saved / with rope_theta: llama 9e+00 / 2e-05, mistral
#   9e+00 / 1e-05, qwen2 6e+00 / 1e-05, qwen3 8e-06 / 8e-06
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 mlx-lm==0.32.2 'mlx[cpu]==0.32.4'
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/model"
"$work/venv/bin/python" - <<'PYTHON'
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

cases = [  # a base that is not mlx-lm's own default for the class
    (LlamaConfig, 500_000.0),
    (MistralConfig, 1_000_000.0),
    (Qwen2Config, 10_000.0),
    (Qwen3Config, 500_000.0),
]
ids = torch.arange(3, 43)[None]
as_saved, repaired = {}, {}
for config_class, base in cases:
    name = config_class.model_type
    folder = Path(os.environ["FOLDER"]) / name
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()

    def difference():
        other, _ = load_model(folder)
        return float(np.abs(np.array(other(mx.array(ids.numpy()))) - expected).max())

    as_saved[name] = difference()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": base}))
    repaired[name] = difference()

print(
    "largest difference of the logits, as saved / with rope_theta: "
    + ", ".join(f"{name} {as_saved[name]:.0e} / {repaired[name]:.0e}" for name in as_saved)
)
assert max(repaired.values()) < 1e-3, "changed: rope_theta at the top level does not repair it"
assert as_saved["qwen3"] < 1e-3, "changed: qwen3 is wrong as well"
for name in ("llama", "mistral", "qwen2"):
    assert as_saved[name] > 0.1, f"changed: {name} has its rotary base as saved"
PYTHON
