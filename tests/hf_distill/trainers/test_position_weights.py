"""Weights by position, by unsureness, by drift and of failures: against loops of this file."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill import Attempt, DistillConfig, DistillTrainer, Feedback, OPSDConfig, OPSDTrainer
from hf_distill.cache import CachedTeacher, cache_teacher
from hf_distill.data.position_weights import PositionWeights
from hf_distill.data.token_weights import KEY
from hf_distill.losses.drift import MOST_NATS, Drift, drift_factors
from hf_distill.models import Signal
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.reading import ReadsLogits

SUM_ERROR = 2e-6  # relative, of a float32 mean over some 70 tokens; measured: 1e-7
LATE = {"position": "late", "skip_first": 2, "entropy": -1.3, "entropy_floor": 0.3, "drift": 0.8}


def sharp(model: nn.Module) -> nn.Module:
    """As sure of some tokens as trained models are, and unsure of others."""
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


def place_weight(kind: str, i: int, n: int, floor: float, middle: float, width: float) -> float:
    """Of the i-th scored token of n, from 1."""
    if kind == "none":
        return 1.0
    u = (i - 0.5) / n
    up = 1 / (1 + math.exp(-(u - middle) / width))
    return floor + (1 - floor) * (up if kind == "late" else 1 - up)


@pytest.mark.parametrize("kind", ["none", "early", "late"])
@pytest.mark.parametrize("skip_first", [0, 2])
def test_a_weight_by_position_is_that_of_a_loop(kind: str, skip_first: int) -> None:
    labels = torch.tensor([[7, 5, -100, 6, 7, -100, 8, 9], [-100] * 3 + [4] * 2 + [-100] * 3])
    shape = (0.1, 0.4, 0.05)
    found = PositionWeights(kind, *shape, skip_first)(labels)
    want = torch.zeros(2, 8)
    for row, places in enumerate(([1, 3, 4, 6, 7], [3, 4])):  # nothing predicts a row's first
        for i, at in enumerate(places, 1):
            if i > skip_first:
                want[row, at] = place_weight(kind, i, len(places), *shape)
    torch.testing.assert_close(found, want)
    assert labels[0, 0] == 7, "the labels themselves stay"


class ByHand:
    """The weighted mean loss of rows in one step, with all factors, from loops in float64."""

    def __init__(self, data: list[dict[str, list[int]]], drift: float) -> None:
        student, teacher = models.llama().double(), sharp(models.llama(1)).double()
        total, weights, self.places, self.factors, self.drifts = 0.0, 0.0, [], [], []
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                z, w = (m(input_ids=ids).logits[0, :-1] for m in (student, teacher))
            at = [t for t, label in enumerate(row["labels"]) if t and label != -100]
            q, p = z.log_softmax(-1), w.log_softmax(-1)
            warm = (w / 2).log_softmax(-1) - (z / 2).log_softmax(-1)
            apart = [abs(float(p[t - 1, ids[0, t]] - q[t - 1, ids[0, t]])) for t in at]
            for i, t in enumerate(at, 1):
                entropy = float(-(p[t - 1].exp() * p[t - 1]).sum()) / math.log(models.VOCAB)
                factor = max(0.3, 1 - 1.3 * entropy)
                place = place_weight("late", i, len(at), 0.25, 0.3, 0.1) if i > 2 else 0.0
                gone = sum(apart[: i - 1]) / sum(apart)
                far = 1 + drift * (1 - gone)
                soft = ((w[t - 1] / 2).softmax(-1) * warm[t - 1]).sum()
                hard = F.cross_entropy(z[t - 1], ids[0, t])
                total += place * factor * (far * 4 * float(soft) + float(hard)) / 2
                weights += place * factor
                self.places.append(place)
                self.factors.append(factor)
                self.drifts.append(far)
        self.loss = total / weights
        assert 0.3 in self.factors
        assert max(self.factors) > 0.4


def make(folder: Path, kind: Any = DistillTrainer, **settings: Any) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, token_weights=LATE | settings))
    teacher = sharp(models.llama(1))
    return kind(models.llama(), args, models.Pad(), models.rows(), models.rows(8), teacher=teacher)


def step_loss(trainer: DistillTrainer, size: int) -> tuple[float, float]:
    """The loss of a step on eight rows, and the sum of the tokens' shares of it."""
    batches = [models.Pad()(models.rows()[i : i + size]) for i in range(0, 8, size)]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.model.train()
    shares: list[float] = []
    tokens_of = trainer.task.tokens

    def noted(batch: Any, training: bool) -> Any:
        tokens = tokens_of(batch, training)
        shares.append(tokens.weights.sum().item())
        return tokens

    trainer.task.tokens = noted
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, x, num_items_in_batch=count) for x in batches]
    trainer.task.tokens = tokens_of
    return sum(x.item() for x in losses), sum(shares)


@pytest.mark.parametrize("kind", [DistillTrainer, ReadsLogits])
def test_all_factors_together_are_those_of_loops(tmp_path: Path, kind: Any) -> None:
    """And shares sum to 1 over a step, however it is cut into micro-batches."""
    want = ByHand(models.rows()[:8], LATE["drift"])
    trainer = make(tmp_path, kind)
    for size in (8, 4, 1):
        loss, shares = step_loss(trainer, size)
        assert loss == pytest.approx(want.loss, rel=SUM_ERROR)
        assert shares == pytest.approx(1.0, rel=SUM_ERROR)
    assert abs(ByHand(models.rows()[:8], 0.0).loss - want.loss) > 1000 * SUM_ERROR


def test_the_logged_factors_are_means_over_all_scored_tokens(tmp_path: Path) -> None:
    trainer, want = make(tmp_path), ByHand(models.rows()[:8], LATE["drift"])
    step_loss(trainer, 4)
    logs = trainer._read_metrics(training=True)
    of = {"position_factor": want.places, "entropy_factor": want.factors}
    for name, values in of.items():
        assert logs[name] == pytest.approx(sum(values) / len(values), rel=SUM_ERROR)
    # what a loss measures is of the tokens with a weight
    some = [x for x, place in zip(want.drifts, want.places, strict=True) if place]
    assert logs["drift_factor"] == pytest.approx(sum(some) / len(some), rel=SUM_ERROR)


def test_an_evaluation_has_no_drift(tmp_path: Path) -> None:
    metrics = make(tmp_path).evaluate()
    want = ByHand(models.rows(8), 0.0)
    assert metrics["eval_loss"] == pytest.approx(want.loss, rel=SUM_ERROR)
    assert "eval_drift_factor" not in metrics


def test_drift_where_a_side_excludes_a_token_or_both_agree() -> None:
    predicts = torch.tensor([[True, True, True, False], [False, True, True, False]])
    q, p = torch.zeros(5, 6), torch.zeros(5, 6)
    p[1, 2] = -torch.inf  # the second token of the first row
    targets = torch.full((5,), 2)
    found = drift_factors(Drift(0.5, predicts), Signal(logits=q), Signal(logits=p), targets)
    assert found.tolist() == pytest.approx([1.5, 1.5, 1.0, 1.5, 1.5], abs=1e-4)  # 1 / MOST_NATS
    assert MOST_NATS == 1e4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy": float("nan")}, "token_weights.entropy must be finite, got nan"),
        ({"entropy": -1.0, "entropy_floor": 0.0}, r"entropy_floor must be in \(0, 1\], got 0.0"),
        ({"position": "middle"}, "position must be one of .*, got 'middle'"),
        ({"position_floor": 1.5}, r"position_floor must be in \[0, 1\], got 1.5"),
        ({"position_middle": -0.1}, r"position_middle must be in \[0, 1\], got -0.1"),
        ({"position_width": 0.0}, "position_width must be positive, got 0.0"),
        ({"skip_first": -1}, "skip_first must be an int of at least 0, got -1"),
        ({"skip_first": 1.5}, "skip_first must be an int of at least 0, got 1.5"),
        ({"drift": -1.0}, "drift must be at least 0 and finite, got -1.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir="out", report_to="none", token_weights=settings)


def test_drift_needs_probabilities_of_all_tokens(tmp_path: Path) -> None:
    cache_teacher(models.llama(1), models.rows(), tmp_path / "cache", data_collator=models.Pad())
    args = DistillConfig(**models.options(tmp_path, token_weights={"drift": 0.5}))
    message = "drift needs the teacher's probability of each token of the student, got 0.5 and a C"
    teacher = CachedTeacher(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        DistillTrainer(models.llama(), args, models.Pad(), models.rows(), teacher=teacher)


def judge(attempts: list[Attempt]) -> list[Feedback]:
    """Every second attempt has succeeded."""
    return [Feedback(columns={"score": float(i % 2)}) for i, _ in enumerate(attempts)]


def on_policy(folder: Path, environment: Any, **rollout: Any) -> OPSDTrainer:
    settings = {"max_completion_length": 4, "max_steps": 1, "rollout": rollout}
    return OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, gradient_accumulation_steps=2, **settings)),
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
        environment=environment,
    )


def test_only_failed_completions_are_trained_on(tmp_path: Path) -> None:
    """Of two micro-batches of four rows half have failed."""
    trainer = on_policy(tmp_path, judge, only_failed=True)
    seen: list[tuple[Tensor, list[float]]] = []
    batch_of = trainer.rollouts.batch

    def noted(model: Any, episodes: Any, collator: Any) -> Any:
        made = batch_of(model, episodes, collator)
        seen.append((made, [episode.columns["score"] for episode in episodes]))
        return made

    trainer.rollouts.batch = noted
    trainer.train()
    (step,) = models.steps(trainer)
    assert step["failed"] == 0.5
    assert len(seen) == 2
    scored = 0
    for batch, scores in seen:
        assert batch[KEY].shape == batch["labels"].shape
        for weights, labels, score in zip(batch[KEY], batch["labels"], scores, strict=True):
            assert set(weights.tolist()) == {0.0 if score else 1.0}
            scored += 0 if score else int((labels != -100).sum())
    assert step["tokens"] == scored


def test_only_failed_needs_a_score(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only_failed needs an environment that scores, got None"):
        on_policy(tmp_path, None, only_failed=True)
    silent = on_policy(tmp_path, lambda x: [Feedback() for _ in x], only_failed=True)
    with pytest.raises(ValueError, match=r"a score of each completion, Feedback.*columns \[\]"):
        silent.train()
