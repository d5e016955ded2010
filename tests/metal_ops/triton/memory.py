"""Which elements of its arguments an interpreted kernel reads and writes, and how often."""

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from metal_ops.backends import triton


class Use(NamedTuple):
    """Of one argument, in its shape: how often each element was read, and written."""

    reads: Tensor
    writes: Tensor
    strays: int  # accesses between its rows


class _Storage:
    """Counts for each element of a storage."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.item = storage.data_ptr(), tensor.itemsize
        self.end = self.start + storage.nbytes()
        self.counts = np.zeros((2, storage.nbytes() // self.item), dtype=np.int64)

    def seen_by(self, tensor: Tensor) -> Use:
        reads, writes = (
            torch.from_numpy(x).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            for x in self.counts
        )
        strays = int(self.counts.sum()) - int(reads.sum()) - int(writes.sum())
        return Use(reads.clone(), writes.clone(), strays)


class Watch:
    """Every launch since it was made: (kernel, uses of its tensor arguments).

    An access outside of a launch's arguments fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[str, list[Use]]] = []
        self._storages: dict[int, _Storage] = {}
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
        builder, launch = interpreter.interpreter_builder, triton._launch
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(0, pointers.data, mask.data)
            return load(pointers, mask, *rest)

        def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(1, pointers.data, mask.data)
            return store(pointers, value, mask, *rest)

        def watched_launch(module: str, kernel: str, grid: Any, args: Any, *rest: Any, **meta: Any):
            tensors = [x for x in args if isinstance(x, Tensor)]
            self._storages = {x.untyped_storage().data_ptr(): _Storage(x) for x in tensors}
            launch(module, kernel, grid, args, *rest, **meta)
            uses = [self._storages[x.untyped_storage().data_ptr()].seen_by(x) for x in tensors]
            self.launches.append((kernel, uses))

        monkeypatch.setattr(builder, "create_masked_load", watched_load)
        monkeypatch.setattr(builder, "create_masked_store", watched_store)
        monkeypatch.setattr(triton, "_launch", watched_launch)

    def _note(self, row: int, pointers: np.ndarray, mask: np.ndarray) -> None:
        at = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        left = len(at)
        for storage in self._storages.values():
            inside = at[(at >= storage.start) & (at < storage.end)]
            np.add.at(storage.counts[row], (inside - storage.start) // storage.item, 1)
            left -= len(inside)
        assert left == 0, f"{left} accesses outside of the arguments"
