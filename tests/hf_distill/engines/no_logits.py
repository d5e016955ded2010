"""Trainings in which logits of more tokens than a chunk's must never exist."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_distill import DistillConfig, DistillTrainer
from metal_ops.backends.blocks import linear, split
from metal_ops.backends.blocks.rows import NUM_BUFFERS
from tests.hf_distill.engines.exchanged import everywhere
from tests.hf_distill.engines.setups import WIDE, Place, llama
from tests.hf_distill.trainers import models, own_losses

VOCAB = WIDE["vocab_size"]
CHUNK = 4  # tokens whose logits may exist at a time, in as many tensors as a block has buffers
IN_ROWS = ("fsdp2-shard", "tp")  # engines under which each process has some rows of the heads


class NoLogits(TorchDispatchMode):
    """Fails where logits of more tokens are made than a chunk has, or a head is made whole.

    Args:
        width: entries of the vocabulary that a process has.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape[-1:] == (self.width,):
            of_head = made.shape[-2:-1] == (WIDE["hidden_size"],)  # its weight, transposed
            if made.numel() // self.width > CHUNK * NUM_BUFFERS and not of_head:
                raise AssertionError(f"{func} made logits {list(made.shape)}")
        if self.width != VOCAB:
            found = [x for x in tree_leaves((args, made)) if isinstance(x, torch.Tensor)]
            plain = [x for x in found if not isinstance(x, DTensor) and x.shape[:1] == (VOCAB,)]
            if any(x.numel() > VOCAB for x in plain):
                raise AssertionError(f"{func} has a whole head")
        return made


class WithoutLogits(DistillTrainer):
    """Trains under `NoLogits` once the first batch was looked at, whose probes read a few."""

    watch: Any

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._looked:
            return super().compute_loss(model, *args, **kwargs)
        with everywhere(self.watch):
            return super().compute_loss(model, *args, **kwargs)


def without_logits(place: Place, **changes: Any) -> str:
    """Train a few steps; what was made that must not be, or nothing."""
    loss = changes.pop("loss", None)
    args = DistillConfig(**place.options(**changes))
    # untied embeddings are a module of the engine's like others
    tied = {"tie_word_embeddings": place.engine == "fsdp2-shard"}
    rows, teacher = models.rows(48, longest=24), place.loaded(llama(1, **tied), "teacher")
    student = place.loaded(llama(**tied), "student")
    trainer = WithoutLogits(student, args, models.Pad(), rows, teacher=teacher, loss=loss)
    parts = place.num_processes if place.engine in IN_ROWS else 1
    trainer.watch = NoLogits(-(-VOCAB // parts))
    try:
        trainer.train()
    except AssertionError as error:
        return str(error)
    return ""


def in_chunks(place: Place) -> list[str]:
    """What was made that must not be; and where logits are asked for, and for a loss of one's own.

    The latter two so that the check can fail. Teacher and student are both looked at.
    """
    before = linear.tokens_per_chunk
    linear.tokens_per_chunk = split.tokens_per_chunk = lambda *_: CHUNK
    try:
        found = [without_logits(place), without_logits(place, label_smoothing_factor=0.1)]
        return [*found, without_logits(place, loss=own_losses.Measuring())]
    finally:
        linear.tokens_per_chunk = split.tokens_per_chunk = before
