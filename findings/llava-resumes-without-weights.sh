#!/usr/bin/env bash
# Transformers' Trainer: a training of LLaVA that is resumed goes on without the checkpoint's weights.
#
# A good engineer would guess: resume_from_checkpoint loads the weights that the same Trainer has saved.
# What happens: save_pretrained writes LLaVA's weights under the names of older releases
# ("language_model.model. ..." for "model.language_model. ..."), which from_pretrained renames. Trainer
# loads a checkpoint by load_state_dict with strict=False: no name fits, a warning lists them, and the
# training goes on from whatever weights the model has, with the optimizer's states of the checkpoint.
# Llama's names are the same in memory and in the file.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0.
# Seen on 2026-12-01:
#   LlamaForCausalLM: 0 of 9 parameters differ from the checkpoint after resuming
#   LlavaForConditionalGeneration: 20 of 20 parameters differ from the checkpoint after resuming
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet numpy==2.3.5 accelerate==1.15.0 transformers==5.24.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cat > "$work/run.py" <<'PYTHON'
import sys

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

TEXT = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, pad_token_id=0,
)
VISION = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4,
)
LLAVA = LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_index=63)
ROWS = [{"input_ids": x, "labels": x} for x in torch.randint(3, 60, (8, 12))]


def made(kind, config, seed):
    torch.manual_seed(seed)
    return kind(config)


def trainer(kind, config, seed, folder, steps):
    args = TrainingArguments(
        folder, max_steps=steps, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=0.0,
    )
    return Trainer(made(kind, config, seed), args, train_dataset=ROWS)


for kind, config, differ in ((LlamaForCausalLM, TEXT, False), (LlavaForConditionalGeneration, LLAVA, True)):
    folder = f"{sys.argv[1]}/{kind.__name__}"
    first = trainer(kind, config, 0, folder, 1)
    first.train()
    again = trainer(kind, config, 1, folder, 2)  # other weights, which the checkpoint is to replace
    again.train(resume_from_checkpoint=True)
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    random = [(p, q) for p, q in pairs if p.unique().numel() > 2]  # not norms and biases
    count = sum(not torch.equal(p, q) for p, q in random)
    print(f"{kind.__name__}: {count} of {len(random)} parameters differ from the checkpoint after resuming")
    assert count == (len(random) if differ else 0), f"changed: {kind.__name__}"
PYTHON
"$work/venv/bin/python" "$work/run.py" "$work/out" 2> >(grep -v Warning >&2) | grep -v "^{"
