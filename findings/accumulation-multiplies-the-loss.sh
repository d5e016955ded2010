#!/usr/bin/env bash
# Transformers' Trainer: for many models gradient accumulation multiplies loss and gradient by its steps.
#
# A good engineer would guess: 8 rows in one batch and 4 micro-batches of 2 rows are the same step, up
# to how micro-batches of other lengths are weighed.
# What happens: forwards that take **kwargs are said to take the step's count of labels
# (`model_accepts_loss_kwargs`), so that Trainer leaves the division by the accumulation steps to them.
# T5, BART, Marian, Whisper and BERT's, RoBERTa's and DistilBERT's heads for masked tokens and for
# classes of tokens take it and ignore it: their loss is the mean of a micro-batch, and these means are
# added up. Loss, gradient and its norm (what is clipped) are 4 times as large with 4 accumulation
# steps. Llama and ModernBERT's masked LM divide by the count.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0.
# Seen on 2026-12-01, the logged loss with 4 micro-batches over that of one batch of the same rows:
#   LlamaForCausalLM 1.00, ModernBertForMaskedLM 1.00
#   T5ForConditionalGeneration 4.00, BartForConditionalGeneration 4.00
#   BertForMaskedLM 4.00, BertForTokenClassification 4.00
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
import transformers as hf
from transformers import Trainer, TrainingArguments

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN = SIZES | {"cls_token_id": 1, "sep_token_id": 2}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
BART |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = [
    (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES), 1),
    (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**MODERN), 1),
    (hf.T5ForConditionalGeneration, hf.T5Config(**T5, dropout_rate=0.0, decoder_start_token_id=0), 4),
    (hf.BartForConditionalGeneration, hf.BartConfig(**BART), 4),
    (hf.BertForMaskedLM, hf.BertConfig(**SIZES, **CALM), 4),
    (hf.BertForTokenClassification, hf.BertConfig(**SIZES, **CALM, num_labels=64), 4),
]
torch.manual_seed(0)
ROWS = [{"input_ids": x, "labels": x} for x in torch.randint(3, 64, (8, 12))]  # of one length


def loss(kind, config, rows, steps):
    torch.manual_seed(0)
    args = TrainingArguments(
        sys.argv[1], per_device_train_batch_size=rows, gradient_accumulation_steps=steps,
        max_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(kind(config), args, train_dataset=ROWS)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


for kind, config, times in CASES:
    found = loss(kind, config, 2, 4) / loss(kind, config, 8, 1)
    print(f"{kind.__name__}: {found:.2f}")
    assert abs(found - times) < 0.02, f"changed: {kind.__name__} {found}, not {times}"
PYTHON
"$work/venv/bin/python" "$work/run.py" "$work/out" 2> >(grep -v Warning >&2) | grep -v "^{"
