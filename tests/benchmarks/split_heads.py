"""What a loss over heads in pieces exchanges and takes, against joined heads, in one run.

python -m tests.benchmarks.split_heads [--vocab 151936] [--hidden 256] [--tokens 512]

Ways: joined (the head gathered, its gradient cut again), same tokens (tensor parallelism) and own
tokens (`shard_loss`; as many on each process). JSD and cross-entropy, float32, both heads with as
many hidden units. Shown are bytes of collectives of a process, medians of what a call adds to its
peak, and of its seconds.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from metal_ops import DivergenceSpec, Head, linear_divergence
from tests.benchmarks.timing import resident_peak_mb
from tests.hf_distill.engines.exchanged import Exchanged, everywhere
from tests.hf_distill.engines.launching import started

WAYS = ("joined", "same tokens", "own tokens")


def call(way: str, given: argparse.Namespace, head: Head, teacher: Head) -> None:
    """Compute the loss and gradients of one step."""
    tokens = given.tokens
    generator = torch.Generator().manual_seed(dist.get_rank() if way == "own tokens" else 0)
    hidden = torch.randn(tokens, given.hidden, generator=generator).requires_grad_()
    other = torch.randn(tokens, given.hidden, generator=generator)
    options: dict[str, Any] = {
        "weights": torch.full((tokens,), 1 / tokens),
        "labels": torch.randint(given.vocab, (tokens,), generator=generator),
        "alpha": 0.5,
    }
    if way != "joined":
        own, theirs = head.own_rows(), teacher.own_rows()
        assert own is not None
        assert theirs is not None
        head, teacher = own.head, theirs.head
        options |= {"group": own.group, "own_tokens": way == "own tokens"}
    linear_divergence(
        hidden, head, other, teacher, DivergenceSpec("jsd"), **options
    ).loss.backward()


def measure(given: argparse.Namespace) -> None:
    """Be one process, and print what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        whole = torch.randn(given.vocab, given.hidden) / given.hidden**0.5
        weights.append(distribute_tensor(whole, mesh, [Shard(0)]))
    weights[0].requires_grad_()
    found: list[dict[str, Any]] = []
    for _ in range(1 + given.repeats):
        for way in WAYS:
            weights[0].grad = None
            dist.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before, start = resident_peak_mb(), time.perf_counter()
            exchanged = Exchanged()
            with everywhere(exchanged):
                call(way, given, Head(weights[0]), Head(weights[1]))
            taken = {"MB": resident_peak_mb() - before, "s": time.perf_counter() - start}
            sizes = sum(exchanged.sizes.values()) / 2**20
            found.append({"way": way, "MiB": sizes, **taken})
    if dist.get_rank() == 0:
        print("FOUND" + json.dumps(found[len(WAYS) :]), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if "RANK" in os.environ:
        measure(given)
        return
    words = [f"--{x}={getattr(given, x)}" for x in ("vocab", "hidden", "tokens", "repeats")]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(given.processes)]
        for process in started(["tests.benchmarks.split_heads", *words], files):
            process.wait()
        files[0].seek(0)
        text = files[0].read()
    lines = [line for line in text.splitlines() if line.startswith("FOUND")]
    assert lines, text[-3000:]
    found = json.loads(lines[-1].removeprefix("FOUND"))
    print(f"V {given.vocab}, H {given.hidden}, {given.tokens} tokens, {given.processes} processes")
    for way in WAYS:
        own = [x for x in found if x["way"] == way]
        peak, seconds = (statistics.median(x[k] for x in own) for k in ("MB", "s"))
        print(f"  {way:12s} {own[0]['MiB']:8.2f} MiB exchanged, {peak:6.0f} MB, {seconds:6.2f} s")


if __name__ == "__main__":
    main()
