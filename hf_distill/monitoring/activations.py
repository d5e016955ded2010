"""What a forward keeps for the backward, counted on the meta device.

The model runs on a batch of the sizes asked for, without its head, and the tensors are counted that
autograd saves. Attention is taken to keep what fused kernels keep: its inputs and its output. What
an operation needs only while it runs is not counted, so the result is an estimate.

Shapes: B rows, T positions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_distill.models.structure import causal_lm

PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
ROUNDED = torch.bfloat16


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps; computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("only the forward is counted")


class _GroupedProduct(torch.autograd.Function):
    """Keeps what the products of a mixture's experts keep, which have no float32 on "meta"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("only the forward is counted")


class _AsOnDevice(TorchFunctionMode):
    """Runs attention as a fused kernel does, and products as autocast does, if it is asked for."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self._autocast = autocast
        self._rounded: dict[int, Tensor] = {}  # weights, as autocast keeps them

    def _cast(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not isinstance(x, nn.Parameter):
            return x.to(ROUNDED)
        return self._rounded.setdefault(id(x), x.to(ROUNDED))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            given = (*args, *(kwargs[x] for x in ("query", "key", "value")[len(args) :]))[:3]
            return _FusedAttention.apply(*map(self._cast if self._autocast else lambda x: x, given))
        if func is torch._grouped_mm:  # pyright: ignore[reportPrivateImportUsage]
            return _GroupedProduct.apply(*args[:2])
        if self._autocast and func in PRODUCTS:
            args = tuple(self._cast(x) for x in args)
        return func(*args, **kwargs)


@dataclass
class _Counted:
    """Holds the bytes of saved storages by where they were saved: in a block, or None."""

    known: set[int]
    held: list[Tensor] = field(default_factory=list)  # so that no address is used again
    place: str | None = None
    saved: dict[str | None, int] = field(default_factory=dict)
    whole: dict[str | None, int] = field(default_factory=dict)  # of these, as wide as the states
    inputs: dict[str, int] = field(default_factory=dict)
    width: int = 0

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held.append(x)
            self.saved[self.place] = self.saved.get(self.place, 0) + storage.nbytes()
            if x.shape[-1:] == (self.width,) or x.ndim < 3:
                self.whole[self.place] = self.whole.get(self.place, 0) + storage.nbytes()
        return x


@dataclass(frozen=True)
class Activations:
    """Says what a forward of B rows of T tokens keeps, in bytes.

    outside: of all that is in no block. blocks: by block. inputs: of the blocks, which gradient
    checkpointing keeps instead. Of `outside` and `blocks` the second number is what tensor
    parallelism keeps whole on each device.
    """

    outside: tuple[int, int]
    blocks: Mapping[str, tuple[int, int]]
    inputs: Mapping[str, int]

    def total(self, checkpointing: bool = False, parts: int = 1) -> int:
        """Return the bytes that are kept when the forward ends.

        Args:
            checkpointing: blocks keep their inputs only; the one that is computed again is added.
            parts: of tensor parallelism.
        """
        outside, blocks = _of_part(self.outside, parts), self.largest(parts)
        if checkpointing and self.blocks:
            return outside + sum(self.inputs.values()) + blocks
        return outside + sum(_of_part(x, parts) for x in self.blocks.values())

    def largest(self, parts: int = 1) -> int:
        """Return the bytes of the block that keeps most."""
        return max((_of_part(x, parts) for x in self.blocks.values()), default=0)


def _of_part(kept: tuple[int, int], parts: int) -> int:
    every, whole = kept
    return whole + (every - whole) // parts


@contextmanager
def _placed(blocks: Mapping[str, nn.Module], counted: _Counted) -> Iterator[None]:
    def entered(name: str, args: Any, kwargs: Any) -> None:
        states = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        counted.place = name
        counted.inputs[name] = 0 if states is None else states.nbytes

    def left(*_: Any) -> None:
        counted.place = None

    hooks: list[Any] = []
    for name, block in blocks.items():
        enter = lambda _, args, kwargs, name=name: entered(name, args, kwargs)
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(block.register_forward_hook(left))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_activations(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batch_size: int,
    length: int,
    autocast: bool = False,
) -> Activations | str:
    """Count what the forward of a model on the meta device keeps, its head left out.

    Args:
        model: a causal LM, with adapters or without, whose parameters say what is trained.
        blocks: by name, as gradient checkpointing treats them.
        batch_size: B.
        length: T.
        autocast: products are rounded to bfloat16, as under `bf16=True` in one process or DDP.

    Returns:
        What is kept, or why the model cannot be run so.
    """
    lm: Any = causal_lm(model)
    base = getattr(lm, "base_model", lm)
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    # a mask of all pairs, which models take as it is: others they look into
    mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta")
    given = (*model.parameters(), *model.buffers(), ids, mask)
    known = {x.untyped_storage()._cdata for x in given}
    counted = _Counted(known, width=getattr(lm.config.get_text_config(), "hidden_size", 0))
    was_training = model.training
    model.train()
    try:
        watched = saved_tensors_hooks(counted.pack, lambda x: x)
        with _placed(blocks, counted), _AsOnDevice(autocast), watched:
            base(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # whatever a model does that needs values
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        model.train(was_training)
    both = {x: (counted.saved[x], counted.whole.get(x, 0)) for x in counted.saved}
    outside = both.pop(None, (0, 0))
    return Activations(outside, {str(k): v for k, v in both.items()}, counted.inputs)
