"""Hints that depend on the optimizer step reach the loss of that step, and of no other."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    Hint,
    HintCollator,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
)
from hf_distill.cache import CachedTeacher, cache_teacher
from hf_distill.data.hint_collator import DROPPED, TRUNCATED
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_preflight import BY_ITSELF

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

SEED = models.options("")["seed"]
DROPOUT, LENGTH = "linear:0.2->0.8@4", "linear:8->2@3"
PLAN = {"hint_dropout": DROPOUT, "max_hint_length": LENGTH, "truncation": "hint"}
FOUR = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
NOISE = {"attention_dropout": 0.2}  # the random state matters


def collator(**settings: Any) -> HintCollator:
    return HintCollator(models.tokenizer(), **settings)


class _Seen:
    """Notes the batches that reach the loss, in training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trained: list[dict[str, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.trained.append(dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)  # pyright: ignore


class Opsd(_Seen, OPSDTrainer):
    """On- or off-policy."""


class Distill(_Seen, DistillTrainer):
    """With another model as teacher."""


def data() -> list[dict[str, Any]]:
    return [row | {"domain": "ab"[i % 2]} for i, row in enumerate(models.problems())]


def opsd(folder: Path, plan: dict[str, Any], **changes: Any) -> Opsd:
    teacher, rows = changes.pop("by", None), changes.pop("rows", None)
    settings = {"max_completion_length": 6, "rollout": {"temperature": 1.0}} | changes
    if not settings.get("on_policy", True):
        settings.pop("rollout")
    return Opsd(
        models.llama(**NOISE),
        OPSDConfig(**models.options(folder, **settings)),
        collator(**plan),
        data() if rows is None else rows,
        data()[:6],
        models.tokenizer(),
        teacher=teacher,
    )


def off_policy(folder: Path, plan: dict[str, Any], **changes: Any) -> Opsd:
    return opsd(folder, plan, on_policy=False, **changes)


def window(folder: Path, plan: dict[str, Any], **changes: Any) -> Opsd:
    """A rollout serves three steps: the checkpoint of step 2 lies inside of the first."""
    return opsd(folder, plan, rollout={"temperature": 1.0, "steps_per_rollout": 3}, **changes)


def of_the_data(folder: Path, plan: dict[str, Any], **changes: Any) -> Opsd:
    rollout = {"on_policy_fraction": 0.0, "steps_per_rollout": 3}
    return opsd(folder, plan, rollout=rollout, **changes)


def routes() -> RoutedTeacher:
    return RoutedTeacher(
        {"b": ModelTeacher(models.llama(1)), "a": ModelTeacher(models.llama(2))}, "domain"
    )


def routed_opsd(folder: Path, plan: dict[str, Any], **changes: Any) -> Opsd:
    return off_policy(folder, plan, by=routes(), **changes)


def distill(folder: Path, plan: dict[str, Any], **changes: Any) -> Distill:
    changes.setdefault("remove_unused_columns", False)
    args = DistillConfig(**models.options(folder, **changes))
    student, teacher = models.llama(**NOISE), routes()
    return Distill(student, args, collator(**plan), data(), data()[:6], teacher=teacher)


SETUPS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (opsd, window, of_the_data, off_policy, routed_opsd, distill)
}


def losses(trainer: Any) -> list[tuple[float, float]]:
    return [(log["loss"], log["soft"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("setup", SETUPS)
def test_resumed_is_straight_bit_for_bit(tmp_path: Path, setup: str) -> None:
    straight = SETUPS[setup](tmp_path, PLAN, **FOUR)
    straight.train()
    again = SETUPS[setup](tmp_path, PLAN, **FOUR)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(straight)
    assert models.steps(again) == models.steps(straight)
    assert models.difference(models.weights(again.model), models.weights(straight.model)) == 0.0
    kept = [batch[DROPPED].tolist() for batch in straight.trained]
    assert 0 < sum(map(sum, kept)) < 16
    assert [batch[DROPPED].tolist() for batch in again.trained] == kept[2:]


LOADERS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "workers": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 4,
        "dataloader_persistent_workers": True,
    },
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("setup", ["off_policy", "distill"])
def test_rows_of_the_data_have_the_hints_of_their_step(
    tmp_path: Path, setup: str, loader: str
) -> None:
    trainer = SETUPS[setup](tmp_path, PLAN, max_steps=4, **LOADERS[loader])
    trainer.train()
    rows, made = data(), collator(**PLAN)
    per_step = len(trainer.trained) // 4
    for step in range(4):
        want = made.at(step, SEED)(rows[4 * step : 4 * step + 4])
        found = trainer.trained[per_step * step : per_step * (step + 1)]
        for name in (DROPPED, TRUNCATED):
            assert torch.cat([batch[name] for batch in found]).tolist() == want[name].tolist()
        lengths = torch.cat([batch["teacher_attention_mask"].sum(1) for batch in found])
        assert lengths.tolist() == want["teacher_attention_mask"].sum(1).tolist()
    log = trainer.state.log_history[2]
    assert (log["hint_dropout"], log["max_hint_length"]) == (pytest.approx(0.5), 4)


def test_no_worker_outlives_the_training(tmp_path: Path) -> None:
    """Else the collector of reference cycles waits five seconds for each of them, somewhere."""
    kept = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = off_policy(tmp_path, PLAN, max_steps=2, **LOADERS["workers"], **kept)
    before = set(multiprocessing.active_children())
    for _ in range(2):
        trainer.train()
        assert set(multiprocessing.active_children()) <= before
        assert any("eval_soft" in log for log in trainer.state.log_history)


def test_how_rows_are_loaded_does_not_matter(tmp_path: Path) -> None:
    runs = [off_policy(tmp_path, PLAN, max_steps=4, **x) for x in LOADERS.values()]
    for run in runs:
        run.model.config.attention_dropout = 0.0
        for layer in run.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        run.train()
    plain, *others = (models.weights(run.model) for run in runs)
    # measured: 1.2e-7, of the accumulation; one hint more or less gives more than 1e-5
    assert max(models.difference(plain, other) for other in others) < 1e-6
    assert models.difference(plain, models.weights(models.llama())) > 1e-4


def hinted(batch: dict[str, torch.Tensor]) -> list[bool]:
    """By the teacher's rows themselves: which are longer than the student's."""
    teacher, student = (batch[x].sum(1) for x in ("teacher_attention_mask", "attention_mask"))
    return (teacher > student).tolist()


def test_a_rollout_keeps_the_hints_of_its_first_step(tmp_path: Path) -> None:
    trainer = window(tmp_path, PLAN, max_steps=6)
    trainer.train()
    first, second = trainer.trained[:3], trainer.trained[3:]
    for batches, step in ((first, 0), (second, 3)):
        expected = collator(**PLAN).at(step, SEED)._draw
        ids = [
            x[m.bool()].tolist()
            for x, m in zip(*(batches[0][k] for k in ("input_ids", "attention_mask")), strict=True)
        ]
        assert [batch[DROPPED].tolist() for batch in batches] == [expected(ids)] * 3
        assert hinted(batches[0]) == [not x for x in expected(ids)]
    logged = [(x["hint_dropout"], x["max_hint_length"]) for x in models.steps(trainer)]
    assert logged == [(pytest.approx(0.2), 8)] * 3 + [(pytest.approx(0.65), 2)] * 3


@pytest.mark.parametrize("setup", ["opsd", "off_policy"])
def test_share_zero_is_off_and_a_constant_schedule_is_its_number(
    tmp_path: Path, setup: str
) -> None:
    def run(**plan: Any) -> tuple[Any, list[dict[str, float]]]:
        trainer = SETUPS[setup](tmp_path, plan, max_steps=3)
        trainer.train()
        return models.weights(trainer.model), models.steps(trainer)

    off, logs = run()
    zero, zero_logs = run(hint_dropout=0.0)
    assert models.difference(off, zero) == 0.0
    assert logs == zero_logs
    assert not {"hint_dropout", "hints_dropped", "max_hint_length"} & logs[0].keys()
    half, half_logs = run(hint_dropout=0.5)
    text, text_logs = run(hint_dropout="0.5", max_hint_length="64", truncation="hint")
    assert models.difference(half, text) == 0.0
    assert models.difference(half, off) > 1e-5
    cut = [log.pop("hints_truncated") for log in text_logs]
    assert cut == [0.0] * 3
    assert half_logs == text_logs
    assert "max_hint_length" not in half_logs[0]


@pytest.mark.parametrize("setup", ["opsd", "off_policy"])
def test_a_teacher_without_any_hint_says_what_the_student_says(tmp_path: Path, setup: str) -> None:
    """The base teacher at step 0 is the student."""
    quiet = {"max_steps": 1, "watchdog": {"action": "off"}}
    runs = [SETUPS[setup](tmp_path, {"hint_dropout": x}, **quiet) for x in (1.0, 0.0)]
    for run in runs:
        for layer in run.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        run.train()
    (none,), (all_of_them,) = (models.steps(run) for run in runs)
    assert abs(none["soft"]) < 1e-7
    assert all_of_them["soft"] > 1e-3
    assert (none["hint_dropout"], none["hints_dropped"]) == (1.0, 1.0)
    (batch,) = runs[0].trained
    assert torch.equal(batch["teacher_input_ids"], batch["input_ids"])
    assert (batch["labels"] != -100).sum() == none["tokens"] > 0


@pytest.mark.parametrize("setup", SETUPS)
def test_what_is_logged_is_the_step_and_what_was_measured(tmp_path: Path, setup: str) -> None:
    trainer = SETUPS[setup](tmp_path, PLAN, max_steps=4, logging_steps=2)
    trainer.train()
    period = 3 if setup in ("window", "of_the_data") else 1
    steps = models.steps(trainer)
    plan = collator(**PLAN).hint_plan
    assert plan is not None
    for log, last, batches in zip(
        steps, (1, 3), (trainer.trained[:2], trainer.trained[2:]), strict=True
    ):
        values = plan.values(last - last % period, training=True)
        assert {name: log[name] for name in values} == values
        assert values.keys() == {"hint_dropout", "max_hint_length"}
        for name, flag in (("hints_dropped", DROPPED), ("hints_truncated", TRUNCATED)):
            assert log[name] == torch.cat([batch[flag] for batch in batches]).float().mean()


@pytest.mark.parametrize("setup", ["opsd", "off_policy", "distill"])
def test_evaluation_keeps_hints_as_long_as_the_present_step_has_them(
    tmp_path: Path, setup: str
) -> None:
    plan = PLAN | {"hint_dropout": 1.0}
    trainer = SETUPS[setup](tmp_path, plan, max_steps=2)
    at_start = trainer.evaluate()
    trainer.train()
    at_end = trainer.evaluate()
    assert (at_start["eval_max_hint_length"], at_end["eval_max_hint_length"]) == (8, 4)
    for metrics, step in ((at_start, 0), (at_end, 2)):
        assert metrics["eval_hints_dropped"] == 0.0
        assert "eval_hint_dropout" not in metrics
        want = collator(**plan).at(step)(data()[:6])[TRUNCATED].float().mean()
        assert metrics["eval_hints_truncated"] == pytest.approx(want.item())
        assert metrics["eval_soft"] > 1e-3
    dropped_only = SETUPS[setup](tmp_path, {"hint_dropout": 1.0}, max_steps=1)
    metrics = dropped_only.evaluate()
    assert not {"eval_hints_dropped", "eval_hint_dropout"} & metrics.keys()
    never = SETUPS[setup](tmp_path, {}, max_steps=1).evaluate()
    assert metrics["eval_loss"] == never["eval_loss"]


def test_the_teacher_of_a_row_is_asked_with_or_without_its_hint(tmp_path: Path) -> None:
    for run in (routed_opsd(tmp_path, PLAN, max_steps=3), distill(tmp_path, PLAN, max_steps=3)):
        run.train()
        assert [x["teacher_route"].tolist() for x in run.trained] == [[1, 0, 1, 0]] * 3
        flags = torch.cat([batch[DROPPED] for batch in run.trained])
        assert 0 < flags.sum() < len(flags)


def test_an_iterable_dataset_and_one_of_columns(tmp_path: Path) -> None:
    kept: dict[str, list[list[bool]]] = {}
    of_columns = Dataset.from_list(data())
    for name, rows in {
        "list": data(),
        "columns": of_columns,
        "iterable": of_columns.to_iterable_dataset(),
    }.items():
        run = off_policy(tmp_path, PLAN, max_steps=3, rows=rows)
        run.train()
        kept[name] = [batch[DROPPED].tolist() for batch in run.trained]
    assert kept["list"] == kept["columns"] == kept["iterable"]


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_context_is_compared_where_there_are_hints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_policy: bool
) -> None:
    """A batch whose hints are all dropped shows nothing of what hints do to the context."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = BY_ITSELF
    plan = {"hint_dropout": "linear:1.0->0.0@1"}
    run = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(tmp_path, on_policy=on_policy, max_completion_length=4)),
        HintCollator(tokenizer, Hint(where="system"), **plan),
        models.problems(chat=True),
        processing_class=tokenizer,
    )
    run.train()
    assert caplog.text.count("context: the teacher must read what the student reads") == 1


def test_errors_of_set_ups(tmp_path: Path) -> None:
    plan = {"hint_dropout": 0.5}
    with pytest.raises(ValueError, match="dispatch_batches cuts tensors only, and hints that dep"):
        off_policy(tmp_path, plan, accelerator_config={"dispatch_batches": True})
    args = DistillConfig(**models.options(tmp_path, alpha=0.0))
    with pytest.raises(ValueError, match="hints that depend on the step need a teacher, got None"):
        DistillTrainer(models.llama(), args, collator(**plan), data())
    whole = collator()
    rows = models.problems()
    with pytest.raises(ValueError, match=r"a cache holds one answer .*\(hint_dropout 0.5\): cache"):
        cache_teacher(models.llama(), rows, tmp_path / "no", data_collator=collator(**plan))
    assert not (tmp_path / "no").exists()
    cache_teacher(models.llama(), rows, tmp_path / "cache", data_collator=whole)
    with pytest.raises(ValueError, match=r"a cached teacher knows its rows .*\(hint_dropout 0.5\)"):
        off_policy(tmp_path, plan, by=CachedTeacher(tmp_path / "cache"))
