"""`log_completions` in a training run: what is collected, when it is written, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_distill import OPSDConfig, OPSDTrainer
from hf_distill.monitoring import completion_table
from tests.hf_distill.trainers import models


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    monkeypatch.setattr(
        completion_table,
        "print_prompt_completions_sample",
        lambda *args, extra: calls.append((*args, extra)),
    )
    return calls


def train(folder: Path, resume: bool = False, **changes: Any) -> OPSDTrainer:
    settings = {"max_completion_length": 6, "log_completions": 2, "logging_steps": 2} | changes
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, **settings)),
        train_dataset=models.problems(),
        eval_dataset=models.problems(4),
        processing_class=models.tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_every_training_row_is_kept_and_some_are_shown(tmp_path: Path, printed: list) -> None:
    train(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    for row, problem in zip(rows, models.problems(), strict=False):
        assert row["prompt"] in (problem["prompt"], problem["prompt"] + " ")
        assert row["hints"] == [problem["hint"]]
        assert 1 <= len(row["completion"].split()) <= 6
    # at step 2, and what is left at the end
    assert [(len(prompts), step) for prompts, _, _, _, step, _ in printed] == [(2, 2), (2, 3)]


def test_repeated_completions_are_kept_once(tmp_path: Path, printed: list) -> None:
    train(tmp_path, max_steps=4, rollout={"steps_per_rollout": 2})
    assert [row["step"] for row in read(tmp_path)] == [0] * 4 + [2] * 4


def test_a_resumed_run_has_the_rows_of_an_unbroken_one(tmp_path: Path, printed: list) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(unbroken, max_steps=4)
    # rows 0 to 2 are in the file since the checkpoint, row 3 of the broken run is sampled again
    train(broken, max_steps=4, save_strategy="steps", save_steps=3, logging_steps=100)
    (broken / "checkpoint-4").rename(tmp_path / "away")
    train(broken, resume=True, max_steps=4, save_strategy="steps", save_steps=3, logging_steps=100)
    assert read(broken) == read(unbroken)


def test_completions_of_a_checkpoint_are_not_kept_again(tmp_path: Path, printed: list) -> None:
    settings: dict[str, Any] = {
        "rollout": {"steps_per_rollout": 2},
        "save_strategy": "steps",
        "save_steps": 1,
    }
    train(tmp_path, max_steps=1, **settings)
    train(tmp_path, resume=True, max_steps=3, **settings)
    assert [row["step"] for row in read(tmp_path)] == [0] * 4 + [2] * 4


def test_the_checkpoint_holds_what_was_not_logged_yet(tmp_path: Path, printed: list) -> None:
    class Killed(RuntimeError):
        pass

    class Kill(completion_table.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise Killed

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    settings |= {"max_completion_length": 6, "log_completions": 1, "max_steps": 4}
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(tmp_path, **settings)),
        train_dataset=models.problems(),
        processing_class=models.tokenizer(),
        callbacks=[Kill()],
    )
    with pytest.raises(Killed):
        trainer.train()
    assert [row["step"] for row in read(tmp_path)] == [0] * 4 + [1] * 4


def test_by_default_nothing_is_collected(tmp_path: Path, printed: list) -> None:
    trainer = train(tmp_path, log_completions=0)
    assert trainer.rollouts.table is None
    assert printed == []
    assert not (tmp_path / "completions.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_completions": -1}, "log_completions must not be negative, got -1"),
        ({"log_completions": 2, "on_policy": False}, "log_completions 2 > 0 needs on_policy"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPSDConfig(output_dir="out", report_to="none", **settings)


def test_values_of_tokens_are_those_that_are_logged(tmp_path: Path, printed: list) -> None:
    """The mean of the file's values is the mean in the log; rows are those that were sampled."""
    weights = {"number": 3.0, "entropy": -1.0}
    trainer = train(
        tmp_path, max_steps=1, logging_steps=1, log_token_values=8, token_weights=weights
    )
    rows = read(tmp_path)
    sampled = [row for row in rows if "completion" in row]
    told = [row for row in rows if "tokens" in row]
    assert len(told) == len(sampled) == 4
    for row, of_tokens in zip(sampled, told, strict=True):
        assert "".join(row["completion"].split()) == "".join("".join(of_tokens["tokens"]).split())
    (logs,) = [entry for entry in trainer.state.log_history if "loss" in entry]

    def every(name: str) -> list[float]:
        return [x for row in told for x in row["values"][name]]

    losses, shares = every("loss"), every("weight")
    for name, values in (("soft", losses), ("student_entropy", every("student_entropy"))):
        assert sum(values) / len(values) == pytest.approx(logs[name], rel=1e-5)
    # the training loss is the mean by the weights, which are not all one
    mean = sum(x * y for x, y in zip(losses, shares, strict=True)) / sum(shares)
    assert mean == pytest.approx(logs["loss"], rel=1e-5)
    assert min(shares) < 1 - 1e-3
    assert len(printed[0][0]) == 2  # the screen shows completions only


def test_values_are_written_of_so_many_rows_of_a_batch(tmp_path: Path, printed: list) -> None:
    train(tmp_path, max_steps=2, log_token_values=1)
    told = [row for row in read(tmp_path) if "tokens" in row]
    batch = models.options(tmp_path)["per_device_train_batch_size"]
    assert [row["step"] for row in told] == sorted([0, 1] * (4 // batch))


def test_values_of_tokens_need_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_token_values 2 > 0 needs log_completions"):
        OPSDConfig(**models.options(tmp_path, log_token_values=2))
    with pytest.raises(ValueError, match="log_token_values must not be negative, got -1"):
        OPSDConfig(**models.options(tmp_path, log_token_values=-1))
