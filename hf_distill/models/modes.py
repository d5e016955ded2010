"""What holds of a model for the length of a block: mode, random state, forwards, modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

CHECKPOINTING = "gradient_checkpointing"  # of Transformers' modules


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode (no dropout, no gradient checkpointing) inside the block."""
    was_training = model.training
    # without being on it changes nothing in eval mode, but adapters that prepare for the backward
    # pass of each forward pass (aLoRA) raise an error where none follows
    checkpointed = [m for m in model.modules() if m.__dict__.get(CHECKPOINTING) is True]
    model.eval()
    try:
        for module in checkpointed:
            setattr(module, CHECKPOINTING, False)
        yield
    finally:
        for module in checkpointed:
            setattr(module, CHECKPOINTING, True)
        model.train(was_training)


@contextmanager
def evaluating_each(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put each of the modules in eval mode inside the block; afterwards it is as it was."""
    in_training = [module for module in modules if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """Leave the random state of the CPU and of a device as it was before the block."""
    module = None if device.type == "cpu" else getattr(torch, device.type)
    state = None if module is None else module.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            if module is not None:
                module.set_rng_state(state)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the modules' forwards by others inside the block."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, had in before.items():
            if had is None:
                del module.forward
            else:
                module.forward = had


def replaced_forward(
    module: nn.Module, forward: Callable[..., Any]
) -> AbstractContextManager[None]:
    """Give one module another forward inside the block."""
    return replaced_forwards({module: forward})


@contextmanager
def in_place_of(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of some, inside the block."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in others
    ]
    for parent, name, child in places:
        parent._modules[name] = others[child]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


@contextmanager
def without_checkpoint_wrappers(model: nn.Module) -> Iterator[None]:
    """Inside the block no wrapper stands around blocks that recompute their activations.

    FSDP's `activation_checkpointing` puts them there. Names of tensors in a state dict are without
    them, and PEFT looks for an adapter's tensors by the names of modules: it would save none.
    """
    wrappers: dict[nn.Module, nn.Module] = {
        m: m._checkpoint_wrapped_module for m in model.modules() if isinstance(m, CheckpointWrapper)
    }
    with in_place_of(model, wrappers):
        yield
