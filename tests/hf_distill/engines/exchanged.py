"""Bytes and calls of the collectives of a training's steps."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metal_ops import _ops


@contextmanager
def everywhere(mode: TorchDispatchMode) -> Iterator[None]:
    """Inside the block the mode sees operators, also those inside of this library's operations.

    A mode that sees an operation of a library does not see what that calls.
    """
    run = _ops.run

    def seen(*args: Any) -> Any:
        with mode:
            return run(*args)

    _ops.run = seen
    try:
        with mode:
            yield
    finally:
        _ops.run = run


class Exchanged(TorchDispatchMode):
    """Counts bytes and calls of collectives, by name; of each the largest tensor is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func).partition(".")
        if space in ("c10d", "_c10d_functional") and "wait" not in name and "barrier" not in name:
            found = tree_leaves((args, kwargs))
            tensors = [x for x in found if isinstance(x, torch.Tensor)]
            self.sizes[name.split(".")[0]] += max((x.nbytes for x in tensors), default=0)
            self.calls[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *words: str) -> tuple[int, int]:
        """Return bytes and calls of the collectives with one of these words in their name."""
        names = [name for name in self.sizes if any(word in name for word in words)]
        return sum(self.sizes[n] for n in names), sum(self.calls[n] for n in names)
