"""The precision in which a teacher computes, where a run trains with autocast (bf16, fp16).

The trainer asks every teacher under the student's autocast, in which its head is multiplied too. A
model that was loaded in 16 bits or quantized has its precision from whoever loaded it: its forward
leaves autocast, unless the student was loaded in the same way.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_distill.models.structure import in_pieces


class Stored(NamedTuple):
    """Says how a model's weights are stored.

    dtype: the one that has the most elements, of quantized weights an integer's, say. quantized:
    whether Transformers says so, or weights are of a subclass of tensors, as those of torchao are.
    """

    dtype: torch.dtype
    quantized: bool

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, quantized" if self.quantized else name


def stored(model: nn.Module) -> Stored:
    """Return how the weights of a model are stored; of one without parameters as float32."""
    sizes: Counter[torch.dtype] = Counter()
    quantized = bool(getattr(model, "is_quantized", False))
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
        quantized |= _is_packed(parameter.data)
    return Stored(sizes.most_common(1)[0][0] if sizes else torch.float32, quantized)


def _is_packed(value: Tensor) -> bool:
    return is_traceable_wrapper_subclass(value) and not in_pieces(value)


def follows_autocast(teacher: nn.Module, student: nn.Module) -> bool:
    """Return whether a teacher computes under the student's autocast, not as it was loaded.

    Args:
        teacher: without wrappers.
        student: without wrappers.
    """
    theirs = stored(teacher)
    return theirs == Stored(torch.float32, False) or theirs == stored(student)


@contextmanager
def weights_replaced() -> Iterator[None]:
    """Inside the block trained weights may have other values, also under autocast.

    An autocast around student and teacher keeps its 16-bit copies of trained weights until its end.
    Those of the block must not be those from before it, and the student must not get them after it.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
