#!/usr/bin/env bash
# transformers: in training, output_attentions gives maps that dropout has already been over.
#
# A good engineer would guess: output_attentions returns the softmax, rows that sum to 1, as the
# documentation says ("Attentions weights after the attention softmax").
# What happens: eager attention returns them after attention dropout. In training mode with GPT-2's
# default attn_pdrop of 0.1 some entries are 0, the others are larger by 1 / 0.9, and a row sums to
# anything from 0 to 1.11. A loss that compares the maps of two equal models is then not 0, and the
# logarithm of a map has infinite entries.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   sums of the rows of a map: 1.00 to 1.00 in eval mode, 0.00 to 1.11 in training mode
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=64,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)
model = GPT2LMHeadModel(config)
ids = torch.randint(3, 64, (2, 10))
found = {}
for training in (False, True):
    model.train(training)
    with torch.no_grad():
        sums = model(input_ids=ids, output_attentions=True).attentions[0].sum(-1)
    found[training] = sums.min().item(), sums.max().item()
print(
    "sums of the rows of a map: {:.2f} to {:.2f} in eval mode, ".format(*found[False])
    + "{:.2f} to {:.2f} in training mode".format(*found[True])
)
assert max(abs(x - 1) for x in found[False]) < 1e-5, "changed: maps do not sum to 1 in eval mode"
assert found[True][0] < 0.9, "changed: maps sum to 1 in training mode too"
PYTHON
