#!/usr/bin/env bash
# transformers: gradient accumulation multiplies a mixture's router loss.
#
# A good engineer would guess: since the loss is divided by the tokens of the whole optimizer step,
# one batch of 8 rows and 8 micro-batches of one row give the same update.
# What happens: only the cross-entropy is divided by the count. The model adds
# router_aux_loss_coef * aux_loss to the loss of every micro-batch, whole, and Trainer divides
# nothing more because the model takes num_items_in_batch. With 8 micro-batches the coefficient is 8
# times what the config says, in the gradient and in the logged loss. No warning.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU).
# Seen on 2026-11-30:
#   the router's step, 8 micro-batches against one batch: length x 1.00 with
#   router_aux_loss_coef 0, x 16.50 with 1; the logged loss 6.17 and 20.24
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
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers import default_data_collator

generator = torch.Generator().manual_seed(1)
ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(3, 64, (8, 12), generator=generator).tolist()
]


def step(rows_at_once, coefficient):
    """How far one SGD step on all eight rows moves the routers, and the logged loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
    )
    model = MixtralForCausalLM(config)
    routers = {n: p.detach().clone() for n, p in model.named_parameters() if "gate" in n}
    arguments = TrainingArguments(
        os.environ["FOLDER"],
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=len(ROWS) // rows_at_once,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, default_data_collator, ROWS)
    trainer.train()
    parameters = dict(model.named_parameters())
    moved = torch.cat([(parameters[n] - p).detach().flatten() for n, p in routers.items()])
    return moved.norm().item(), trainer.state.log_history[0]["loss"]


found = {c: (step(1, c)[0] / step(8, c)[0], step(8, c)[1], step(1, c)[1]) for c in (0.0, 1.0)}
print(
    "the router's step, 8 micro-batches against one batch: length x "
    f"{found[0.0][0]:.2f} with router_aux_loss_coef 0, x {found[1.0][0]:.2f} with 1; "
    f"the logged loss {found[1.0][1]:.2f} and {found[1.0][2]:.2f}"
)
assert abs(found[0.0][0] - 1) < 1e-3, "changed: the cross-entropy depends on accumulation"
assert found[1.0][0] > 4, "changed: the router loss no longer grows with accumulation"
assert found[1.0][2] > 2 * found[1.0][1], "changed: the logged loss is that of one batch"
PYTHON
