"""A user's loss in runs: its metrics, what it keeps, its chunks, a search for settings."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer_utils import HPSearchBackend

from hf_distill import DistillTrainer
from hf_distill.losses import Loss, chunks
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.own_losses import MEASURED, Measuring, distill, forward_kl

ROWS = 4 * 3  # a training step of 3 micro-batches of 4
LOGGED = {"loss", "grad_norm", "learning_rate", "epoch", "step", "teacher_drift"}
NAMES = {"target_id", "teacher_right", "above_30", "width"}
SUM_ERROR = 1e-6  # relative, of a float64 sum of float32 values


def by_hand(counted: Any = lambda token: True, rows: int = ROWS) -> dict[str, float]:
    """The means of `Measuring` over the labelled tokens of the first rows, one row at a time."""
    teacher, found = models.llama(1), []
    for row in models.rows()[:rows]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            best = teacher(input_ids=ids).logits[0, :-1].argmax(-1)
        pairs = zip(labels[1:].tolist(), best.tolist(), strict=True)
        found += [(y, y == top) for y, top in pairs if y != -100 and counted(y)]
    above = [y for y, _ in found if y > 30]
    return {
        "target_id": sum(y for y, _ in found) / len(found),
        "teacher_right": sum(right for _, right in found) / len(found),
        "above_30": sum(above) / len(above),
        "width": models.VOCAB,
        "tokens": len(found),
    }


def only_odd(batch: Any) -> dict[str, Tensor]:
    made = models.Pad()(batch)
    return made | {"token_weights": (made["input_ids"] % 2) * 1.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hidden states", "logits"])
@pytest.mark.parametrize("rows", [4, 1], ids=lambda rows: f"batches of {rows}")
def test_an_own_loss_logs_its_metrics_and_no_others(
    tmp_path: Path, rows: int, smoothing: float
) -> None:
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": ROWS // rows}
    settings |= {"max_steps": 1, "label_smoothing_factor": smoothing}
    trainer = distill(tmp_path, Measuring(), **settings)
    trainer.train()
    (log,) = models.steps(trainer)
    want = by_hand()
    assert {name: log[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)
    assert log.keys() == LOGGED - {"teacher_drift"} | NAMES | {"soft", "hard", "tokens"}
    metrics = trainer.evaluate()
    want = by_hand(rows=6)
    assert {name: metrics[f"eval_{name}"] for name in want} == pytest.approx(want, rel=SUM_ERROR)
    assert metrics["eval_soft"] > 0.01
    assert not {f"eval_{name}" for name in MEASURED} & metrics.keys()


def test_tokens_without_a_weight_are_not_counted(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 3, "max_steps": 1, "collator": only_odd}
    trainer = distill(tmp_path, Measuring(), remove_unused_columns=False, **settings)
    trainer.train()
    (log,) = models.steps(trainer)
    want = by_hand(lambda token: token % 2 == 1)
    assert {name: log[name] for name in want} == pytest.approx(want, rel=SUM_ERROR)
    assert want["tokens"] < by_hand()["tokens"]


def test_soft_alone_measures_no_hard_loss(tmp_path: Path) -> None:
    trainer = distill(tmp_path, forward_kl, alpha=1.0, max_steps=1)
    trainer.train()
    (log,) = models.steps(trainer)
    assert log.keys() - LOGGED == {"soft", "tokens"}
    assert log["loss"] == pytest.approx(log["soft"], rel=SUM_ERROR)


class Counting(Loss):
    """It keeps what it has seen."""

    calls = 0

    def per_token(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Any:
        self.calls += 1
        return forward_kl(student_logits, teacher_logits, targets)


def test_what_a_loss_keeps_stays_with_the_trainer(tmp_path: Path) -> None:
    given = Counting()
    trainer = distill(tmp_path, given, alpha="linear:1->0.5@3", gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.loss.calls == 6
    assert (given.calls, given.alpha) == (0, 1.0)


def test_a_negative_loss_is_no_dead_signal(tmp_path: Path) -> None:
    def negative(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return forward_kl(student_logits, teacher_logits, targets) - 5

    settings = {"max_steps": 6, "alpha": 1.0, "watchdog": {"action": "raise", "window": 1}}
    distill(tmp_path, negative, **settings).train()
    with pytest.raises(RuntimeError, match=r"dead_signal: soft .* is below its limit"):
        distill(tmp_path, lambda s, t, y: 0 * forward_kl(s, t, y), **settings).train()


def test_a_schedule_that_is_not_read_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"temperature": "linear:4->1@3", "alpha": "linear:0.5->1@3"}
    trainer = distill(tmp_path, forward_kl, **settings)
    trainer.train()
    with caplog.at_level("INFO"):
        trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all("alpha" in log and "temperature" not in log for log in logs)
    assert "those of the schedules' last values, alpha 1" in caplog.text


def test_in_place_operations_of_a_loss_do_not_reach_the_hard_loss(tmp_path: Path) -> None:
    def in_place(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        for logits in (student_logits, teacher_logits):
            logits.div_(4.0)
        return 16 * forward_kl(student_logits, teacher_logits, targets)

    def apart(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return 16 * forward_kl(student_logits / 4.0, teacher_logits / 4.0, targets)

    runs = []
    for loss in (in_place, apart):
        trainer = distill(tmp_path, loss)
        trainer.train()
        runs.append((models.weights(trainer.model), trainer.evaluate()["eval_hard"]))
    assert models.difference(runs[0][0], runs[1][0]) <= 1e-6
    assert runs[0][1] == pytest.approx(runs[1][1], rel=SUM_ERROR)


class Chunks:
    """The forward KL, with what it was given: how many rows, and which logits are alive."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.alive: list[int] = []
        self._given: list[weakref.ref] = []

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        self.rows.append(len(targets))
        assert student_logits.shape == teacher_logits.shape == (len(targets), models.VOCAB)
        alive = [x() for x in self._given]
        self.alive.append(sum(x is not None for x in alive))
        self._given += [weakref.ref(student_logits), weakref.ref(teacher_logits)]
        return forward_kl(student_logits, teacher_logits, targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hidden states", "logits"])
def test_a_loss_gets_a_chunk_of_tokens_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothing: float
) -> None:
    results = {}
    for size in (1, 5, 1000):
        monkeypatch.setattr(chunks, "CHUNK_ENTRIES", size * models.VOCAB * chunks.COPIES_ON_CPU)
        monkeypatch.setattr(chunks, "MOST_TOKENS", 1000)
        seen = Chunks()
        settings = {"max_steps": 2, "label_smoothing_factor": smoothing, "logging_steps": 1}
        trainer = distill(tmp_path, seen, **settings)
        trainer.train()
        tokens = [int(log["tokens"]) for log in models.steps(trainer)]
        want = [n for count in tokens for n in [size] * (count // size) + [count % size] if n]
        assert seen.rows == want
        # in a chunk those of the one before it are gone, but for what a loop's names hold
        assert max(seen.alive) <= 2
        results[size] = models.weights(trainer.model), models.steps(trainer)
    weights, logs = results.pop(1000)
    for other, other_logs in results.values():
        # sums in another order: see `test_own_loss.TOLERANCE`
        assert models.difference(weights, other) <= 2e-5
        for log, found in zip(logs, other_logs, strict=True):
            assert found["soft"] == pytest.approx(log["soft"], rel=1e-5)
            assert found["loss"] == pytest.approx(log["loss"], rel=1e-5)


def test_chunks_have_so_many_tokens() -> None:
    """Fewer on a CPU, where the fused operations hold fewer logits; see `chunks`."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def tokens(vocab: int, device: torch.device) -> int:
        return chunks.CHUNK_ENTRIES // chunks.width_of_copies(vocab, device)

    assert [tokens(v, cpu) for v in (3, 8192, 49152, 151936)] == [128, 128, 85, 27]
    assert [tokens(v, gpu) for v in (3, 8192, 49152, 151936)] == [128, 128, 128, 110]


def test_evaluation_forms_no_gradient(tmp_path: Path) -> None:
    seen = []

    def noted(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        assert not teacher_logits.requires_grad
        seen.append(student_logits.requires_grad)
        return forward_kl(student_logits, teacher_logits, targets)

    trainer = distill(tmp_path, noted, max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert seen == [True, False, False]


def search(trainer: DistillTrainer, **trials: list[Any]) -> list[dict[str, float]]:
    """The first log of each trial, as a backend that gives dictionaries runs them."""
    trainer.hp_search_backend = HPSearchBackend.WANDB
    found = []
    for values in zip(*trials.values(), strict=True):
        trainer._hp_search_setup(dict(zip(trials, values, strict=True)))  # `train(trial=)` does
        trainer.train()
        found.append(models.steps(trainer)[0])
    return found


@pytest.mark.parametrize("own", [True, False], ids=["own", "built-in"])
def test_a_search_for_hyperparameters_changes_the_loss(tmp_path: Path, own: bool) -> None:
    """Each trial has its values from the first step on, and `objective` is the search's."""
    settings = {"max_steps": 1, "learning_rate": 0.0}
    trainer = distill(tmp_path, forward_kl if own else None, temperature=1.5, **settings)
    trainer.evaluate()
    trials = {"alpha": [1.0, 0.3], "temperature": [1.5, 3.0]}
    for log, alpha, temperature in zip(search(trainer, **trials), *trials.values(), strict=True):
        alone = {"alpha": alpha, "temperature": temperature}
        want = distill(tmp_path, forward_kl if own else None, **settings, **alone)
        want.train()
        (plain,) = models.steps(want)
        assert {k: log[k] for k in ("loss", "soft")} == {k: plain[k] for k in ("loss", "soft")}
    trainer.objective = 0.5
    assert trainer.objective == 0.5
    assert isinstance(trainer.loss, Loss)
