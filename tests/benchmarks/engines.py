"""Peak memory and exchanged bytes of a step on an engine, by hidden states and by logits.

python -m tests.benchmarks.engines [--engines fsdp2 zero3] [--hidden 128 576] [--tokens 1020]

Each case is a run of its own processes on the CPU, the last of three steps is shown: what the step
added to the process's peak, its seconds, and the bytes of its collectives. Random models of two
layers; the teacher is as wide as the student.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_distill import DistillConfig, DistillTrainer
from tests.benchmarks.timing import resident_peak_mb
from tests.hf_distill.engines import cpu
from tests.hf_distill.engines.launching import started
from tests.hf_distill.engines.setups import ENGINES, Place
from tests.hf_distill.trainers import models

ROW = 256  # tokens
STEPS = 3


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


class Measured(DistillTrainer):
    """Measures its training steps."""

    found: dict[str, Any]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start = resident_peak_mb(), time.perf_counter()
        with Exchanged() as exchanged:
            loss = super().training_step(*args, **kwargs)
        self.found = {
            "MB": resident_peak_mb() - before,
            "s": time.perf_counter() - start,
            "MB exchanged": {k: v / 2**20 for k, v in exchanged.sizes.items()},
            "calls": dict(exchanged.calls),
        }
        return loss


def measure(engine: str, hidden: int, tokens: int, vocab: int, by_logits: bool) -> None:
    """Be one process: train, and print what the last step took."""
    torch.set_num_threads(1)
    cpu.take_processes_for_devices()
    if engine.startswith("zero"):
        cpu.without_compiled_ops()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": vocab}
    sizes["max_position_embeddings"] = ROW
    rows = tokens // (ROW - 1)
    generator, data = torch.Generator().manual_seed(0), []
    for _ in range(rows * world * STEPS):
        ids = torch.randint(3, vocab, (ROW,), generator=generator).tolist()
        data.append({"input_ids": ids, "attention_mask": [1] * ROW, "labels": ids})
    place = Place(Path(tempfile.mkdtemp()), engine, world)
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    args = DistillConfig(**place.options(**settings, watchdog={"action": "off"}))
    students = models.llama(0, **sizes), models.llama(1, **sizes)
    trainer = Measured(students[0], args, models.Pad(), data, teacher=students[1])
    if by_logits:
        trainer._reader._refusal = "asked for"
    trainer.train()
    if rank == 0:
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        print("FOUND" + json.dumps(trainer.found | {"loss": losses[-1]}), flush=True)
    torch.distributed.destroy_process_group()


def run(words: list[str], processes: int) -> dict[str, Any]:
    """Measure in processes of their own."""
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        for process in started(["tests.benchmarks.engines", "--process", *words], files):
            process.wait()
        files[0].seek(0)
        text = files[0].read()
    lines = [line for line in text.splitlines() if line.startswith("FOUND")]
    assert lines, text[-3000:]
    return json.loads(lines[-1].removeprefix("FOUND"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["fsdp2", "zero3"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 576])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1020])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--by-logits", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        sizes = given.hidden[0], given.tokens[0], given.vocab
        measure(given.engines[0], *sizes, by_logits=given.by_logits)
        return
    for engine in given.engines:
        for hidden in given.hidden:
            for tokens in given.tokens:
                words = ["--engines", engine, "--hidden", str(hidden), "--tokens", str(tokens)]
                words += ["--vocab", str(given.vocab)]
                fused = run(words, given.processes)
                logits = run([*words, "--by-logits"], given.processes)
                print(f"{engine} H {hidden} tokens {tokens} V {given.vocab}")
                for name, found in (("hidden states", fused), ("logits", logits)):
                    parts = [f"{k} {v:.1f} MiB" for k, v in found["MB exchanged"].items()]
                    calls = sum(found["calls"].values())
                    print(
                        f"  {name:14s} {found['MB']:7.0f} MB {found['s']:6.2f} s "
                        f"loss {found['loss']:.6f}  {', '.join(parts)} in {calls} calls"
                    )
                memory, seconds = (fused[name] / logits[name] for name in ("MB", "s"))
                print(f"  memory {memory:.2f}, time {seconds:.2f}")


if __name__ == "__main__":
    main()
