"""Says how many rows and tokens are taken at a time, from the cache and the shape."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MIB = 2**20

L2_DEFAULT = MIB
# On an accelerator every block costs some thirty launches: they should be few.
DEVICE_BUFFER_BYTES = 64 * MIB
# Tokens per product of the linear op. Below 128 reading the head dominates; the logits of a chunk
# take 2 tokens / hidden of the head's own memory.
MIN_TOKENS, MAX_TOKENS = 128, 1024
CHUNK_BYTES = {"cpu": 48 * MIB}
DEVICE_CHUNK_BYTES = 512 * MIB
# Rows of a head converted at a time, where products are not in its own dtype.
HEAD_SLICE_BYTES = 16 * MIB


@functools.cache
def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()


def l2_bytes() -> int:
    """Return the size of a core's level-2 cache; 1 MiB where torch does not know it."""
    return _capabilities().get("l2_cache_size") or L2_DEFAULT


def buffer_bytes(device: torch.device) -> int:
    """Return the size of one [rows, V] buffer of a block, in bytes.

    A block works on four or five. On a CPU they should stay in cache, but shorter loops cost more
    in starting the threads: measured best is a buffer about as large as the level-2 caches in use.
    """
    if device.type != "cpu":
        return DEVICE_BUFFER_BYTES
    return l2_bytes() * torch.get_num_threads() * 5 // 4


def rows_per_block(x: Tensor, vocab: int) -> int:
    """Count the rows of [*, vocab] whose buffers fit, at least one."""
    itemsize = 8 if x.dtype == torch.float64 else 4
    return max(1, buffer_bytes(x.device) // (itemsize * max(1, vocab)))


def may_ask(x: Tensor) -> bool:
    """Return whether asking for values of x waits for no other device."""
    return x.device.type == "cpu"


class RowBlocks:
    """Iterates over the rows to compute, whose weight is not zero, a block at a time."""

    def __init__(self, like: Tensor, weights: Tensor | None, vocab: int, times: int = 1) -> None:
        self.step = times * rows_per_block(like, vocab)
        self.index = None if weights is None else weights.nonzero().squeeze(-1)
        if self.index is not None and len(self.index) == len(like):
            self.index = None
        self.num_rows = len(like) if self.index is None else len(self.index)

    def __iter__(self):
        """Yield a slice where the rows follow each other, else an index."""
        for start in range(0, self.num_rows, self.step):
            stop = min(start + self.step, self.num_rows)
            if self.index is None:
                yield slice(start, stop)
                continue
            at = self.index[start:stop]
            first, last = int(at[0]), int(at[-1])
            yield slice(first, last + 1) if last - first + 1 == len(at) else at

    def gradient_like(self, x: Tensor) -> Tensor:
        """Allocate a gradient of x, with zeros where rows are skipped."""
        return torch.empty_like(x) if self.index is None else torch.zeros_like(x)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with a head: its own, unless the CPU has to emulate it.

    An x86 without instructions for bfloat16 or float16 takes several times as long for a product
    in these as for one in float32.
    """
    if weight.device.type != "cpu" or weight.dtype.itemsize != 2:
        return weight.dtype
    known = _capabilities()
    if not str(known.get("architecture", "")).startswith("x86"):
        return weight.dtype
    short = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    native = known.get(f"amx_{short}") or known.get(f"avx512_{short}")
    return weight.dtype if native else torch.float32


def head_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a head [V, H] in `dtype`: all at once, or converted a few at a time."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    step = max(1, HEAD_SLICE_BYTES // (dtype.itemsize * max(1, weight.shape[1])))
    for start in range(0, max(1, len(weight)), step):  # of no rows, none
        at = slice(start, min(start + step, len(weight)))
        yield at, weight[at].to(dtype)


def tokens_per_chunk(hidden: Tensor, weight: Tensor, vocab: int | None = None) -> int:
    """Count the tokens of [N, H] whose logits for a head [V, H] are held at a time, on one side.

    Args:
        hidden: on the device.
        weight: of the head, or some of its rows.
        vocab: V, if these are some of them.
    """
    limit = CHUNK_BYTES.get(hidden.device.type, DEVICE_CHUNK_BYTES)
    tokens = limit // (product_dtype(weight).itemsize * max(1, vocab or weight.shape[0]))
    return min(max(tokens, MIN_TOKENS), MAX_TOKENS)
