"""CPU seconds of a step of self-distillation with a frozen vision tower, run once or for each side.

The model has the sizes of SmolVLM-256M, and random weights. Run
`python -m tests.benchmarks.image_tower`.
"""

import tempfile
import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, Idefics3Config

from hf_distill import DistillConfig, DistillTrainer, SelfTeacher

SIDE, NUM_TOKENS, NUM_TEXT, IMAGE, VOCAB = 512, 64, 64, 5, 49280
ROWS, STEPS = 1, 6
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": SIDE,
    "patch_size": 16,
}


def batch() -> dict[str, torch.Tensor]:
    """Rows of an image and a text."""
    text = torch.randint(10, VOCAB, (ROWS, NUM_TEXT))
    ids = torch.cat([torch.full((ROWS, NUM_TOKENS), IMAGE), text], dim=1)
    labels = ids.masked_fill(ids == IMAGE, -100)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return made | {"pixel_values": torch.randn(ROWS, 1, 3, SIDE, SIDE)}


def trainer(folder: str) -> Any:
    """A trainer of adapters on the language model."""
    config = Idefics3Config(
        text_config=TEXT, vision_config=TOWER, image_token_id=IMAGE, scale_factor=4, pad_token_id=0
    )
    lm = AutoModelForImageTextToText.from_config(config)
    adapted = get_peft_model(lm, LoraConfig(r=8, target_modules=r".*text_model.*_proj"))
    args = DistillConfig(folder, report_to="none", use_cpu=True)
    return DistillTrainer(adapted, args, lambda _: batch(), [{}], teacher=SelfTeacher("base"))


def main() -> None:
    """Print the CPU seconds of a step, and their ratio."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made, seconds = trainer(folder), {True: [], False: []}
        images, given = made._images, batch()
        for _ in range(STEPS):
            for shares in (True, False):
                made._images = images if shares else None
                start = time.process_time()
                made.training_step(made.model, dict(given))
                seconds[shares].append(time.process_time() - start)
    once, twice = (median(seconds[x][1:]) for x in (True, False))
    print(f"run once {once:.3f} s, for each side {twice:.3f} s: {once / twice:.2f} of the time")


if __name__ == "__main__":
    main()
