"""Prefixes that grow: how long completions are at each step, in every engine, and what refuses."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from hf_distill import Feedback, OPSDConfig, OPSDTrainer
from hf_distill.data.hint_collator import HintCollator
from hf_distill.monitoring.watchdog import Watchdog
from hf_distill.rollouts import ENGINES, RolloutConfig, Sampling, make_engine
from hf_distill.schedules import Schedule
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_opsd_trainer import Watched, watched

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

LONGEST = 8
GROWING = "linear:2->8@4"


def run(folder: Path, prefix: Any, **changes: Any) -> Watched:
    """A greedy student that stays as it is, and often ends within a few tokens."""
    model: Any = models.llama()
    model.lm_head.weight.data[models.EOS] = 0.6 * model.lm_head.weight[5:20].sum(0)
    rollout = {"prefix_tokens": prefix, "temperature": 0.0} | changes.pop("rollout", {})
    settings = {"max_steps": 5, "learning_rate": 0.0, "watchdog": {"action": "off"}} | changes
    return watched(folder, model, rollout=rollout, max_completion_length=LONGEST, **settings)


def completions(trainer: Watched) -> list[list[list[int]]]:
    """What is scored, by step and row."""
    return [[row[row != -100].tolist() for row in batch["labels"]] for batch in trainer.trained]


def test_each_step_trains_on_the_first_tokens_of_whole_completions(tmp_path: Path) -> None:
    cut, whole = run(tmp_path, GROWING), run(tmp_path, None)
    cut.train()
    whole.train()
    lengths = [2, 3, 5, 6, 8]  # 2 + 1.5 a step, rounded down
    found, expected = completions(cut), completions(whole)
    assert found == [[row[:n] for row in rows] for rows, n in zip(expected, lengths, strict=True)]
    ended = [[row[-1] == models.EOS for row in rows] for rows in found]
    assert ended[0] != [row[-1] == models.EOS for row in expected[0]]
    logs = models.steps(cut)
    assert [x.get("prefix_tokens") for x in logs] == [2, 3, 5, 6, None]  # the last cuts nothing
    assert [x["completion_ended"] for x in logs] == [sum(x) / len(x) for x in ended]
    assert [x["tokens"] for x in logs] == [sum(map(len, rows)) for rows in found]
    assert all("prefix_tokens" not in x for x in models.steps(whole))


def test_a_window_has_the_prefix_of_its_first_step(tmp_path: Path) -> None:
    trainer = run(tmp_path, GROWING, rollout={"steps_per_rollout": 2}, max_steps=4)
    trainer.train()
    assert [max(map(len, rows)) for rows in completions(trainer)] == [2, 2, 5, 5]


def test_evaluation_samples_whole_completions(tmp_path: Path) -> None:
    rows = models.problems(4)
    cut, whole = (run(tmp_path, x, eval_rows=rows).evaluate() for x in (2, None))
    assert cut["eval_completion_length"] == whole["eval_completion_length"] > 2
    assert "eval_prefix_tokens" not in cut


def test_resumed_is_straight_bit_for_bit(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    straight, again = (run(tmp_path, GROWING, **settings) for _ in range(2))
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert completions(again) == completions(straight)[2:]
    assert models.difference(models.weights(again.model), models.weights(straight.model)) == 0.0
    assert models.steps(again) == models.steps(straight)


@pytest.mark.parametrize("engine", [x for x in ENGINES if x != "vllm"])
def test_engines_stop_where_they_are_told(engine: str) -> None:
    model, prompts = models.llama(), [[5, 6, 7], [8]]
    made = make_engine(engine, Sampling(models.PAD, models.EOS, LONGEST, 0.0))
    whole = made.sample(model, prompts, 3)
    assert made.sample(model, prompts, 3, max_new_tokens=3) == [row[:3] for row in whole]
    assert made.sample(model, prompts, 3, max_new_tokens=LONGEST + 1) == whole
    assert max(map(len, whole)) == LONGEST


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (0, "rollout.prefix_tokens must be at least 1, got 0"),
        ("linear:0.5->8@4", "rollout.prefix_tokens must be at least 1, got 0.5"),
        (9, "prefix_tokens must be at most max_completion_length, got 9 and 8"),
        ("linear:2->8", "rollout.prefix_tokens: a schedule must be a number"),
    ],
)
def test_lengths_that_cannot_be(prefix: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPSDConfig("out", max_completion_length=LONGEST, rollout={"prefix_tokens": prefix})


def test_schedules_are_texts_numbers_and_objects() -> None:
    for given in (GROWING, Schedule.linear(2, 8, 4)):
        assert [RolloutConfig(prefix_tokens=given).prefix_at(x) for x in range(6)] == [
            2, 3, 5, 6, 8, 8
        ]  # fmt: skip
    assert RolloutConfig(prefix_tokens="5").prefix_at(7) == 5
    assert RolloutConfig().prefix_at(7) is None
    # a sum of steps that rounds to a little less than a whole number
    made = RolloutConfig(prefix_tokens="linear:1->64@100")
    assert made.prefix_at(100) == 64
    assert [made.prefix_at(x) for x in (0, 1, 99)] == [1, 1, 63]


def test_an_environment_does_not_judge_what_was_cut(tmp_path: Path) -> None:
    rollout = {"prefix_tokens": 4, "only_failed": True}
    args = OPSDConfig(**models.options(tmp_path, max_completion_length=8, rollout=rollout))
    with pytest.raises(
        ValueError, match=r"completions that rollout\.prefix_tokens cuts for failed"
    ):
        OPSDTrainer(
            models.llama(),
            args,
            HintCollator(models.tokenizer()),
            models.problems(),
            environment=lambda attempts: [Feedback() for _ in attempts],
        )


def test_settings_of_rollouts_that_are_not_sampled_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, GROWING, on_policy=False)
    assert "rollout.prefix_tokens needs on_policy" in caplog.text


def test_the_watchdog_does_not_take_a_growing_prefix_for_growing_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It compares lengths from where completions are whole."""
    dog = Watchdog(window=1)
    state = SimpleNamespace(log_history=[], global_step=1, is_world_process_zero=True)

    def log(length: float, **more: float) -> dict[str, float]:
        logs = {"loss": 1.0, "completion_length": length, "completion_ended": 0.5} | more
        dog.on_log(SimpleNamespace(), state, TrainerControl(), logs)
        return logs

    with caplog.at_level(logging.WARNING):
        log(8.0, prefix_tokens=8)
        log(64.0, prefix_tokens=64)
        log(100.0)
        log(110.0)
        assert not caplog.records
        assert "watchdog_too_long" in log(300.0)
