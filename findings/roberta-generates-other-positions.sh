#!/usr/bin/env bash
# transformers: RoBERTa-like decoders generate at other positions than their forward uses.
#
# A good engineer would guess: greedy generate of one row without padding appends the argmax of
# the model's own forward, for every causal model.
# What happens: without position_ids the forward counts from pad_token_id + 1 (2 for
# RoBERTa), so also in training; generate passes position_ids that count from 0. Every token is
# generated from positions that are off by two, the first two of which the forward never uses.
# The cache has no part in it. No warning. BERT counts from 0 both times.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   first generated token's logits against the forward / the forward with positions from 0: bert
#   3e-06 / 3e-06, roberta 9e+00 / 2e-06, xlm-roberta 4e+00 / 2e-06
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, BertConfig, RobertaConfig, XLMRobertaConfig

ids = torch.arange(5, 15)[None]
from_forward, from_zero = {}, {}
for config_class, special in (
    (BertConfig, dict(pad_token_id=0)),
    (RobertaConfig, dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)),
    (XLMRobertaConfig, dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)),
):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        is_decoder=True,
        **special,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            use_cache=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        plain = model(input_ids=ids).logits[:, -1]
        zero = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits[:, -1]
    name = config_class.model_type
    from_forward[name] = (out.logits[0] - plain).abs().max().item()
    from_zero[name] = (out.logits[0] - zero).abs().max().item()

print(
    "first generated token's logits against the forward / the forward with positions from 0: "
    + ", ".join(f"{name} {from_forward[name]:.0e} / {from_zero[name]:.0e}" for name in from_zero)
)
assert max(from_zero.values()) < 1e-3, "changed: generate does not count positions from 0"
assert from_forward["bert"] < 1e-3, "changed: generate and forward of BERT differ"
for name in ("roberta", "xlm-roberta"):
    assert from_forward[name] > 0.1, f"changed: {name} generates as its forward computes"
PYTHON
