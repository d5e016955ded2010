"""Packed batches of two processes, filled up to a number of tokens, are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models
from tests.processes import run_two

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS = models.rows(24)
EVALUATED = 5  # by two processes of two rows: three of eight rows fill the last batches


def distilled(folder: Path, **options: Any) -> DistillTrainer:
    args = DistillConfig(**options | {"per_device_eval_batch_size": 2, "alpha": 0.5})
    return DistillTrainer(
        models.llama(), args, DataCollatorWithFlattening(), ROWS, ROWS[:EVALUATED],
        teacher=models.llama(1),
    )  # fmt: skip


def hinted(folder: Path, **options: Any) -> OPSDTrainer:
    collator = HintCollator(models.tokenizer(), packing=True)
    options |= {"on_policy": False, "max_tokens_per_batch": 70, "per_device_eval_batch_size": 2}
    rows = models.problems(24)
    return OPSDTrainer(
        models.llama(), OPSDConfig(**options), collator, rows, rows[:EVALUATED],
        collator.tokenizer, teacher=models.llama(1),
    )  # fmt: skip


RUNS = {"distilled": distilled, "hinted": hinted}


def trained(folder: Path, name: str, num_batches: int) -> dict[str, Any]:
    options = models.options(
        folder, max_steps=3, max_tokens_per_batch=40, per_device_train_batch_size=8,
        gradient_accumulation_steps=num_batches, train_sampling_strategy="random", optim="sgd",
    )  # fmt: skip
    run = RUNS[name](folder, **options)
    run.train()
    found = {"weights": models.weights(run.model), "logs": models.steps(run)}
    return found | {"evaluated": run.evaluate()}


def of_a_process(folder: Path) -> None:
    found = {name: trained(folder, name, 1) for name in RUNS}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


def test_two_processes_are_one_with_two_batches(tmp_path: Path) -> None:
    run_two(tmp_path, of_a_process, tmp_path)
    for rank in range(2):
        each = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, found in each.items():
            want = trained(tmp_path, name, 2)
            assert models.difference(found["weights"], want["weights"]) <= 2e-6
            for one, other in zip(found["logs"], want["logs"], strict=True):
                for metric in ("loss", "soft", "tokens"):
                    assert one[metric] == pytest.approx(other[metric], rel=1e-4), (name, metric)
            for metric in ("eval_loss", "eval_hard", "eval_tokens"):
                got = found["evaluated"][metric]
                assert got == pytest.approx(want["evaluated"][metric], rel=1e-5), (name, metric)
