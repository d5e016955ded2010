"""How fast a cache is read: `python -m tests.benchmarks.loader`.

Rows of 320 scored tokens with made-up teachers over a vocabulary of 151,936, in the default codec,
through the collator that `DistillTrainer` gives its data loader: tokens a second with as many
workers, in shuffled order, the first pass (checksums) and the second apart.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_distill.cache import CachedTeacher, Codec, HeadSamples, TopK, fingerprints, progress
from hf_distill.cache.datasets import TokenCollator
from hf_distill.cache.manifest import config_hash
from hf_distill.cache.shard import Row, write_shard
from hf_distill.cache.teacher import CachedCollator

VOCAB = 151_936
TOKENS = 320  # of a row
SHARD_ROWS = 128
TEACHERS = 4  # rows of logits; the others are these again


def make(folder: Path, codec: Codec, num_rows: int) -> list[dict[str, list[int]]]:
    """A cache of random rows, and the rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (num_rows, TOKENS + 1), generator=generator).tolist()
    made = []
    for i in range(TEACHERS):
        logits = torch.randn(TOKENS, VOCAB, generator=generator) * 2.5
        made += codec.encode(logits, [TOKENS], [(0, i)], VOCAB)
    about = {
        "name": codec.name, "settings": codec.settings(), "seed": 0,
        "temperature": codec.temperature, "temperature_range": list(codec.temperature_range),
    }  # fmt: skip
    config = {
        "teacher": {"name_or_path": "made up"}, "tokenizer": None, "collator": {},
        "logits": {"logit_dim": VOCAB, "real_vocab": VOCAB},
        "dataset": {"num_rows": num_rows}, "codec": about, "shard_rows": SHARD_ROWS,
    }  # fmt: skip
    progress.begin(folder, config, overwrite=False, verify="size")
    positions = np.arange(1, TOKENS + 1, dtype=np.int32)
    for number, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        rows = [
            Row(i, fingerprints.row_hash(ids[i]), positions, made[i % TEACHERS])
            for i in range(start, min(start + SHARD_ROWS, num_rows))
        ]
        write_shard(folder, number, rows, config_hash(config), sums={}, written_by={})
    progress.finish(folder, config, {})
    return [{"input_ids": row} for row in ids]


def speed(path: Path, data: list[dict[str, list[int]]], workers: int, batch: int) -> list[float]:
    """Tokens a second of two passes."""
    collator = CachedCollator(TokenCollator(), CachedTeacher(path))
    loader = DataLoader(
        data, batch, shuffle=True, collate_fn=collator, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    found = []
    for _ in range(2):
        began, tokens = time.perf_counter(), 0
        for made in loader:
            tokens += int(made["teacher_stored"]["counts"].sum())
        found.append(tokens / (time.perf_counter() - began))
    return found


def main() -> None:
    """Print a line for each codec and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| codec | bytes/token | workers | tokens/s, first pass | tokens/s, second |")
    print("|---|---|---|---|---|")
    for codec in (HeadSamples(), TopK(top_k=50)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "cache")
            data = make(path, codec, options.rows)
            size = CachedTeacher(path).manifest.stats["bytes_per_token"]
            for workers in options.workers:
                first, second = speed(path, data, workers, options.batch)
                print(f"| {codec.name} | {size:.0f} | {workers} | {first:,.0f} | {second:,.0f} |")


if __name__ == "__main__":
    main()
