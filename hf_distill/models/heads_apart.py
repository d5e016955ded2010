"""Output heads that FSDP 2 leaves in pieces: each process has some rows, and none the whole.

While FSDP 2 prepares a model, its head gets a group of its own, with the input embeddings where
they are the same parameter. A forward that is read at its head then goes around both: ids and
hidden states travel between the processes, the head and its gradient do not. Every other forward
(generation, logits) calls them as ever, and the engine joins them for it.

Shapes: B rows, T positions, H hidden.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import fsdp

from hf_distill.models.modes import in_place_of
from hf_distill.models.structure import causal_lm
from metal_ops import Head
from metal_ops.functional import OwnRows, one_local
from metal_ops.functional.groups import AllIds

MARK = "_rows_stay_apart"
_ASKED: "weakref.WeakSet[Accelerator]" = weakref.WeakSet()


def is_apart(head: Any) -> bool:
    """Return whether a head's rows stay where they are."""
    return getattr(head, MARK, False)


def shards_heads(accelerator: Accelerator) -> bool:
    """Return whether models that this accelerator prepares keep their heads in pieces."""
    return accelerator in _ASKED


def _is_plain(embeddings: Any) -> bool:
    plain = type(embeddings) is nn.Embedding
    return plain and not (embeddings.max_norm or embeddings.scale_grad_by_freq or embeddings.sparse)


def _group(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameter stays in pieces.

    Raises:
        ValueError: it cannot: the message says why.
    """
    lm: Any = causal_lm(model)
    head, embeddings = lm.get_output_embeddings(), lm.get_input_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"shard_loss needs a linear output head, got a {type(head).__name__}")
    if embeddings is None or embeddings.weight is not head.weight:
        return [head]
    if not _is_plain(embeddings):
        raise ValueError(
            "shard_loss needs plain input embeddings where the output head has their weight, got "
            f"{embeddings}"
        )
    return [embeddings, head]


@contextmanager
def heads_apart(model: nn.Module) -> Iterator[None]:
    """Inside the block FSDP 2 cuts the model's head in a group of its own.

    Raises:
        ValueError: it cannot; the message says why.
    """
    own, plain = _group(model), fsdp.fully_shard

    def divided(modules: Any, **kwargs: Any) -> Any:
        given = modules if isinstance(modules, list) else [modules]
        if not any(module is own[-1] for module in given):
            return plain(modules, **kwargs)
        rest = [m for m in given if not any(m is x for x in own)]
        if rest:
            plain(rest, **kwargs)
        setattr(own[-1], MARK, True)
        return plain(own, **{**kwargs, "reshard_after_forward": True})

    fsdp.fully_shard = divided
    try:
        yield
    finally:
        fsdp.fully_shard = plain
    if not is_apart(own[-1]):
        raise ValueError(
            "shard_loss needs a head that is cut with the last modules of the model, but the wrap "
            f"policy of FSDP has cut the {type(own[-1]).__name__} otherwise"
        )


def shard_heads(accelerator: Accelerator) -> None:
    """Keep the heads of models in pieces that this accelerator prepares from here on."""
    if shards_heads(accelerator):
        return
    _ASKED.add(accelerator)
    prepare: Callable[..., Any] = accelerator._prepare_fsdp2

    def prepared(*args: Any) -> Any:
        models = [x for x in args if isinstance(x, nn.Module)]
        if not models or isinstance(models[0], fsdp.FSDPModule):
            return prepare(*args)
        with heads_apart(models[0]):
            return prepare(*args)

    cast(Any, accelerator)._prepare_fsdp2 = prepared


def _rows(module: Any) -> OwnRows:
    found = Head(module.weight).own_rows()
    assert found is not None
    return found


class _Lookup(torch.autograd.Function):
    """Looks ids of all processes up in one's own rows, and returns one's own tokens' embeddings."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, own: Tensor, at: OwnRows, pad: int | None) -> Tensor:
        every = AllIds.of(own, at.group)
        local = every.ids - at.rows.start
        mine = (local >= 0) & (local < len(weight))
        found = weight.new_zeros(len(local), weight.shape[1])
        found[mine] = weight[local[mine]]
        kept = found.new_empty(every.most, found.shape[1])
        dist.reduce_scatter_single(kept, found, group=at.group)
        ctx.every, ctx.local, ctx.group, ctx.size = every, local, at.group, weight.shape
        ctx.mine = mine if pad is None else mine & (every.ids != pad)
        return kept[: len(own)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        every = ctx.every.gather(grad, ctx.group)
        local, found = ctx.local[ctx.mine], grad.new_zeros(ctx.size, dtype=torch.float32)
        found.index_add_(0, local, every[ctx.mine].float())
        # as data parallelism wants it: averaged over processes
        return found.div_(ctx.group.size()).to(grad.dtype), None, None, None


class _Embeddings(nn.Module):
    """Stands for input embeddings whose rows lie on the processes."""

    def __init__(self, real: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._real, self._dtype = (real,), dtype  # in a tuple, so that it is no module of this one

    def forward(self, input_ids: Tensor) -> Tensor:
        (real,), at = self._real, _rows(self._real[0])
        weight = at.head.weight.to(self._dtype or at.head.weight.dtype)
        found = cast(Tensor, _Lookup.apply(weight, input_ids.flatten(), at, real.padding_idx))
        found = found.view(*input_ids.shape, -1)
        for hook in real._forward_hooks.values():  # but the engine's
            if not str(getattr(hook, "__module__", "torch.distributed")).startswith("torch."):
                hook(real, (input_ids,), found)
        return found


class _Called(nn.Module):
    """Stands for a head; calls a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, hidden: Tensor) -> Tensor:
        return self._function(hidden)


@contextmanager
def around_head(lm: nn.Module, head: nn.Module, tap: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the model calls `tap` for its head, which stays in pieces.

    Args:
        lm: the Transformers model.
        head: of it, `is_apart`.
        tap: called with [B, T, H].
    """
    others: dict[nn.Module, nn.Module] = {head: _Called(tap)}
    embeddings: Any = cast(Any, lm).get_input_embeddings()
    if embeddings is not None and embeddings.weight is cast(Any, head).weight:
        state: Any = cast(Any, head)._get_fsdp_state()
        others[embeddings] = _Embeddings(embeddings, state._mp_policy.param_dtype)
    with one_local(cast(Any, head).weight), in_place_of(lm, others):
        yield
