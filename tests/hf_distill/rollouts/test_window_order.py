"""The rows of a step's micro-batches: like lengths together, and the same step as before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import OPSDConfig
from hf_distill.data.episodes import Episode
from hf_distill.rollouts import rollout
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_opsd_trainer import Watched, rows_of

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

WORDS = [1, 7, 3, 9, 2, 8, 5, 4]  # of the prompts
# a step of 0.01 and more on weights of which the largest have a spacing of 2^-23; measured: 2^-23
WEIGHT_ERROR = 2.0**-21
SUM_ERROR = 4e-6  # relative, of a float32 mean over some 60 tokens


def problems() -> list[dict[str, str]]:
    words = models.TEXT.split()
    return [
        {"prompt": " ".join(words[:n]), "hint": words[n], "completion": " ".join(words[n : 2 * n])}
        for n in WORDS
    ]


def start() -> Any:
    model: Any = models.llama()
    with torch.no_grad():  # the end token is likely
        model.lm_head.weight[models.EOS] = 0.3 * model.lm_head.weight[5:20].sum(0)
    return model


def train(folder: Path, **changes: Any) -> Watched:
    settings = {
        "max_completion_length": 9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "rollout": {"temperature": 1.0},
    }
    run = Watched(
        start(),
        OPSDConfig(**models.options(folder, **settings | changes)),
        train_dataset=problems(),
        processing_class=models.tokenizer(),
    )
    run.train()
    return run


def in_order_of_data(monkeypatch: Any, folder: Path, **changes: Any) -> Watched:
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "_order", lambda x: list(range(sum(map(len, x)))))
        return train(folder, **changes)


def test_longest_rows_are_first_and_ties_keep_their_order() -> None:
    made = [Episode({}, "", context=[0] * n, completions=[[0] * 2]) for n in (3, 5, 3, 4, 5)]
    assert rollout._order([made[:2], made[2:4], made[4:]]) == [1, 4, 3, 0, 2]
    assert rollout._order([made]) == [0, 1, 2, 3, 4]
    assert rollout._dealt([["a", "b"], ["c"]], [2, 0, 1]) == [["c", "a"], ["b"]]


def test_rows_of_a_micro_batch_have_like_lengths(tmp_path: Path, monkeypatch: Any) -> None:
    run = train(tmp_path)
    rows = [row for batch in run.trained for row in rows_of(batch)]
    lengths = list(map(len, rows))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    plain = in_order_of_data(monkeypatch, tmp_path)
    others = [row for batch in plain.trained for row in rows_of(batch)]
    assert others != rows
    assert sorted(others) == sorted(rows)
    sizes = [sum(batch["input_ids"].numel() for batch in x.trained) for x in (run, plain)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("anchor_weight", [0.0, 0.5])
def test_the_step_is_the_one_in_the_order_of_the_data(
    tmp_path: Path, monkeypatch: Any, anchor_weight: float
) -> None:
    changes = {"anchor_weight": anchor_weight, "optim": "sgd", "learning_rate": 1.0}
    runs = train(tmp_path, **changes), in_order_of_data(monkeypatch, tmp_path, **changes)
    found, logs = [models.weights(x.model) for x in runs], [x.state.log_history[0] for x in runs]
    assert models.difference(found[0], models.weights(start())) > 1e4 * WEIGHT_ERROR
    assert models.difference(*found) <= WEIGHT_ERROR
    for name in ("loss", "soft", "tokens", "completion_length"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=SUM_ERROR)


def test_the_table_of_completions_is_in_the_order_of_the_data(tmp_path: Path) -> None:
    train(tmp_path, log_completions=1)
    rows = [json.loads(x) for x in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["prompt"].strip() for row in rows] == [row["prompt"] for row in problems()]
    assert [row["hints"] for row in rows] == [[row["hint"]] for row in problems()]
