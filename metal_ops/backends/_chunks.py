"""How many rows and tokens the chunked backend takes at a time, from the cache and the shape."""

import functools
from pathlib import Path

import torch
from torch import Tensor

KIB, MIB = 2**10, 2**20

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
L2_DEFAULT = MIB
# On an accelerator every block costs some thirty launches: they should be few.
DEVICE_BUFFER_BYTES = 64 * MIB
# Tokens per product of the linear op. Below 128 reading the head dominates; the logits of a chunk
# take 2 tokens / hidden of the head's own memory.
MIN_TOKENS, MAX_TOKENS = 128, 1024
CHUNK_BYTES = {"cpu": 96 * MIB}
DEVICE_CHUNK_BYTES = 512 * MIB


@functools.cache
def l2_bytes() -> int:
    """Size of the first core's level-2 cache; Linux says it, elsewhere 1 MiB is assumed."""
    for entry in sorted(CACHES.glob("index*")):
        level, size = ((entry / name).read_text().strip() for name in ("level", "size"))
        if level == "2" and size.endswith("K"):
            return int(size[:-1]) * KIB
    return L2_DEFAULT


def buffer_bytes(device: torch.device) -> int:
    """Size of one [rows, V] buffer of a block, in bytes.

    A block works on four or five. On a CPU they should stay in cache, but shorter loops cost more
    in starting the threads: measured best is a buffer about as large as the level-2 caches in use.
    """
    if device.type != "cpu":
        return DEVICE_BUFFER_BYTES
    return l2_bytes() * torch.get_num_threads() * 5 // 4


def rows_per_block(x: Tensor, vocab: int) -> int:
    """Rows of [*, vocab] whose buffers fit, at least one."""
    itemsize = 8 if x.dtype == torch.float64 else 4
    return max(1, buffer_bytes(x.device) // (itemsize * max(1, vocab)))


def tokens_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Tokens of [N, H] whose logits for a head [V, H] are held at a time, on one side."""
    limit = CHUNK_BYTES.get(hidden.device.type, DEVICE_CHUNK_BYTES)
    tokens = limit // (weight.element_size() * max(1, weight.shape[0]))
    return min(max(tokens, MIN_TOKENS), MAX_TOKENS)
