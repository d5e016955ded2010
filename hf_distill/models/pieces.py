"""A model's parameters as one process holds them: whole, or its pieces of them.

FSDP 2 holds pieces as `DTensor`s, ZeRO-3 beside empty parameters (`ds_tensor`), FSDP 1 as parts of
one flat tensor for each wrapped module. What is written into a piece is what the engine joins at
the next forward, once nothing is joined from before it.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from hf_distill.models.structure import in_pieces, is_sharded

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    for part in WRAPPERS:
        name = name.replace(part, "")
    return name


def lies_in_pieces(model: nn.Module) -> bool:
    """Return whether processes hold pieces of the parameters now, tensor parallelism included."""
    return is_sharded(model) or any(in_pieces(parameter) for parameter in model.parameters())


def will_lie_in_pieces(accelerator: Accelerator, model: nn.Module) -> bool:
    """Return whether processes hold pieces of the parameters, now or once training has begun."""
    kind, plugin = accelerator.distributed_type, accelerator.deepspeed_plugin
    if kind == DistributedType.DEEPSPEED:
        return plugin is not None and plugin.zero_stage == 3
    return kind == DistributedType.FSDP or lies_in_pieces(model)


def unevenly_held_twice(model: nn.Module) -> str | None:
    """Return the name of a trained parameter of which FSDP 2 holds two copies, or None.

    A tied head and the embeddings that Transformers puts into two groups are one memory where each
    process has as many rows. Otherwise FSDP 2 keeps a padded copy for each group, of which only one
    is trained.
    """
    groups: dict[int, set[int]] = {}
    for owner, name, parameter in _owned(model, model, ""):
        held = groups.setdefault(id(parameter), set())
        held.add(id(owner))
        if len(held) > 1 and parameter.requires_grad and _is_uneven(parameter):
            return name
    return None


def cut_heads(model: nn.Module) -> str | None:
    """Return the name of a projection whose attention heads are cut between processes, or None."""
    for path, module in model.named_modules():
        size = getattr(module, "head_dim", None)
        for name in ("q_proj", "k_proj", "v_proj") if isinstance(size, int) else ():
            projection: Any = getattr(module, name, None)
            weight = getattr(getattr(projection, "base_layer", projection), "weight", None)
            if isinstance(weight, DTensor) and _is_cut_off(weight, cast(int, size)):
                return f"{path}.{name}"
    return None


def _is_cut_off(weight: DTensor, size: int) -> bool:
    mesh = weight.device_mesh
    parts = [mesh.size(i) for i, placed in enumerate(weight.placements) if placed.is_shard(0)]
    return weight.shape[0] % (math.prod(parts) * size) != 0


def _owned(
    module: nn.Module, owner: nn.Module, prefix: str
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield parameters with their names, and the module whose call joins them."""
    owner = module if isinstance(module, FSDPModule) else owner
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield owner, name, parameter
    for name, child in module.named_children():
        yield from _owned(child, owner, f"{prefix}.{name}" if prefix else name)


def _is_uneven(parameter: Tensor) -> bool:
    """Return whether processes hold other numbers of rows of a parameter."""
    if not isinstance(parameter, DTensor):
        return False
    return _is_cut_off(parameter, 1)


def zero3_coordinator(engine: Any) -> Any:
    """Return what joins parameters in an engine of ZeRO-3, or None of anything else."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()


def release(model: nn.Module) -> None:
    """Give up what is joined of a model in pieces: its parameters are the pieces from here on.

    Args:
        model: as its engine calls it.
    """
    coordinator = zero3_coordinator(model)
    if coordinator is not None:  # it keeps joined what the next forward begins with
        coordinator.release_and_reset_all(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None:
                handle.reshard(True)


def stays_joined(module: nn.Module) -> bool:
    """Return whether FSDP 2 leaves what it has joined of a module so after its forward."""
    if not isinstance(module, FSDPModule):
        return False
    groups: Any = cast(Any, module)._get_fsdp_state()._fsdp_param_groups
    return bool(groups) and not any(group._reshard_after_forward for group in groups)


def piece(parameter: Tensor) -> Tensor:
    """Return what this process holds of a parameter: memory that an engine reads."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach()).to_local()
    held = getattr(parameter, "ds_tensor", None)
    return parameter.data if held is None else held.data


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of all pieces together; of a part of a flat tensor what it says now."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def lies_flat(model: nn.Module) -> bool:
    """Return whether the pieces of each parameter follow each other in one flat tensor."""
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return True
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _sizes(held: Tensor) -> list[int]:
    """Return how many elements each process holds. All must call it."""
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, held.numel())
    return sizes


def most(number: int) -> int:
    """Return the largest of the processes' numbers. All must call it."""
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return max(numbers)


def cut(whole: Tensor, parameter: Tensor, flat: bool) -> Tensor:
    """Return of a whole tensor what this process holds of a parameter. All must call it.

    Args:
        whole: in any dtype, which is kept.
        parameter: that is cut already.
        flat: see `lies_flat`.
    """
    held = piece(parameter)
    if isinstance(parameter, DTensor):
        mesh, placed = parameter.device_mesh, whole.to(held.device)
        return distribute_tensor(placed, mesh, parameter.placements).to_local().clone()
    if not flat:
        return whole.to(held.device, copy=True)
    sizes = _sizes(held)
    start, missing = sum(sizes[: dist.get_rank()]), max(0, sum(sizes) - whole.numel())
    padded = functional.pad(whole.flatten(), (0, missing))  # pieces of ZeRO have one length
    return padded[start : start + held.numel()].view(held.shape).to(held.device, copy=True)


def join(held: Tensor, parameter: Tensor, shape: torch.Size, flat: bool) -> Tensor:
    """Return the whole tensor of which processes hold pieces, on each. All must call it.

    Args:
        held: this process's piece.
        parameter: is cut in the same way.
        shape: of the whole.
        flat: see `lies_flat`.
    """
    if isinstance(parameter, DTensor):
        mesh, at = parameter.device_mesh, parameter.placements
        known = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(held, mesh, at, run_check=False, **known).full_tensor()
    if not flat:
        return held.view(shape)
    sizes = _sizes(held)
    own = functional.pad(held.flatten(), (0, max(sizes) - held.numel()))
    padded = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(padded, own)
    parts = [part[:size] for part, size in zip(padded, sizes, strict=True)]
    return torch.cat(parts)[: shape.numel()].view(shape)
