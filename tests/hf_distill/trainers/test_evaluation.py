"""The loss of an evaluation: the mean over all that it scores, of a fixed loss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.evaluating import (
    RUNS,
    SUM_ERROR,
    Weighted,
    classify,
    distill,
    func,
    held_out,
    opsd,
)

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def mixed(trainer: Any, metrics: dict[str, float]) -> float:
    alpha = trainer.args.alpha
    assert isinstance(alpha, float)
    return alpha * metrics["eval_soft"] + (1 - alpha) * metrics["eval_hard"]


@pytest.mark.parametrize("run", RUNS)
def test_the_loss_is_one_mean_whatever_the_batch_size(tmp_path: Path, run: str) -> None:
    make, settings, is_mixed = RUNS[run]
    made = {x: make(tmp_path, per_device_eval_batch_size=x, **settings) for x in (1, 4)}
    found = {size: trainer.evaluate() for size, trainer in made.items()}
    for size, metrics in found.items():
        assert metrics["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=SUM_ERROR)
        if is_mixed:
            assert metrics["eval_loss"] == pytest.approx(mixed(made[size], metrics), rel=SUM_ERROR)


def test_weighted_tokens_are_the_weighted_mean(tmp_path: Path) -> None:
    """As if a token of weight 2 stood there twice."""
    metrics = distill(tmp_path, alpha=0.0, collator=Weighted()).evaluate()
    total = weight = 0.0
    for row in held_out():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_q = models.llama().double()(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for t, label in enumerate(row["labels"][1:]):
            if label != -100:
                own = 0.75 * (label % 4)
                total, weight = total - own * float(log_q[t, label]), weight + own
    assert metrics["eval_loss"] == pytest.approx(total / weight, rel=SUM_ERROR)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (distill, {}),
        (distill, {"family": "gpt2"}),
        (distill, {"family": "gpt2", "gradient_accumulation_steps": 3}),
        (distill, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}),
        (distill, {"compute_loss_func": func, "gradient_accumulation_steps": 3}),
        (classify, {"gradient_accumulation_steps": 3}),
        (classify, {"family": "llama", "gradient_accumulation_steps": 3}),
        (classify, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}),
    ],
)
def test_without_a_teacher_is_as_with_one_at_alpha_0(
    tmp_path: Path, make: Callable[..., Any], settings: dict[str, Any]
) -> None:
    """Training and evaluation, also where the Trainer's own loss is another mean."""
    settings = settings | {"alpha": 0.0, "per_device_train_batch_size": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "per_device_eval_batch_size": 4, "lr_scheduler_type": "linear"}
    with_one, without = (make(tmp_path, has_teacher=x, **settings) for x in (True, False))
    for trainer in (with_one, without):
        trainer.train()
    for name in ("loss", "eval_loss", "grad_norm"):
        mine, other = (
            [log[name] for log in trainer.state.log_history if name in log]
            for trainer in (with_one, without)
        )
        assert len(mine) == len(other) > 0
        # norms of gradients that rounding has passed through
        assert mine == pytest.approx(other, rel=1e-4 if name == "grad_norm" else SUM_ERROR)
    both = models.weights(with_one.model), models.weights(without.model)
    assert models.difference(*both) <= 2e-6  # see test_equivalence.py


@pytest.mark.parametrize(
    ("moves", "last", "factor"),
    [
        ({"temperature": "linear:3->1.5@4", "alpha": 1.0}, {"temperature": 1.5}, 1.0),
        ({"alpha": "linear:1->0.25@90"}, {"alpha": 0.25}, 1.0),
        ({"alpha": "linear:0.25->1@90"}, {"alpha": 1.0}, 1.0),
        # a moving beta divides the JSD by beta (1 - beta)
        (
            {"divergence": "jsd", "beta": "piecewise:0.5@0,0.1@2", "alpha": 1.0},
            {"beta": 0.1},
            0.09,
        ),
        (
            {"hidden_layers": "last", "hidden_weight": "linear:0->2@3"},
            {"hidden_weight": 2.0},
            1.0,
        ),
    ],
)
def test_schedules_have_their_last_values(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    moves: dict[str, Any],
    last: dict[str, Any],
    factor: float,
) -> None:
    """So that an unchanged student has the same loss at every step."""
    caplog.set_level("INFO")
    moving = distill(tmp_path, learning_rate=0.0, **moves)
    plain = distill(tmp_path, learning_rate=0.0, **moves | last).evaluate()["eval_loss"]
    before = moving.evaluate()["eval_loss"]
    moving.train()
    assert before == moving.evaluate()["eval_loss"]
    assert before == pytest.approx(plain / factor, rel=SUM_ERROR)
    ((name, value),) = last.items()
    assert caplog.text.count(f"those of the schedules' last values, {name} {value:g}") == 1


def test_the_best_model_is_chosen_by_a_fixed_loss(tmp_path: Path) -> None:
    """The loss of the present alpha would fall without any learning."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 3e-2}
    trainer = distill(tmp_path, alpha="linear:0->1@3", **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    for log in logs:
        assert log["eval_loss"] == pytest.approx(log["eval_soft"], rel=SUM_ERROR)
    best = min(logs, key=lambda log: log["eval_soft"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=SUM_ERROR)


@pytest.mark.parametrize("make", [distill, opsd, classify])
def test_evaluation_measures_the_cross_entropy_at_every_alpha(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    whole, half = make(tmp_path, alpha=1.0), make(tmp_path, alpha=0.5)
    metrics, want = whole.evaluate(), half.evaluate()
    assert metrics["eval_hard"] == pytest.approx(want["eval_hard"], rel=SUM_ERROR)
    assert metrics["eval_loss"] == pytest.approx(want["eval_soft"], rel=SUM_ERROR)
    if make is classify:
        assert "eval_perplexity" not in metrics
    else:
        assert metrics["eval_perplexity"] == math.exp(metrics["eval_hard"])
    whole.train()
    assert not any("hard" in log for log in models.steps(whole))  # nothing is spent in training


@pytest.mark.parametrize("prefix", ["eval", "test"])
def test_a_users_perplexity_stays(tmp_path: Path, prefix: str) -> None:
    trainer = distill(tmp_path, compute_metrics=lambda _: {"perplexity": 7.0})
    assert trainer.evaluate(metric_key_prefix=prefix)[f"{prefix}_perplexity"] == 7.0


def test_sampled_completions_have_no_perplexity(tmp_path: Path) -> None:
    """It would say how sure the student is of what it has written itself."""
    trainer = opsd(tmp_path, on_policy=True, alpha=1.0)
    metrics = trainer.evaluate()
    assert not {"eval_hard", "eval_perplexity"} & metrics.keys()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_soft"], rel=SUM_ERROR)
