#!/usr/bin/env bash
# transformers: DataCollatorWithFlattening keeps the rows of some models apart, and not of others.
#
# A good engineer would guess: the collator that packs rows into one sequence works with every causal
# LM of the library, or says which it does not work with.
# What happens: rows are kept apart by models whose attention mask is made from position_ids (Llama,
# Qwen2, GPT-2, ...). OPT and BLOOM make theirs from the attention mask alone, which such a batch
# does not have: each row reads those before it, without a word, in training and in evaluation.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-12-01, two rows in one sequence, a token of the first is changed:
#   Llama: the second row moves by 0.00 of its largest logit
#   OPT: the second row moves by 0.34 of its largest logit
#   BLOOM: the second row moves by 0.36 of its largest logit
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DataCollatorWithFlattening,
    LlamaConfig,
    OPTConfig,
)

sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
configs = {
    "Llama": LlamaConfig(**sizes, intermediate_size=48, num_hidden_layers=2),
    "OPT": OPTConfig(**sizes, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32),
    "BLOOM": BloomConfig(vocab_size=64, hidden_size=32, n_head=4, n_layer=2),
}
first, second = [5, 6, 7, 8, 9], [10, 11, 12, 13]
collator = DataCollatorWithFlattening()
moved = {}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)  # so that attention is not flat, as in a trained model
        said = []
        for row in (first, [5, 40, 7, 8, 9]):
            batch = collator([{"input_ids": row}, {"input_ids": second}])
            batch.pop("labels")
            said.append(model(**batch, use_cache=False).logits[0, len(first) :])
    moved[name] = float((said[0] - said[1]).abs().max() / said[0].abs().max())
    print(f"{name}: the second row moves by {moved[name]:.2f} of its largest logit")
assert moved["Llama"] == 0.0, "changed: Llama's rows see each other"
for name in ("OPT", "BLOOM"):
    assert moved[name] > 0.1, f"changed: {name}'s rows are apart"
PYTHON
