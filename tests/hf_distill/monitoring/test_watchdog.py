"""What the watchdog does at a fault, and what it keeps over a checkpoint."""

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_distill import DistillTrainer, OPSDConfig
from hf_distill.monitoring.faults import BOUNDS, Scene
from hf_distill.monitoring.watchdog import Watchdog, WatchdogConfig, WatchdogError
from tests.hf_distill.monitoring import faults
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

NAME = "hf_distill.monitoring.watchdog"


def zeroed(folder: Path, **changes: Any) -> DistillTrainer:
    """The teacher is uniform; `changes` are of the watchdog."""
    dead = faults.scaled_head(models.llama(1), 0.0)
    return faults.distil(folder, faults.sharp(), dead, watchdog=changes)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == NAME]


def test_a_warning_says_what_was_measured_the_limit_and_what_to_do(tmp_path, caplog):
    zeroed(tmp_path).train()
    (text,) = warnings(caplog)
    assert text == (
        "watchdog, step 1: teacher_uniform: teacher_entropy 4.111 is above its limit 4.008: the "
        "teacher is close to uniform over the vocabulary and teaches nothing: look whether its "
        "weights and its head were loaded"
    )  # ln 61 is 4.111; 0.1 / temperature² of it is 0.103


def test_stop_ends_the_training(tmp_path, caplog):
    trainer = zeroed(tmp_path, action="stop")
    trainer.train()
    assert trainer.state.global_step == 1
    assert warnings(caplog)[0].endswith("; training stops here")


def test_raise_raises(tmp_path):
    with pytest.raises(WatchdogError, match="watchdog, step 1: teacher_uniform"):
        zeroed(tmp_path, action="raise").train()


def test_off_says_nothing(tmp_path, caplog):
    trainer = zeroed(tmp_path, action="off")
    assert not any(isinstance(x, Watchdog) for x in trainer.callback_handler.callbacks)
    assert faults.reported(trainer, caplog) == set()
    assert "teacher_drift" not in trainer.state.log_history[0]


def test_a_fault_without_a_limit_is_not_watched(tmp_path, caplog):
    assert faults.reported(zeroed(tmp_path, teacher_uniform=None), caplog) == set()


def test_a_plain_trainer_has_no_watchdog(tmp_path):
    trainer = faults.distil(tmp_path, models.llama(), None, alpha=0.0)
    assert not any(isinstance(x, Watchdog) for x in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("make", [faults.base_lora, faults.ema, faults.distilled])
def test_watching_changes_no_weight(tmp_path, make):
    trained = []
    for action in ("warn", "off"):
        trainer = make(tmp_path / action, max_steps=4, watchdog={"action": action})
        trainer.train()
        trained.append(models.weights(trainer.model))
    assert models.difference(*trained) == 0.0


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, *args: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_callbacks_of_the_user_see_the_metrics(tmp_path):
    reporter, args = Reporter(), zeroed(tmp_path).args
    dead = faults.scaled_head(models.llama(1), 0.0)
    trainer = DistillTrainer(
        faults.sharp(), args, models.Pad(), models.rows(), teacher=dead, callbacks=[reporter]
    )
    trainer.train()
    assert reporter.seen[0]["watchdog_teacher_uniform"] == pytest.approx(1 / (1 - 0.1 / 4))
    assert "watchdog_teacher_uniform" not in reporter.seen[-1]  # the summary of the run


def test_a_fault_is_reported_again_when_it_gets_clearly_worse(tmp_path, caplog):
    """The student's entropy falls to nothing, past a limit that it reaches early."""
    trainer = faults.ends_at_once(tmp_path, watchdog={"window": 2, "entropy_collapse": 0.9})
    faults.reported(trainer, caplog)
    steps = [
        int(text.split()[2].strip(":")) for text in warnings(caplog) if "entropy_collapse" in text
    ]
    severity = {
        x["step"]: x["watchdog_entropy_collapse"]
        for x in trainer.state.log_history
        if "watchdog_entropy_collapse" in x
    }
    assert 1 < len(steps) < len(severity)
    assert all(severity[b] >= 3 * severity[a] for a, b in pairwise(steps))
    assert max(severity.values()) == 10.0


def test_a_fault_that_grows_slowly_is_reported_once(tmp_path, caplog):
    trainer = faults.flat_teacher(tmp_path)
    faults.reported(trainer, caplog)
    severity = [
        x["watchdog_entropy_explosion"]
        for x in trainer.state.log_history
        if "watchdog_entropy_explosion" in x
    ]
    assert 1.2 < severity[-1] / severity[0] < 3.0
    assert len([text for text in warnings(caplog) if "entropy_explosion" in text]) == 1


SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "learning_rate": 2e-3}


def without_end(folder: Path, **changes: Any) -> Any:
    sizes = {"per_device_train_batch_size": 16, "max_completion_length": 16}
    settings = SAVING | sizes | changes
    return faults.opsd(folder, faults.biased(9.0), faults.biased(-20.0), **settings)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_compares_with_the_start_of_the_first(tmp_path, caplog, restore):
    """Its own first logs would be those of completions that no longer end."""
    whole = without_end(tmp_path / "whole")
    assert "endless" in faults.reported(whole, caplog)
    told = [text for text in warnings(caplog) if "endless" in text]
    without_end(tmp_path, save_steps=2, max_steps=2).train()
    changes = {"restore_callback_states_from_checkpoint": restore}
    resumed = without_end(tmp_path, **changes)
    caplog.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [text for text in warnings(caplog) if "endless" in text] == told
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["Watchdog"]["attributes"]
    assert kept["first"]["completion_ended"][0] == [1.0, 16]


def test_a_checkpoint_without_a_watchdog_is_resumed(tmp_path):
    without_end(tmp_path, watchdog={"action": "off"}, max_steps=3).train()
    resumed = without_end(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Watchdog"]["attributes"]["num_logs"] == 3


def test_a_second_training_starts_anew(tmp_path):
    trainer = faults.distilled(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    (watchdog,) = (x for x in trainer.callback_handler.callbacks if isinstance(x, Watchdog))
    assert watchdog.num_logs == 3


@pytest.mark.parametrize(
    ("steps", "every", "window", "told"),
    [
        (8, 5, 3, "of 8 steps, so it sees little; set logging_steps to at most 2"),
        (8, 4, 3, "so it sees little; set logging_steps to at most 2"),
        (8, 3, 3, "so it sees little; set logging_steps to at most 2"),
        (8, 2, 3, None),
        (4, 2, 3, "set logging_steps to at most 1"),
        (4, 1, 4, 'little; take more than 4 steps, or a smaller watchdog={"window": ...}'),
        (4, 2, 9, 'take more than 9 steps, or a smaller watchdog={"window": ...} and logging_st'),
        (4, 1, 3, None),
    ],
)
def test_few_logs_are_named_with_what_helps(tmp_path, caplog, steps, every, window, told):
    settings = {"max_steps": steps, "logging_steps": every, "watchdog": {"window": window}}
    trainer = faults.distilled(tmp_path, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    texts = [text for text in warnings(caplog) if "it sees little" in text]
    assert len(texts) == (told is not None)
    assert told is None or told in texts[0]


@pytest.mark.parametrize("every", [1, 500])
def test_a_run_of_a_few_steps_is_not_warned_of(tmp_path, caplog, every):
    """Nothing can be done about it; those of the documentation are such."""
    trainer = faults.distilled(tmp_path, max_steps=3, logging_steps=every, watchdog={"window": 3})
    with caplog.at_level(logging.INFO):
        trainer.train()
    texts = [r for r in caplog.records if "it sees little" in r.getMessage()]
    assert [r.levelno for r in texts] == [logging.INFO]
    assert "take more than 3 steps" in texts[0].getMessage()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"action": "bark"}, "watchdog action must be one of .*, got 'bark'"),
        ({"window": 0}, "watchdog window must be at least 1, got 0"),
        ({"clipped": -0.1}, "watchdog clipped must be None or >= 0, got -0.1"),
        ({"hunger": 1}, "watchdog has no field 'hunger'"),
    ],
)
def test_settings_that_are_wrong(value, message):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(output_dir="out", report_to="none", watchdog=value)


def test_a_teacher_that_is_nearly_certain_may_get_a_little_less_so():
    """1.5 times next to nothing is no limit; the factor counts where the start is larger."""
    starts = {1e-6: 0.02 + 1e-6, 0.011: 0.031, 0.04: 0.06, 0.1: 0.15}
    for start, limit in starts.items():
        bound = BOUNDS["entropy"](1.5, Scene(ln_vocab=4.0, temperature=1.0, start=start))
        assert bound == pytest.approx(limit)


def test_the_config_makes_the_callback():
    made = WatchdogConfig(action="stop", window=5, endless=0.4).make()
    again = Watchdog.from_state(json.loads(json.dumps(made.state())))
    assert again.state() == made.state()
    assert (again.action, again.window, again.limits.endless) == ("stop", 5, 0.4)
