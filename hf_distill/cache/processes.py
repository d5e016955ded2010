"""Which shards of a cache a process makes, with a teacher that is whole or lies in pieces.

A whole teacher answers each process alone. Where processes hold pieces of it (FSDP 2) they ask it
together, each about its own rows; under tensor parallelism all ask it about the same rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_distill.models.structure import causal_lm, is_sharded


class Part(NamedTuple):
    """Holds what a process has to do.

    Attributes:
        numbers: of the shards whose rows it makes.
        idle_rounds: how often it then takes part in the calls of others that have one shard more.
        writes: whether its shards are written by it, and not by another that makes the same.
    """

    numbers: Sequence[int]
    idle_rounds: int
    writes: bool


def num_copies(model: nn.Module, num_processes: int) -> int:
    """Return how many processes must be asked about the same rows.

    Raises:
        ValueError: the model lies in pieces in a way that a cache cannot be written from.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "a teacher to cache must not be cut by DeepSpeed's ZeRO-3, got one that was loaded "
            "after a TrainingArguments with such a config: load it before, or in pieces with "
            "distributed_config=DistributedConfig(fsdp_size=...)"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "a teacher to cache must not be wrapped by FSDP 1, got one that is: load it with "
            "distributed_config=DistributedConfig(fsdp_size=...)"
        )
    size = getattr(causal_lm(model), "_tp_size", None) or 1
    if size not in (1, num_processes) or (size > 1 and is_sharded(model)):
        raise ValueError(
            "a teacher to cache must be under tensor parallelism over all processes and nothing "
            f"else, or over none, got tp_size {size} of {num_processes} processes"
            + (" and FSDP" if is_sharded(model) else "")
        )
    return size


def part_of(missing: Sequence[int], state: PartialState | Any, copies: int) -> Part:
    """Return what a process does of the shards that are missing.

    Args:
        missing: their numbers.
        state: of the process.
        copies: see `num_copies`.
    """
    if copies > 1:
        return Part(missing, 0, state.is_main_process)
    numbers = missing[state.process_index :: state.num_processes]
    rounds = -(-len(missing) // state.num_processes)
    return Part(numbers, rounds - len(numbers), writes=True)
