"""An evaluation by two processes is that by one: rows that fill the last batch do not count."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill.monitoring.metrics import UNSCORED
from tests.hf_distill.trainers import evaluating, models
from tests.processes import run_two

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings(models.PEFT_WARNING),
]

# how many rows are evaluated, and how many make a batch of one process
SHAPES = [(9, 2), (5, 4), (2, 4)]
NAMES = ("loss", "soft", "hard", "tokens", "rows", "top1_agreement", "hidden", "perplexity")
SAMPLED: dict[str, Any] = {"on_policy": True, "rollout": {"temperature": 0.0}}
CHOSEN = ("kd", "kd-soft-alone", "kd-logits", "kd-weights", "kd-hidden", "opsd", "classes")
CHOSEN += ("classes-llama", "no-teacher", "no-teacher-gpt2", "no-teacher-classes-llama")
RUNS = {name: evaluating.RUNS[name][:2] for name in CHOSEN}
RUNS["opsd-sampled"] = evaluating.opsd, SAMPLED
TRAINED = ("kd", "kd-logits", "kd-weights", "no-teacher", "no-teacher-gpt2")


def evaluate(folder: Path, run: str, rows: int, size: int, with_metrics: bool) -> dict[str, Any]:
    make, settings = RUNS[run]
    trainer = make(folder, per_device_eval_batch_size=size, **settings)
    seen: list[int] = []
    if with_metrics:
        trainer.compute_metrics = lambda x: seen.append(len(x.label_ids)) or {}
    metrics = trainer.evaluate(trainer.eval_dataset[:rows])
    return {**metrics, "seen": seen}


def all_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = {
        f"{run} {rows} {size}": evaluate(folder, run, rows, size, False)
        for run in RUNS
        for rows, size in SHAPES
    }
    for run in ("kd", "classes", "no-teacher", "opsd"):
        found[f"{run} metrics"] = evaluate(folder, run, 5, 2, True)
    return found | {f"{run} trained": train(folder, run, 2) for run in TRAINED}


def train(folder: Path, run: str, size: int) -> dict[str, Any]:
    """Three steps of four rows: of the first two have labels, of the second none."""
    make, settings = RUNS[run]
    trainer = make(folder, per_device_train_batch_size=size, optim="sgd", **settings)
    rows = trainer.train_dataset
    for i in range(2, 8):
        rows[i] = rows[i] | {"labels": [-100] * len(rows[i]["labels"])}
    trainer.train()
    return {"weights": models.weights(trainer.model), "logs": models.steps(trainer)}


def of_a_process(folder: Path) -> None:
    torch.save(all_of(folder), folder / f"{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    run_two(folder, of_a_process, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(found: dict[str, Any], want: dict[str, Any]) -> None:
    names = {f"eval_{name}" for name in NAMES} & want.keys()
    assert "eval_loss" in names
    assert {x: found[x] for x in names} == pytest.approx(
        {x: want[x] for x in names}, rel=evaluating.SUM_ERROR
    )


@pytest.mark.parametrize(("rows", "size"), SHAPES)
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_one(
    two_processes: list[dict[str, Any]], tmp_path: Path, run: str, rows: int, size: int
) -> None:
    want = evaluate(tmp_path, run, rows, size, False)
    for results in two_processes:
        assert_same(results[f"{run} {rows} {size}"], want)


@pytest.mark.parametrize("run", ["kd", "classes", "no-teacher", "opsd"])
def test_users_of_predictions_get_each_row_once(
    two_processes: list[dict[str, Any]], tmp_path: Path, run: str
) -> None:
    want = evaluate(tmp_path, run, 5, 2, True)
    for results in two_processes:
        assert_same(results[f"{run} metrics"], want)
        assert results[f"{run} metrics"]["seen"] == want["seen"] == [5]


@pytest.mark.parametrize("run", TRAINED)
def test_steps_without_labels_on_one_process_or_both(
    two_processes: list[dict[str, Any]], tmp_path: Path, run: str
) -> None:
    want = train(tmp_path, run, 4)
    for results in two_processes:
        found = results[f"{run} trained"]
        assert models.difference(found["weights"], want["weights"]) <= 2e-6  # see test_ddp.py
        assert found["logs"][1]["grad_norm"] == 0.0
        counted = [log.get(UNSCORED) for log in found["logs"]]
        assert counted == ([None] * 3 if run.startswith("no-") else [1, 2, None])
