"""A process that writes a cache in a folder; it can kill itself at a place.

python -m tests.hf_distill.cache.writing FOLDER [RANK]
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from hf_distill.cache import HeadSamples
from tests import processes
from tests.hf_distill.cache import caches
from tests.hf_distill.trainers import models

COUNT, SHARD_ROWS = 144, 3
SHARDS = COUNT // SHARD_ROWS
BEGUN, RENAMED, DONE = "begun", "renamed", "done"


def die_at_rename(number: int) -> None:
    """SIGKILL in place of a rename: a whole file has another name, and what follows is not there.

    Args:
        number: of the rename. The first is that of config.json, then shards and sidecars in turn,
            row_hashes.bin, and manifest.json.
    """
    replace, done = os.replace, []

    def renamed(*names: Any) -> None:
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(names)
        replace(*names)

    os.replace = renamed


def tell_renames(tell: Callable[[str], Any]) -> None:
    """Say so after every rename."""
    replace = os.replace

    def renamed(*names: Any) -> None:
        replace(*names)
        tell(RENAMED)

    os.replace = renamed


def write(folder: Path, rank: int | None, tell: Callable[[str], Any], world: int = 2) -> None:
    """Write the cache, from where it is; in one process or as a rank of several."""
    torch.set_num_threads(1)
    if rank is not None:
        processes.join(folder.with_name(folder.name + ".meeting"), rank, world)
    model, tokenizer = models.llama(), models.tokenizer()
    tell(BEGUN)
    caches.write(
        folder,
        model,
        dataset=models.problems(COUNT),
        data_collator=caches.collator(hint="hint"),
        processing_class=tokenizer,
        codec=HeadSamples(top_k=4, num_samples=4),
        shard_rows=SHARD_ROWS,
    )
    if rank is not None:
        torch.distributed.destroy_process_group()
    tell(DONE)


def main() -> None:
    folder, *rank = sys.argv[1:]
    write(Path(folder), int(rank[0]) if rank else None, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
