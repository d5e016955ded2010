"""Rollouts with an environment: dialogues, groups, and a share of the data's completions."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_distill import Attempt, Feedback, Hint, HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_opsd_trainer import Watched, rows_of

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

AGAIN = {"role": "user", "content": "Hint : think first"}


class Asker:
    """Asks again after each reply; its feedback is the length of the reply."""

    def __init__(self) -> None:
        self.seen: list[list[Attempt]] = []

    def __call__(self, attempts: Sequence[Attempt]) -> list[Feedback]:
        self.seen.append(list(attempts))
        return [Feedback([AGAIN], {"feedback": f"get {len(a.text.split())}"}) for a in attempts]


def talkative() -> torch.nn.Module:
    """Its replies end soon, not always."""
    model = models.phi()
    with torch.no_grad():
        model.lm_head.bias[models.EOS] = 5.0
    return model


def trainer(folder: Path, environment: Any = None, hint: Any = "hint", **changes: Any) -> Watched:
    settings = {"max_completion_length": 6, "per_device_train_batch_size": 4} | changes
    tokenizer = models.tokenizer()
    scored, data = settings.pop("scored", "all"), settings.pop("data", models.problems(chat=True))
    return Watched(
        settings.pop("model", None) or talkative(),
        OPSDConfig(**models.options(folder, **settings)),
        HintCollator(tokenizer, hint, scored=scored),
        data,
        models.problems(4, chat=True),
        tokenizer,
        environment=environment,
    )


def steps(run: OPSDTrainer) -> list[dict[str, float]]:
    return [logs for logs in run.state.log_history if "loss" in logs]


def test_a_dialogue_goes_on_where_a_reply_has_ended(tmp_path: Path) -> None:
    environment, rollout = Asker(), {"max_turns": 3, "temperature": 1.0}
    run = trainer(tmp_path, environment, rollout=rollout, max_steps=1, max_completion_length=2)
    run.train()
    rounds = environment.seen
    for turn, attempts in enumerate(rounds):
        assert {a.turn for a in attempts} == {turn}
    assert [len(x) for x in rounds[1:]] == [sum(a.ended for a in x) for x in rounds[:-1]]
    assert 4 == len(rounds[0]) > len(rounds[-1]) > 0
    last = rounds[-1][0]
    assert [m["role"] for m in last.messages] == ["user", *["assistant", "user"] * 2, "assistant"]
    assert last.messages[-1]["content"] == last.text
    # the student's row is the dialogue: every reply is scored, and nothing that was said to it
    row, labels = rows_of(run.trained[0])[last.group], run.trained[0]["labels"][last.group]
    assert run.processing_class.decode(row).count("think first") == 2
    assert run._window is not None
    written = run._window.episodes[0][last.group].completions
    assert labels[labels != -100].tolist() == [token for reply in written for token in reply]
    assert steps(run)[0]["tokens"] == sum(int((b["labels"] != -100).sum()) for b in run.trained)


def test_the_teachers_hint_is_the_feedback(tmp_path: Path) -> None:
    run = trainer(tmp_path, Asker(), "{feedback}", rollout={"max_turns": 1}, max_steps=2)
    run.train()
    for batch in run.trained:
        for student, teacher in zip(rows_of(batch), rows_of(batch, "teacher_"), strict=True):
            texts = [run.processing_class.decode(ids) for ids in (student, teacher)]
            assert "get" not in texts[0].split("assistant")[0]
            assert " get " in texts[1].split("assistant")[0]


def test_a_step_in_which_nothing_is_scored_changes_nothing(tmp_path: Path) -> None:
    hint = Hint(lambda row: None)
    run = trainer(tmp_path, Asker(), hint, scored="hinted", rollout={"max_turns": 1}, max_steps=2)
    before = models.weights(run.model)
    run.train()
    assert [logs["loss"] for logs in steps(run)] == [0.0, 0.0]
    assert models.difference(models.weights(run.model), before) == 0.0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_groups_hold_attempts_at_one_prompt(tmp_path: Path, micro_batches: int) -> None:
    class Judge(Asker):
        def __call__(self, attempts: Sequence[Attempt]) -> list[Feedback]:
            self.seen.append(list(attempts))
            return [
                Feedback(columns={"score": float(a.text == attempts[0].text)}) for a in attempts
            ]

    judge, hints = Judge(), []

    def hint(row: Any) -> str | None:
        hints.append((row["attempt"], row["sibling"], row["score"]))
        return row["sibling"] or None

    rollout = {"num_completions": 2, "temperature": 1.0, "steps_per_rollout": 2}
    sizes = {
        "per_device_train_batch_size": 4 // micro_batches,
        "gradient_accumulation_steps": micro_batches,
    }
    run = trainer(tmp_path, judge, hint, rollout=rollout, max_steps=8, **sizes)
    run.train()
    assert len(judge.seen) == 4
    for attempts in judge.seen:
        assert [a.group for a in attempts] == [0, 0, 1, 1]
        assert attempts[0].row == attempts[1].row != attempts[2].row == attempts[3].row
        assert len({a.text for a in attempts}) > 1
    firsts = [a.row["prompt"][0]["content"] for x in judge.seen for a in x]
    data = [row["prompt"][0]["content"] for row in models.problems(chat=True)[:8]]
    assert Counter(firsts) == Counter(data + data)
    # the first attempt has succeeded, so the second sees it
    assert (hints[1][1], hints[0][2]) == (hints[0][0], 1.0)
    with pytest.raises(ValueError, match="num_completions must divide per_device_train_batch_size"):
        trainer(tmp_path, rollout={"num_completions": 3})


def test_rounds_and_processes_draw_from_seeds_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = {"max_turns": 2, "steps_per_rollout": 2, "on_policy_fraction": 0.5}
    run = trainer(tmp_path, Asker(), rollout=rollout)
    assert run.rollouts is not None
    seeds: list[int] = []

    def sample(model: Any, prompts: Any, seed: int) -> list[list[int]]:
        seeds.append(seed)
        return [[models.EOS] for _ in prompts]

    monkeypatch.setattr(run.rollouts.engine, "sample", sample)
    batch = run.hint_collator.prompts(models.problems(2, chat=True))
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(OPSDConfig, "process_index", rank)
        for step in (0, 2):
            run.rollouts.play(run.model, [batch], step, training=True)
        drawn.append([run.rollouts.is_sampled(step) for step in range(40)])
    assert len(set(seeds)) == len(seeds) == 8
    # whether completions are sampled holds for a window, and for all processes
    assert drawn[0] == drawn[1]
    assert drawn[0][::2] == drawn[0][1::2]
    assert set(drawn[0]) == {True, False}


def test_the_anchor_needs_no_hint(tmp_path: Path) -> None:
    data = answered()
    settings: dict[str, Any] = {"scored": "hinted", "rollout": {"max_turns": 1}, "data": data}
    run = trainer(tmp_path, Asker(), "{feedback}", anchor_weight=0.5, max_steps=1, **settings)
    run.train()
    labels = [x[x != -100] for x in run.trained[0]["anchor_labels"]]
    written = [run.processing_class.decode(x, skip_special_tokens=True) for x in labels]
    assert written == [row["completion"][0]["content"] for row in data[:4]]


def answered() -> list[dict[str, Any]]:
    """Problems whose completions are messages."""
    return [
        row | {"completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in models.problems(chat=True)
    ]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, {0}), (1.0, {1}), (0.5, {0, 1})])
def test_a_share_of_the_rollouts_is_the_datas(
    tmp_path: Path, fraction: float, expected: set[int]
) -> None:
    rollout = {"on_policy_fraction": fraction, "temperature": 1.0}
    data = answered()
    run = trainer(tmp_path, rollout=rollout, max_steps=10, data=data * 3)
    run.train()
    texts = {row["completion"][0]["content"] for row in data}

    def is_data(batch: dict[str, Tensor]) -> bool:
        labels = [x[x != -100] for x in batch["labels"]]
        written = {run.processing_class.decode(x, skip_special_tokens=True) for x in labels}
        return written <= texts

    sampled = [int(not is_data(batch)) for batch in run.trained]
    assert set(sampled) == expected
    if fraction < 1:
        assert [logs["on_policy"] for logs in steps(run)] == sampled
    else:
        assert "on_policy" not in steps(run)[0]


def test_dialogues_of_a_window_survive_a_restart(tmp_path: Path) -> None:
    def run(folder: Path) -> Watched:
        rollout = {"max_turns": 2, "temperature": 1.0, "steps_per_rollout": 2}
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        return trainer(folder, Asker(), "{feedback}", rollout=rollout, **saving)

    straight = run(tmp_path)
    straight.train()
    for step in (1, 2):
        resumed = run(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert len(resumed.environment.seen) == (
            2 if step == 2 else len(straight.environment.seen) // 2
        )
        difference = models.difference(
            models.weights(resumed.model), models.weights(straight.model)
        )
        assert difference == 0.0


def test_columns_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    def judge(attempts: Sequence[Attempt]) -> list[Feedback]:
        return [Feedback(columns={"feedback": "no", "seen": torch.zeros(1)}) for _ in attempts]

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run = trainer(tmp_path, judge, rollout={"steps_per_rollout": 2}, **saving)
    with pytest.raises(TypeError, match=r"Feedback.columns plain numbers.*Tensor"):
        run.train()


def test_evaluation_asks_the_environment_too(tmp_path: Path) -> None:
    rollout = {"max_turns": 2, "temperature": 1.0, "num_completions": 2}
    run = trainer(tmp_path, Asker(), "{feedback}", rollout=rollout)
    first, second = run.evaluate(), run.evaluate()
    assert [a.row for a in run.environment.seen[0]] == models.problems(4, chat=True)
    assert [a.group for a in run.environment.seen[0]] == [0, 1, 2, 3]
    assert first["eval_loss"] == second["eval_loss"] > 0
    rollout, hint = {"max_turns": 1}, Hint(lambda row: None)
    unscored = trainer(tmp_path, Asker(), hint, scored="hinted", rollout=rollout)
    nothing = unscored.evaluate()
    assert math.isnan(nothing["eval_loss"]), "a mean over nothing, as in Trainer"
    assert nothing["eval_unscored_batches"] > 0


class Stream(IterableDataset):
    def __iter__(self):
        yield from models.problems(chat=True)


def test_rows_of_a_stream(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=Stream(), max_steps=2)
    run.train()
    assert len(steps(run)) == 2


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        (lambda attempts: [], {}, "one Feedback for each of 4 attempts, got 0"),
        (lambda a: [None] * len(a), {}, "one Feedback for each of 4 attempts, got 4: NoneType"),
        (Asker(), {"data": models.problems()}, "can continue chat messages only, got a text"),
        (Asker(), {"on_policy": False}, "judges sampled completions, got on_policy=False"),
        (
            None,
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches cuts tensors only",
        ),
        (None, {"rollout": {"max_turns": 0}}, "max_turns must be at least 1, got 0"),
        (None, {"rollout": {"num_completions": 0}}, "num_completions must be at least 1, got 0"),
        (
            None,
            {"rollout": {"on_policy_fraction": 1.5}},
            r"on_policy_fraction must be in \[0, 1\], got 1.5",
        ),
    ],
)
def test_errors(tmp_path: Path, environment: Any, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, environment, **changes).train()


@pytest.mark.parametrize(
    ("turns", "error", "message"),
    [(8, ValueError, r"set rollout.max_turns=1, got 8"), (1, ImportError, "needs vLLM")],
)
def test_processes_that_sample_together_must_play_as_many_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int, error: type, message: str
) -> None:
    """A process whose dialogues have all ended would leave the others waiting."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(error, match=message):
        trainer(tmp_path, Asker(), rollout={"max_turns": turns, "engine": "vllm"})
