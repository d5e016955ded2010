"""Supervised training of a fresh tiny model, so that it can read hints: the start of the demos."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from tqdm import tqdm

IGNORED_LABEL = -100

Example = tuple[Sequence[int], Sequence[int]]  # ids, and labels of the same length


def fit(
    model: nn.Module,
    examples: Iterator[Example],
    *,
    steps: int,
    batch_size: int,
    pad_token_id: int,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> None:
    """Train a causal LM, in place, on the cross-entropy of the labels.

    Args:
        model: left in the training or evaluation mode it came in.
        examples: an endless source.
        steps: optimizer steps, at least 1.
        batch_size: examples in a step, at least 1.
        pad_token_id: for the right.
        learning_rate: of AdamW, after 50 steps of warm-up; it falls linearly to a tenth.
        progress: whether to show a progress bar.

    Raises:
        ValueError: `steps` or `batch_size` is below 1.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.1, 1 - step / steps)
    )
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    bar = tqdm(range(steps), desc="warm-up", disable=not progress)
    for step in bar:
        batch = [next(examples) for _ in range(batch_size)]
        input_ids, labels = _right_pad(batch, pad_token_id)
        # Padding lies on the right, so causal attention needs no mask to keep real tokens from it.
        loss = model(input_ids=input_ids.to(device), labels=labels.to(device), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.zero_grad(set_to_none=True)
    model.train(was_training)


def _right_pad(batch: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns input ids and labels, both (batch, longest)."""
    longest = max(len(ids) for ids, _ in batch)
    input_ids = torch.full((len(batch), longest), pad_id)
    padded_labels = torch.full((len(batch), longest), IGNORED_LABEL)
    for row, (ids, labels) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        padded_labels[row, : len(ids)] = torch.tensor(labels)
    return input_ids, padded_labels
