#!/usr/bin/env bash
# transformers: AutoTokenizer makes an empty tokenizer of a folder that has none.
#
# A good engineer would guess: AutoTokenizer.from_pretrained of a folder with a model but without
# any file of a tokenizer (model.save_pretrained was called, tokenizer.save_pretrained was
# forgotten) raises an error that says so, whatever the architecture.
# What happens: for Llama it raises a ValueError. For GPT-2, Qwen2 and Qwen3 it returns a
# tokenizer of one token which makes no ids at all of any text; for Gemma one of five that makes
# one unknown id of it. Nothing fails before the rows are looked at.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   error or (tokens, ids of a text): llama ValueError, gpt2 (1, []), qwen2 (1, []), qwen3 (1,
#   []), gemma (5, [3])
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/model"
"$work/venv/bin/python" - <<'PYTHON'
import os

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

shape = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
found = {}
for kind in ("llama", "gpt2", "qwen2", "qwen3", "gemma"):
    folder = os.path.join(os.environ["FOLDER"], kind)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    model.save_pretrained(folder)
    assert not [name for name in os.listdir(folder) if "token" in name or "vocab" in name]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        found[kind] = type(error).__name__
    else:
        found[kind] = (len(tokenizer), tokenizer("The same text for every model")["input_ids"])

print("error or (tokens, ids of a text): " + ", ".join(f"{k} {v}" for k, v in found.items()))
assert found["llama"] == "ValueError", "changed: llama has a tokenizer without files"
for kind in ("gpt2", "qwen2", "qwen3"):
    assert found[kind] == (1, []), f"changed: {kind} without files gives {found[kind]}"
assert found["gemma"] == (5, [3]), f"changed: gemma without files gives {found['gemma']}"
PYTHON
