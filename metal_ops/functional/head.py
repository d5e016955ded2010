"""Describes the output head of a model, which makes logits of its hidden states."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


@dataclass(frozen=True)
class Head:
    """Makes logits of hidden states: softcap * tanh(scale * linear(hidden) / softcap).

    Args:
        weight: [vocab, hidden].
        bias: [vocab] or None.
        logit_scale: multiplies the logits (Cohere, Granite).
        softcap: if set, logits become softcap * tanh(logits / softcap), after the scale (Gemma).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def first(self, size: int) -> "Head":
        """Return the head of the first `size` entries of the vocabulary; its tensors are views."""
        whole = self.gathered()
        bias = None if whole.bias is None else whole.bias[:size]
        return replace(whole, weight=whole.weight[:size], bias=bias)

    def gathered(self) -> "Head":
        """Return the head with whole tensors in place of DTensors, see `gather_shards`."""
        bias = None if self.bias is None else gather_shards(self.bias)
        return Head(gather_shards(self.weight), bias, self.logit_scale, self.softcap)

    def same_as(self, other: "Head") -> bool:
        """Say whether both are one head: the very same tensors, one scale, one softcap."""
        same = self.weight is other.weight and self.bias is other.bias
        return same and (self.logit_scale, self.softcap) == (other.logit_scale, other.softcap)


def is_dtensor(x: Tensor) -> "TypeIs[DTensor]":
    """Return whether a tensor lies on several processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow, and seldom used

    return isinstance(x, DTensor)


def gather_shards(x: Tensor) -> Tensor:
    """Gather a DTensor, whose gradient is then averaged over the mesh; leave any other tensor.

    Under data parallelism (FSDP) every rank has tokens of its own and the average is the
    convention; where all ranks hold the same tokens (tensor parallelism) their gradients agree.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial  # noqa: PLC0415 - slow, and seldom used

    mesh = x.device_mesh
    full = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())  # gloo has no average of its own
    return full
