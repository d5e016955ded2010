"""A small batch, and what a model says about its scored tokens."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill.data.sides import Side

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
PREDICTS = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]]).bool()
SIDE = Side({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, PREDICTS)
# one path through the model against another: two sums of the head's 32 products, whose sizes add up
# to 4, are 2 * 31 * 2^-24 * 4 apart at most, whatever their orders
ROUNDING = {"rtol": 0, "atol": 1.5e-5}
FAR = 1e-2  # what another teacher's logits differ by, at least


def prepared(teacher: Any, student: nn.Module, refusal: str | None = None) -> Any:
    teacher.prepare(Accelerator(cpu=True), student, refusal)
    return teacher


@torch.no_grad()
def scored_logits(model: nn.Module) -> Tensor:
    was_training = model.training
    logits = model.eval()(input_ids=IDS).logits[PREDICTS]
    model.train(was_training)
    return logits


def step(model: nn.Module, seed: int = 0) -> None:
    """Stands for an optimizer step: every trainable weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
