"""Memory, time and exchanged bytes of a step on an engine, by hidden states and by logits.

python -m tests.benchmarks.engines [--engines fsdp2 zero3] [--hidden 128 576] [--tokens 1024]
python -m tests.benchmarks.engines --model FOLDER [--repeats 5]

Each case is one run of two processes on the CPU whose steps take the two ways in turns: one of
each to warm up, some for the time, one for the bytes of collectives, and one for the memory: what
tensors hold at the highest beyond what they held before the step, as the allocator counts it.
Shown are medians of the seconds, by the clock and of the processor, with the smallest and the
largest. Heads that stay in pieces (fsdp2-shard) are never read by logits: these are those of fsdp2,
in a run of its own. Random models of two layers, or student and teacher from a folder; the teacher
is as wide as the student, and in pieces as it is. ZeRO's buckets are "auto", or DeepSpeed's own
(half a billion elements) with --large-buckets.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.models import forward
from tests.benchmarks.timing import allocations
from tests.hf_distill.engines import cpu
from tests.hf_distill.engines.exchanged import Exchanged
from tests.hf_distill.engines.launching import started
from tests.hf_distill.engines.setups import ENGINES, Place
from tests.hf_distill.trainers import models

ROW = 257  # tokens, of which all but the first are scored
WAYS = {"hidden states": 0.0, "logits": 1e9}  # copies of a head that are said to be needed
BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size")


class Measured(DistillTrainer):
    """Measures its training steps, which read the student in one way and the other in turns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: dict[str, dict[str, Any]] = {way: {"s": [], "CPU s": []} for way in WAYS}
        self._steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        turn, index = divmod(self._steps, len(WAYS))
        way, self._steps = list(WAYS)[index], self._steps + 1
        forward.HEAD_COPIES |= dict.fromkeys(forward.HEAD_COPIES, WAYS[way])
        gc.collect()
        return self._measure(
            turn, self.found[way], lambda: super(Measured, self).training_step(*args, **kwargs)
        )

    def _measure(self, turn: int, found: dict[str, Any], step: Callable[[], Any]) -> Any:
        last = self.args.max_steps // len(WAYS) - 1
        if turn == last:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                loss = step()
            found["MB"] = max(accumulate(allocations(prof))) / 2**20
            return loss
        if turn == last - 1:
            with Exchanged() as exchanged:
                loss = step()
            found["exchanged"] = {k: v / 2**20 for k, v in exchanged.sizes.items()}
            found["calls"] = exchanged.of("")[1]
            return loss
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step()
        if turn:
            found["s"].append(time.perf_counter() - start)
            found["CPU s"].append(time.process_time() - cpu_start)
        return loss


def rows_of(vocab: int, count: int) -> list[dict[str, list[int]]]:
    """Return rows of random ids."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(3, vocab, (ROW,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * ROW, "labels": ids})
    return rows


def load(given: argparse.Namespace) -> tuple[Any, Any]:
    """Return student and teacher."""
    if given.model is not None:
        load = AutoModelForCausalLM.from_pretrained
        return load(given.model, dtype=torch.float32), load(given.model, dtype=torch.float32)
    hidden = given.hidden[0]
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": given.vocab}
    sizes["max_position_embeddings"] = ROW
    return models.llama(0, **sizes), models.llama(1, **sizes)


def measure(given: argparse.Namespace) -> None:
    """Be one process: train, and print what the steps took."""
    engine, tokens = given.engines[0], given.tokens[0]
    torch.set_num_threads(1)
    cpu.take_processes_for_devices()
    if engine.startswith("zero"):
        cpu.without_compiled_ops()
        if not given.large_buckets:
            settings = ENGINES[engine]["deepspeed"]["zero_optimization"]
            settings |= dict.fromkeys(BUCKETS, "auto")
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    student, teacher = load(given)
    rows, steps = tokens // (ROW - 1), len(WAYS) * (3 + given.repeats)
    data = rows_of(student.config.vocab_size, rows * world * steps)
    place = Place(Path(tempfile.mkdtemp()), engine, world)
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    settings |= {"max_steps": steps, "watchdog": {"action": "off"}}
    settings |= {"gradient_checkpointing": given.checkpointing}
    args = DistillConfig(**place.options(**settings))
    trainer = Measured(student, args, models.Pad(), data, teacher=teacher)
    trainer.train()
    if rank == 0:
        print("FOUND" + json.dumps(trainer.found), flush=True)
    torch.distributed.destroy_process_group()


@functools.cache
def run(words: tuple[str, ...], processes: int) -> dict[str, dict[str, Any]]:
    """Measure in processes of their own."""
    with ExitStack() as stack:
        files: list[Any] = [
            stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)
        ]
        for process in started(["tests.benchmarks.engines", "--process", *words], files):
            process.wait()
        files[0].seek(0)
        text = files[0].read()
    lines = [line for line in text.splitlines() if line.startswith("FOUND")]
    assert lines, text[-3000:]
    return json.loads(lines[-1].removeprefix("FOUND"))


def show(title: str, ways: dict[str, dict[str, Any]]) -> None:
    """Print what both ways took, and the first as a share of the second."""
    print(title)
    for way, found in ways.items():
        line = f"  {way:14s} {found['MB']:.0f} MB"
        for name in ("s", "CPU s"):
            x = found[name]
            line += f", {statistics.median(x):.4g} {name} ({min(x):.4g} to {max(x):.4g})"
        parts = [f"{k} {v:.1f} MiB" for k, v in found["exchanged"].items()]
        print(", ".join([line, *parts]), f"in {found['calls']} calls")
    first, second = (ways[way] for way in WAYS)
    shares = [f"MB {first['MB'] / second['MB']:.2f}"]
    for name in ("s", "CPU s"):
        shares.append(
            f"{name} {statistics.median(first[name]) / statistics.median(second[name]):.2f}"
        )
    print("  hidden states / logits:", ", ".join(shares), flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["fsdp2", "zero3"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 576])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--model", help="folder of a model; sizes are its own then")
    parser.add_argument("--large-buckets", action="store_true", help="of DeepSpeed, in ZeRO")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each way")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        measure(given)
        return
    shared = ["--vocab", str(given.vocab), "--repeats", str(given.repeats)]
    shared += ["--large-buckets"] if given.large_buckets else []
    shared += ["--checkpointing"] if given.checkpointing else []
    shared += [] if given.model is None else ["--model", given.model]
    for engine in given.engines:
        for hidden in given.hidden if given.model is None else [0]:
            for tokens in given.tokens:
                words = ["--hidden", str(hidden), "--tokens", str(tokens), *shared]
                ways = run(("--engines", engine, *words), given.processes)
                if engine == "fsdp2-shard":
                    others = run(("--engines", "fsdp2", *words), given.processes)
                    ways = ways | {"logits": others["logits"]}
                show(f"{engine} {given.model or f'H {hidden}'}, {tokens} tokens", ways)


if __name__ == "__main__":
    main()
