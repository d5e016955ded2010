"""Tokens per second and memory of packed against padded rows: `python -m tests.benchmarks.packed`.

    --rows FILE     JSON lines with question and answer, as GSM8K's train.jsonl
    --model FOLDER  student and teacher with their tokenizer, else a small random Llama, whose rows
                    have a token for each word, number and sign of the text
    --attn NAME     attn_implementation of both
    --batch N       rows of a step, 16 by default
    --steps N       measured steps of each, behind one that is not
    --threads N     of the processor, 1 by default

Each collator trains in a process of its own; they take the same steps in turns. Tokens are those of
the rows, without padding. Shown are medians by the clock and by the processor's time, which other
programs disturb less, and the largest peak of memory beyond what was taken before the first step.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.data import pad
from tests.benchmarks.step_worker import resident_mb

VOCAB = 8192
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB}
KINDS = ("padded", "packed")


def texts(path: str, count: int) -> list[tuple[str, str]]:
    """Return the first questions and answers."""
    with Path(path).open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    return [(row["question"], row["answer"]) for row in rows]


def tokenised(given: argparse.Namespace, count: int) -> list[dict[str, list[int]]]:
    """Return rows of ids whose question has no labels."""
    tokenizer = AutoTokenizer.from_pretrained(given.model) if given.model else None
    rows = []
    for each in texts(given.rows, count):
        if tokenizer is None:
            parts = [re.findall(r"\w+|[^\w\s]", text) for text in each]
            question, answer = ([hash(x) % (VOCAB - 1) + 1 for x in part] for part in parts)
        else:
            question, answer = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in each)
        labels = [-100] * len(question) + answer
        rows.append({"input_ids": question + answer, "labels": labels})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collate with padding on the right."""
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    ones = [[1] * len(row) for row in ids]
    return {"input_ids": pad(ids, 0), "attention_mask": pad(ones, 0), "labels": pad(labels, -100)}


def model(given: argparse.Namespace, seed: int) -> Any:
    """Return the student or the teacher."""
    if given.model:
        return AutoModelForCausalLM.from_pretrained(given.model, attn_implementation=given.attn)
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, **HEADS)
    return LlamaForCausalLM._from_config(config, attn_implementation=given.attn)


def train(kind: str, given: argparse.Namespace, pipe: Connection) -> None:
    """Take a step at each message, and answer with what it took."""
    torch.set_num_threads(given.threads)
    os.environ["PYTHONHASHSEED"] = "0"
    rows = tokenised(given, given.batch * (given.steps + 1))
    folder = tempfile.mkdtemp()
    args = DistillConfig(folder, report_to="none", use_cpu=True, alpha=0.5)
    collator = padded if kind == "padded" else DataCollatorWithFlattening()
    run = DistillTrainer(model(given, 0), args, collator, rows, teacher=model(given, 1))
    student = run.model.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    before = resident_mb("VmRSS")
    for step in range(given.steps + 1):
        pipe.recv()
        batch = collator(rows[step * given.batch : (step + 1) * given.batch])
        count = (batch["labels"][:, 1:] != -100).sum()
        clock, cpu = time.perf_counter(), time.process_time()
        loss = run.compute_loss(student, batch, num_items_in_batch=count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send(
            {
                "s": time.perf_counter() - clock,
                "CPU s": time.process_time() - cpu,
                "MB": resident_mb("VmHWM") - before,
                "loss": float(loss.detach()),
                "tokens": sum(
                    len(x["input_ids"]) for x in rows[step * given.batch :][: given.batch]
                ),
                "positions": batch["input_ids"].numel(),
            }
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--model")
    parser.add_argument("--attn", default="packed_sdpa")
    for name, value in (("batch", 16), ("steps", 6), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    os.environ["PYTHONHASHSEED"] = "0"
    runs = {}
    for kind in KINDS:
        here, there = context.Pipe()
        process = context.Process(target=train, args=(kind, given, there))
        process.start()
        runs[kind] = here, process
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(given.steps + 1):
        for kind, (pipe, _) in runs.items():
            pipe.send("go")
            found[kind].append(pipe.recv())
    for _, process in runs.values():
        process.join()
    show(found)


def show(found: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, and packed over padded."""
    rates: dict[str, list[float]] = {}
    for kind, steps in found.items():
        steps = steps[1:]
        rates[kind] = [
            statistics.median(step["tokens"] / step[unit] for step in steps)
            for unit in ("s", "CPU s")
        ]
        rates[kind].append(max(step["MB"] for step in steps))
        filled = sum(x["tokens"] for x in steps) / sum(x["positions"] for x in steps)
        print(
            f"{kind}: {rates[kind][0]:.0f} tokens/s, {rates[kind][1]:.0f} tokens per CPU second, "
            f"{rates[kind][2]:.0f} MB, {filled:.0%} of the positions are tokens"
        )
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(*found.values(), strict=True))
    by_clock, by_cpu, memory = (b / a for a, b in zip(*rates.values(), strict=True))
    print(
        f"packed over padded: {by_clock:.2f} times the tokens/s, {by_cpu:.2f} per CPU second, "
        f"{memory:.2f} of the memory; losses differ by {apart:.1g}; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
