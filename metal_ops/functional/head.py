"""Describes the output head of a model, which makes logits of its hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
        entries: of the vocabulary that count, the first; None is all. It stands for a cut of
            weights that lie on several processes (DTensor).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    entries: int | None = None

    @property
    def vocab(self) -> int:
        """The number of entries that count."""
        size = self.weight.shape[0]
        return size if self.entries is None else min(size, self.entries)

    def first(self, size: int) -> "Head":
        """Return the head of the first `size` entries of the vocabulary; its tensors are views."""
        if is_dtensor(self.weight):
            return replace(self, entries=min(size, self.vocab))
        bias = None if self.bias is None else self.bias[:size]
        return replace(self, weight=self.weight[:size], bias=bias)

    def gathered(self) -> "Head":
        """Return the head with whole tensors in place of DTensors, see `gather_shards`."""
        bias = None if self.bias is None else gather_shards(self.bias)
        whole = Head(gather_shards(self.weight), bias, self.logit_scale, self.softcap)
        return whole if self.entries is None else whole.first(self.entries)

    def own_rows(self, like: "Head | None" = None) -> "OwnRows | None":
        """Return this process's rows, if the head is cut by rows over one axis of a mesh.

        Args:
            like: a head that is cut so; this one may then be whole.

        Returns:
            The rows as a head, which of all rows they are, and the process group; or None if
            neither head is a DTensor, or it is cut in another way.
        """
        cut = self.weight if is_dtensor(self.weight) else like and like.weight
        if cut is None or not is_dtensor(cut):
            return None
        from torch.distributed.tensor import Shard  # noqa: PLC0415 - slow, and seldom used

        if cut.device_mesh.ndim != 1 or tuple(cut.placements) != (Shard(0),):
            return None
        rows = _rows_of(cut, self.vocab)
        weight, bias = (None if x is None else _own(x, rows) for x in (self.weight, self.bias))
        assert weight is not None
        head = Head(weight, bias, self.logit_scale, self.softcap)
        return OwnRows(head, rows, cut.device_mesh.get_group())

    def same_as(self, other: "Head") -> bool:
        """Say whether both are one head: the very same tensors, one scale, one softcap."""
        same = self.weight is other.weight and self.bias is other.bias
        settings = [(x.logit_scale, x.softcap, x.vocab) for x in (self, other)]
        return same and settings[0] == settings[1]


class OwnRows(NamedTuple):
    """Holds one process's rows of a head, which ones they are, and the processes."""

    head: Head
    rows: slice
    group: Any


def _rows_of(cut: "DTensor", vocab: int) -> slice:
    """Return which of the first `vocab` rows this process has; as torch.chunk, maybe none."""
    mesh = cut.device_mesh
    step = -(-cut.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * step, vocab)
    return slice(first, min(first + step, vocab))


_LOCALS: dict[int, Tensor] = {}  # by the id of a DTensor


def _local(x: "DTensor") -> Tensor:
    return x.to_local(grad_placements=x.placements)


@contextmanager
def one_local(x: Tensor) -> Iterator[None]:
    """Inside the block every `Head.own_rows` hands out the same tensor for a DTensor.

    Its gradients are then added up in place. Those of a DTensor are not, which takes the memory of
    one more.
    """
    if not is_dtensor(x) or id(x) in _LOCALS:
        yield
        return
    _LOCALS[id(x)] = _local(x)
    try:
        yield
    finally:
        del _LOCALS[id(x)]


def _own(x: Tensor, rows: slice) -> Tensor:
    if not is_dtensor(x):
        return x[rows]
    local = _LOCALS.get(id(x))
    local = _local(x) if local is None else local
    return local if len(local) == rows.stop - rows.start else local[: rows.stop - rows.start]


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
