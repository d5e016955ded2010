#!/usr/bin/env bash
# peft: a PiSSA model with its adapter switched off is no model that anybody trained.
#
# A good engineer would guess: `with model.disable_adapter()` gives the model as it was before the
# adapter, the reference of DPO or self-distillation, whatever the adapter's initialisation.
# What happens: PiSSA moves the largest singular values out of the base weights into the adapter.
# With the adapter on, the new model is the original to rounding; with it off, the largest directions
# are missing. The same holds for OLoRA and others that move weights. No warning.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   largest difference of logits from the original: LoRA on 0e+00, off 0e+00; PiSSA on 3e-06, off
#   7e+00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def differences(initialisation):
    """How far a new adapter's model is from the original, switched on and switched off."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    base = LlamaForCausalLM(config).eval()
    ids = torch.arange(3, 12)[None]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        init_lora_weights=initialisation,
    )
    with torch.no_grad():
        original = base(input_ids=ids).logits
        model = get_peft_model(base, lora).eval()
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
    return [(x - original).abs().max().item() for x in (on, off)]


lora, pissa = differences(True), differences("pissa")
print(
    "largest difference of logits from the original: LoRA on {:.0e}, off {:.0e}; ".format(*lora)
    + "PiSSA on {:.0e}, off {:.0e}".format(*pissa)
)
assert max(lora) == 0, "changed: a new LoRA adapter changes the model"
assert pissa[0] < 1e-3, "changed: a new PiSSA adapter changes the model"
assert pissa[1] > 0.1, "changed: the model with PiSSA switched off is the original"
PYTHON
