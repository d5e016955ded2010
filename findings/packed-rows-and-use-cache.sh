#!/usr/bin/env bash
# transformers: packed rows are kept apart only where the forward makes no key-value cache.
#
# A good engineer would guess: a batch of DataCollatorWithFlattening (rows one after another,
# position_ids that start again at 0) has the logits of its rows alone, or it has not, but
# use_cache changes only what is returned besides the logits.
# What happens: the mask between rows is made from position_ids if there is no cache.
# use_cache is True in a config, so model(**batch) makes one, the mask stays causal over the
# whole batch and rows read those before them. No warning. Trainer writes
# config.use_cache = False into the model, so the same model gives the same batch other logits
# before a Trainer was made of it than afterwards.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   logits of packed rows against the rows alone: model(**batch) 7e+00, with use_cache=False
#   4e-06, after a Trainer was made 4e-06
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FOLDER="$work/run"
"$work/venv/bin/python" - <<'PYTHON'
import os

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM
from transformers import Trainer, TrainingArguments

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
rows = [torch.randint(3, 64, (length,)).tolist() for length in (9, 14, 6)]
batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row} for row in rows])

starts = [0, 9, 23]


def difference(**arguments):
    """The largest difference of packed rows' logits from those of the rows alone."""
    packed = model(**batch, **arguments).logits[0]
    return max(
        (packed[start : start + len(row)] - model(input_ids=torch.tensor([row])).logits[0])
        .abs()
        .max()
        .item()
        for start, row in zip(starts, rows)
    )


with torch.no_grad():
    packed = difference()
    without_cache = difference(use_cache=False)
    Trainer(model, TrainingArguments(os.environ["FOLDER"], use_cpu=True, report_to=[]))
    after_trainer = difference()

print(
    f"logits of packed rows against the rows alone: model(**batch) {packed:.0e}, with "
    f"use_cache=False {without_cache:.0e}, after a Trainer was made {after_trainer:.0e}"
)
assert without_cache < 1e-3, "changed: without a cache packed rows are not apart"
assert packed > 0.1, "changed: with a cache packed rows are apart as well"
assert after_trainer < 1e-3, "changed: a Trainer leaves the model's use_cache on"
PYTHON
