#!/usr/bin/env bash
# transformers: one config field, logits_scaling, has two opposite meanings.
#
# A good engineer would guess: a config's logits_scaling does the same in every model that has it.
# What happens: Granite divides its logits by it, HyperCLOVA X multiplies them. Code that applies
# the head by itself (fused losses, servers, converters) and goes by the field's name is wrong for
# one of them, by the square of the value.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   logits with logits_scaling 4 / logits with 1: GraniteForCausalLM 0.25, HyperCLOVAXForCausalLM 4.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers import GraniteConfig, GraniteForCausalLM
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM


def logits(config_class, model_class, scaling):
    """The logits of one row, of the same weights for every scaling."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=scaling,
    )
    with torch.no_grad():
        return model_class(config).eval()(input_ids=torch.arange(3, 12)[None]).logits


KINDS = (GraniteConfig, GraniteForCausalLM), (HyperCLOVAXConfig, HyperCLOVAXForCausalLM)
found = {
    kind[1].__name__: (logits(*kind, 4.0) / logits(*kind, 1.0)).median().item() for kind in KINDS
}
listed = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
print(f"logits with logits_scaling 4 / logits with 1: {listed}")
assert abs(found["GraniteForCausalLM"] - 0.25) < 1e-4, "changed: Granite does not divide"
assert abs(found["HyperCLOVAXForCausalLM"] - 4) < 1e-4, "changed: HyperCLOVA X does not multiply"
PYTHON
