"""Time and memory of whole training steps, ours and TRL's: `python -m tests.benchmarks.steps`.

    --model FOLDER    a model with its tokenizer, else a small random Llama
    --profile         also the parts of our on-policy steps
    --against FOLDER  also our steps with another checkout of this repository, in the same run

Every trainer runs in a process of its own, and they take their steps in turns. Greedy decoding and
a learning rate of 0 give all of them the same completions at every step. Shown are medians of a
step's seconds, by the clock and of the processor, and the largest peak of memory beyond what the
process took before models were loaded; in brackets as a share of ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.step_worker import CASES, ON_POLICY, PARTS, SIZES
from tests.docs.tiny import tokenizer

WORKER = Path(__file__).with_name("step_worker.py")


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, name: str, words: list[str], folder: str) -> None:
        path = os.pathsep.join(x for x in (folder, os.environ.get("PYTHONPATH")) if x)
        env = os.environ | {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}
        # -P: the folder of this file has names of other modules
        command = [sys.executable, "-P", str(WORKER), "--name", name, *words]
        self.name, self.steps = name, []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until `end`
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} has ended: {self.errors.read()[-3000:]}")
        return json.loads(line)

    def step(self) -> None:
        """Let it take a step."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._read()
        self.steps.append(found)
        print(f"{self.name}: {found['s']:.1f} s, {found['CPU s']:.1f} CPU s", file=sys.stderr)

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()
        self.errors.close()

    def median(self, name: str) -> float:
        """Return the median over its steps."""
        return statistics.median(step[name] for step in self.steps)


def run(case: str, given: argparse.Namespace, words: list[str]) -> None:
    """Measure a case and print it."""
    here = str(Path(__file__).parents[2])
    words = [*words, "--case", case, *(["--profile"] if given.profile else [])]
    others = [] if given.without_trl else [("TRL", here)]
    if given.against is not None:
        others.insert(0, ("before", given.against))
    workers = [Worker(name, words, folder) for name, folder in [("ours", here), *others]]
    for _ in range(given.repeats):
        for worker in workers:
            worker.step()
    for worker in workers:
        worker.end()
    print(f"\n{case}")
    for worker in workers:
        cells = ""
        for name in ("s", "CPU s", "MB"):
            found, own = worker.median(name), workers[0].median(name)
            cells += f"{found:10.2f} {name} ({found / own:.2f})"
        last = worker.steps[-1]
        length = "" if last["length"] is None else f", {last['length']:.1f} new tokens a row"
        print(f"  {worker.name:7}{cells}, loss {last['loss']:.4f}{length}", flush=True)
    for worker in workers if given.profile and case in ON_POLICY else ():
        if worker.name != "TRL":
            show_parts(case, worker)


def show_parts(case: str, worker: Worker) -> None:
    """Print the parts of a step, each the median over steps."""
    whole = worker.median("CPU s")
    found = {x: statistics.median(step["parts"][x] for step in worker.steps) for x in PARTS}
    rests = [step["CPU s"] - sum(step["parts"].values()) for step in worker.steps]
    found["rest"] = statistics.median(rests)
    print(f"\n{case}, {worker.name}\n\n| part | CPU seconds | share |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.1%} |")
    print(f"| the step | {whole:.2f} | |", flush=True)


def small_model(folder: str) -> str:
    """Write a random Llama whose words are characters, and return its folder."""
    words = tokenizer("</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    ids = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # so that completions differ, and some end
        head = model.lm_head.weight
        head[1] = 0.25 * head[5:20].sum(0)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--batch", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--new_tokens", type=int, default=128, help="at most, of a completion")
    parser.add_argument("--repeats", type=int, default=7, help="counted steps of each trainer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--profile", action="store_true", help="also the parts of our on-policy steps"
    )
    parser.add_argument("--against", help="another checkout of this repository")
    parser.add_argument("--without-trl", action="store_true", help="our steps only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", given.model or small_model(folder)]
        for name in SIZES:
            words += [f"--{name}", str(getattr(given, name))]
        print(", ".join(f"{name} {getattr(given, name)}" for name in SIZES))
        for case in given.cases:
            run(case, given, words)


if __name__ == "__main__":
    main()
