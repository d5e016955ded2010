"""Rollouts by a real vLLM in this process, against `generate`; run in vLLM's venv.

python -m tests.hf_distill.servers.colocated MODEL [--packed]

Prints one JSON object. On a CPU vLLM packs the weights of linear layers and cannot be sent new
ones, so that they are left as they are here, unless --packed asks for what the engine says then.
"""

import argparse
import importlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models

NEW_TOKENS = 12
STEPS = 3
PROMPTS = ["The capital of France is", "2 + 2 =", "def add(a, b):", "Once upon a time there"]
ROWS = [
    {"prompt": f"{a} plus {a + 1} is", "hint": f" ({a} + {a + 1} = {2 * a + 1})"} for a in range(6)
]
OPTIONS = {"dtype": "float32", "max_model_length": 128, "max_num_seqs": 8}


def start_plainly(packed: bool) -> None:
    """Let vLLM start without compiling, and keep the weights of linear layers where they are."""
    generation: Any = importlib.import_module("trl.generation.vllm_generation")
    generation.LLM = partial(generation.LLM, enforce_eager=True)
    layers: Any = importlib.import_module("vllm.model_executor.layers.utils")

    def unpacked(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    if not packed:
        layers.dispatch_cpu_unquantized_gemm = unpacked


def trainer(name: str, engine: str, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rollout = {"engine": engine, "temperature": 0.0}
    if engine == "vllm":
        rollout["engine_kwargs"] = OPTIONS
    options = models.options(
        folder,
        rollout=rollout,
        max_steps=STEPS,
        max_completion_length=NEW_TOKENS,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=0.01,
        log_completions=1,
    )
    return OPSDTrainer(
        model, OPSDConfig(**options), HintCollator(tokenizer), ROWS, processing_class=tokenizer
    )


def greedy(of: Any, model: Any, tokenizer: Any) -> list[list[int]]:
    of.weights_changed()
    return of.sample(model, tokenizer(PROMPTS)["input_ids"], 0)


def moved(model: Any) -> None:
    """Other weights, as of a large step."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp" in name:
                p.add_(0.3 * p.std() * torch.randn(p.shape, generator=generator))


def completions(folder: Path) -> list[Any]:
    lines = (folder / "completions.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]


def record(name: str, engine: str, folder: Path) -> dict[str, Any]:
    """Greedy tokens, a short training, and greedy tokens of other weights."""
    made = trainer(name, engine, folder)
    sampler, tokenizer = made.rollouts.engine, made.processing_class
    before = greedy(sampler, made.model, tokenizer)
    made.train()
    logs = [x for x in made.state.log_history if "loss" in x]
    moved(made.model)
    return {
        "before": before,
        "losses": [x["loss"] for x in logs],
        "grad_norms": [x["grad_norm"] for x in logs],
        "completions": completions(folder),
        "moved": greedy(sampler, made.model, tokenizer),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--packed", action="store_true")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are read in this process
    start_plainly(arguments.packed)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.packed:
            # one model at a time is in memory
            found = {
                engine: record(arguments.model, engine, Path(folder, engine))
                for engine in ("generate", "vllm")
            }
        else:
            try:
                trainer(arguments.model, "vllm", Path(folder))
                found: dict[str, Any] = {"said": None}
            except ValueError as error:
                found = {"said": str(error)}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
