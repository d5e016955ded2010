#!/usr/bin/env bash
# transformers: Trainer divides GPT-2's loss by labels that the loss does not score.
#
# A good engineer would guess: Trainer's eval_loss of a causal LM on one batch is the loss that the
# model itself gives for that batch.
# What happens: Trainer leaves out each row's first label, which nothing predicts, only for models
# whose class name says ForCausalLM. GPT2LMHeadModel (also BertLMHeadModel,
# OpenAIGPTLMHeadModel) is not one of them, so the sum is divided by one label per row too many: rows
# of 5 tokens give 4 / 5 of the loss, in training (gradients too) and in evaluation. The perplexity
# of scripts that take exp(eval_loss) is too low. Llama is right.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   eval_loss / the model's own loss, rows of 5 tokens: GPT2LMHeadModel 0.80, LlamaForCausalLM 1.00
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import Trainer, TrainingArguments, default_data_collator

ids = torch.randint(3, 64, (4, 5), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in ids.tolist()]


def ratio(model):
    """Trainer's eval_loss of one batch divided by the model's own loss of it."""
    arguments = TrainingArguments(
        os.environ["FOLDER"], use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, arguments, default_data_collator, eval_dataset=ROWS)
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        return found / model.eval()(input_ids=ids, labels=ids).loss.item()


torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(
    GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
)
llama = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
)
found = {type(model).__name__: ratio(model) for model in (gpt2, llama)}
listed = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
print(f"eval_loss / the model's own loss, rows of 5 tokens: {listed}")
assert abs(found["LlamaForCausalLM"] - 1) < 1e-4, "changed: Llama's eval_loss is not its loss"
assert abs(found["GPT2LMHeadModel"] - 0.8) < 1e-4, "changed: GPT-2's eval_loss is another"
PYTHON
