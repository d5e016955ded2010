"""TAID in the trainer: its t from step to step, checkpoints, logs, what it equals, settings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RemoteTeacher,
    RoutedTeacher,
    cache_teacher,
)
from hf_distill.losses import Terms, Tokens
from hf_distill.losses.taid import TaidCallback, TaidConfig, TaidLoss
from hf_distill.models import Signal
from tests.hf_distill.trainers import classifying, models
from tests.hf_distill.trainers.reading import only_logits
from tests.hf_distill.trainers.test_taid_rule import PUSHED, by_hand

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def distill(folder: Path, **changes: Any) -> DistillTrainer:
    kind = changes.pop("kind", DistillTrainer)
    collator = changes.pop("collator", models.Pad())
    args = DistillConfig(**models.options(folder, **changes))
    rows = models.rows()
    return kind(models.llama(), args, collator, rows, rows[:4], teacher=models.llama(1))


def ts(trainer: Any) -> list[float]:
    return [log["taid_t"] for log in models.steps(trainer)]


def test_the_rule_reads_the_soft_loss_of_each_step(tmp_path: Path) -> None:
    """The log's `soft` is that of the step, in nats; without weights J is its mean."""
    trainer = distill(tmp_path, taid=PUSHED, max_steps=6)
    trainer.train()
    logs = models.steps(trainer)
    wanted = by_hand(TaidConfig(**PUSHED), [log["soft"] for log in logs], 6)
    assert ts(trainer) == pytest.approx([0.5, *wanted[:-1]], abs=1e-6)
    assert trainer._taid.state.t == pytest.approx(wanted[-1], abs=1e-6)
    assert ts(trainer)[3] - (0.5 + 0.45 * 3 / 6) > 0.01  # ahead of the linear target


class SeesLoss(DistillTrainer):
    """Keeps what each forward was compared by."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[bool, TaidLoss]] = []

    def token_loss(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        original = TaidLoss.__call__

        def noted(loss: TaidLoss, *signals: Any) -> Terms:
            self.seen.append((self.model.training, loss))
            return original(loss, *signals)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaidLoss, "__call__", noted)
            return super().token_loss(student, teacher, tokens)


def test_micro_batches_have_one_t_and_evaluation_the_teacher(tmp_path: Path) -> None:
    trainer = distill(
        tmp_path,
        kind=SeesLoss,
        taid=PUSHED,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
    )
    trainer.train()
    logged = ts(trainer)
    assert len(set(logged)) == 3
    seen = [(training, loss.t) for training, loss in trainer.seen]
    assert seen == [pair for t in logged for pair in ((True, t), (True, t), (False, 1.0))]


def test_accumulation_does_not_change_t(tmp_path: Path) -> None:
    """The mean over a step, not over the last of its micro-batches."""

    def run(rows: int, steps: int) -> list[float]:
        trainer = distill(
            tmp_path,
            taid=PUSHED,
            max_steps=5,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        return ts(trainer)

    one = run(4, 1)
    assert run(1, 4) == pytest.approx(one, abs=1e-6)
    assert one[2] - (0.5 + 0.45 * 2 / 5) > 0.01


def test_evaluation_does_not_move_t(tmp_path: Path) -> None:
    plain = distill(tmp_path, taid=PUSHED)
    plain.train()
    evaluated = distill(tmp_path, taid=PUSHED, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert ts(plain) == ts(evaluated)
    assert plain._taid.state == evaluated._taid.state


def test_evaluation_reports_the_kl_to_the_teacher(tmp_path: Path) -> None:
    metrics = [
        distill(tmp_path, **changes).evaluate() for changes in ({}, {"taid": {"t_start": 0.1}})
    ]
    for name in ("eval_loss", "eval_soft", "eval_hard", "eval_teacher_entropy"):
        assert metrics[0][name] == metrics[1][name], name
    assert metrics[1]["eval_taid_teacher_kl"] == metrics[1]["eval_soft"]
    assert "eval_taid_teacher_kl" not in metrics[0]


@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_at_its_end_it_is_the_run_with_the_forward_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, alpha: float
) -> None:
    if form == "logits":
        only_logits(monkeypatch)

    def run(**changes: Any) -> dict[str, torch.Tensor]:
        trainer = distill(tmp_path, alpha=alpha, **changes)
        trainer.train()
        return models.weights(trainer.model)

    plain = run()
    assert models.difference(plain, run(taid={"t_start": 1.0})) == 0.0
    assert models.difference(plain, run(taid={"t_start": 0.9})) > 1e-5


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_at_its_start_the_soft_loss_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "logits":
        only_logits(monkeypatch)

    def moved(t_start: float) -> float:
        trainer = distill(tmp_path, alpha=1.0, taid={"t_start": t_start}, max_steps=1)
        before = models.weights(trainer.model)
        trainer.train()
        return models.difference(before, models.weights(trainer.model))

    assert moved(0.0) < 1e-6  # Adam divides roundings by sqrt(v) + 1e-4
    assert moved(0.4) > 1e-4


def test_hidden_states_and_logits_give_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[dict[str, torch.Tensor], list[float]]:
        trainer = distill(tmp_path, taid=PUSHED)
        trainer.train()
        return models.weights(trainer.model), ts(trainer)

    hidden = run()
    only_logits(monkeypatch)
    logits = run()
    assert models.difference(hidden[0], logits[0]) < 2e-6
    assert hidden[1] == pytest.approx(logits[1], abs=1e-6)


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "taid": PUSHED}


@pytest.mark.parametrize("taid", [PUSHED, {"t_start": 0.1, "adaptive": False}])
def test_resumed_is_straight_bit_for_bit(tmp_path: Path, taid: dict[str, Any]) -> None:
    straight = distill(tmp_path, **SAVING | {"taid": taid})
    straight.train()
    resumed = distill(tmp_path, **SAVING | {"taid": taid})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert models.steps(resumed) == models.steps(straight)
    assert len(set(ts(resumed))) == 5 + ("adaptive" in taid)  # the first step leaves t
    assert resumed._taid.state == straight._taid.state
    end = models.weights(straight.model), models.weights(resumed.model)
    assert models.difference(*end) == 0.0


@pytest.mark.parametrize("name", ["t", "momentum", "loss"])
def test_each_part_of_the_state_counts(tmp_path: Path, name: str) -> None:
    straight = distill(tmp_path, **SAVING)
    straight.train()
    path = tmp_path / "checkpoint-3" / "taid.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {name: state[name] * 0.5}))
    resumed = distill(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pairs = zip(ts(resumed), ts(straight), strict=True)
    assert max(abs(a - b) for a, b in pairs) > 1e-3


def test_resuming_without_the_state_is_an_error(tmp_path: Path) -> None:
    distill(tmp_path, **SAVING | {"taid": None}).train()
    with pytest.raises(FileNotFoundError, match=r"t of taid must be in the checkpoint: no .*json"):
        distill(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    trainer = distill(tmp_path, taid=PUSHED)
    trainer.train()
    assert ts(trainer)[-1] > 0.5
    trainer._taid.add(torch.ones(2), torch.ones(2))  # left over from a run that broke off
    trainer.args.max_steps = 1
    trainer.train()
    assert ts(trainer) == [0.5]
    assert trainer._taid.state.loss == pytest.approx(models.steps(trainer)[-1]["soft"], rel=1e-5)


def test_the_loss_of_a_step_is_the_mean_of_the_processes() -> None:
    """The weights of each are such that gradients, and losses, are averaged."""
    asked = []

    def reduce(own: torch.Tensor, reduction: str) -> torch.Tensor:
        asked.append(reduction)
        return (own + 4.0) / 2

    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), reduce=reduce)
    taid = TaidCallback(TaidConfig(), accelerator)
    state = SimpleNamespace(global_step=1, max_steps=4)
    taid.add(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))
    taid.add(torch.tensor([3.0]), torch.tensor([1.0]))
    taid.on_step_end(None, state, None)
    assert taid.state.loss == 4.0
    taid.on_step_end(None, state, None)  # a process without a token of its own
    assert taid.state.loss == 2.0
    assert asked == ["mean", "mean"]


def test_token_weights_count_in_the_loss_of_a_step(tmp_path: Path) -> None:
    class Weighted(models.Pad):
        def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
            made = super().__call__(batch)
            return made | {"token_weights": (made["input_ids"] % 4) * 0.75}

    def first(alpha: float) -> tuple[float, dict[str, float]]:
        trainer = distill(tmp_path, collator=Weighted(), taid={}, alpha=alpha, max_steps=1)
        trainer.train()
        (log,) = models.steps(trainer)
        return trainer._taid.state.loss, log

    loss, log = first(1.0)
    assert loss == pytest.approx(log["loss"], abs=1e-6)
    assert abs(loss - log["soft"]) > 1e-4  # a plain mean
    assert first(0.3)[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("on_policy", [False, True])
def test_self_distillation(tmp_path: Path, on_policy: bool) -> None:
    args = OPSDConfig(
        **models.options(
            tmp_path,
            divergence="forward_kl",
            taid=PUSHED,
            on_policy=on_policy,
            max_completion_length=8,
        )
    )
    trainer = OPSDTrainer(
        models.lora(models.llama()),
        args,
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
    )
    trainer.train()
    logs = models.steps(trainer)
    assert all(0 < log["soft"] < log["taid_teacher_kl"] for log in logs)
    assert ts(trainer)[0] == 0.5
    assert ts(trainer)[2] > ts(trainer)[1] == 0.5


@pytest.mark.parametrize("value", [None, "null", " null "])
def test_it_is_off(value: Any, tmp_path: Path) -> None:
    trainer = distill(tmp_path, taid=value, max_steps=1)
    assert trainer.args.taid is None
    trainer.train()
    assert not any("taid" in name for log in trainer.state.log_history for name in log)


def test_teachers_that_know_a_few_entries_are_refused(tmp_path: Path) -> None:
    rows = models.rows()
    cache_teacher(models.llama(1), rows, tmp_path / "cache", data_collator=models.Pad())
    cached = CachedTeacher(tmp_path / "cache")
    remote = RemoteTeacher("http://localhost:1", "tiny", 4)
    words = "^taid reads .* of the whole vocabulary, of which a (Cached|Remote)Teacher knows some"
    several = RoutedTeacher({"live": ModelTeacher(models.llama(1)), "cached": cached}, "by")
    for teacher in (cached, remote, several):
        args = DistillConfig(**models.options(tmp_path, taid={}, temperature=1.0))
        with pytest.raises(ValueError, match=words):
            DistillTrainer(models.llama(), args, models.Pad(), rows, teacher=teacher)
    remote.close()


def test_schedules_and_t_move_together(tmp_path: Path) -> None:
    trainer = distill(
        tmp_path,
        kind=SeesLoss,
        taid=PUSHED,
        max_steps=4,
        alpha="linear:1.0->0.2@4",
        temperature="linear:4.0->2.0@4",
    )
    trainer.train()
    seen = [(x.alpha, x.spec.temperature, x.t) for _, x in trainer.seen]
    moving = zip([1.0, 0.8, 0.6, 0.4], [4.0, 3.5, 3.0, 2.5], strict=True)
    assert seen == [(pytest.approx(a), b, t) for (a, b), t in zip(moving, ts(trainer), strict=True)]
    assert len(set(ts(trainer))) == 3


def test_classifiers(tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        trainer = classifying.trainer(tmp_path, alpha=0.5, max_steps=3, **changes)
        trainer.train()
        return trainer

    plain, end, moved = (run(taid=taid) for taid in (None, {"t_start": 1.0}, PUSHED))
    weights = [models.weights(x.model) for x in (plain, end, moved)]
    assert models.difference(weights[0], weights[1]) == 0.0
    assert models.difference(weights[0], weights[2]) > 1e-5
    assert ts(moved)[2] > ts(moved)[1] == 0.5
    first, want = models.steps(moved)[0], models.steps(plain)[0]
    assert first["taid_teacher_kl"] == pytest.approx(want["soft"], rel=1e-5)
    assert 0 < first["soft"] < 0.5 * want["soft"]
