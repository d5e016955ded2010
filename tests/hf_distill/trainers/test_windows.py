"""What a window of sampled completions carries: anchors, log-probabilities, teachers, overlap."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import ModelTeacher, OPSDConfig, RoutedTeacher
from hf_distill.data.episodes import Episode
from hf_distill.data.token_classes import CLASSES
from hf_distill.losses import behaviour_log_probs
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_opsd_trainer import Watched, rows_of

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


def trainer(folder: Path, model: Any = None, teacher: Any = None, **changes: Any) -> Watched:
    settings = {"max_completion_length": 6, "watchdog": {"action": "off"}} | changes
    rows = [
        row | {"domain": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(models.problems())
    ]
    return Watched(
        models.llama() if model is None else model,
        OPSDConfig(**models.options(folder, **settings)),
        train_dataset=rows,
        processing_class=models.tokenizer(),
        teacher=teacher,
    )


def steps(run: Watched) -> list[dict[str, float]]:
    return [logs for logs in run.state.log_history if "loss" in logs]


def scored(labels: Tensor) -> list[list[int]]:
    return [row[row != -100].tolist() for row in labels]


def test_the_anchor_is_the_datas_completion_on_the_students_prompt(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, anchor_weight=0.5, max_steps=1, **changes)
    start = models.copied(run.model)
    run.train()
    tokenizer, data = run.processing_class, models.problems()[:4]
    expected = [[*tokenizer(row["completion"])["input_ids"], models.EOS] for row in data]
    found = [row for batch in run.trained for row in scored(batch["anchor_labels"])]
    assert sorted(found) == sorted(expected)  # micro-batches have rows of like lengths
    prompts = {row["prompt"]: x for row, x in zip(data, expected, strict=True)}
    trained = [row for batch in run.trained for row in rows_of(batch)]
    texts = [tokenizer.decode(row) for row in trained]
    assert found == [next(x for p, x in prompts.items() if t.startswith(p)) for t in texts]
    count = sum(map(len, expected))
    assert [int(batch["anchor_count"]) for batch in run.trained] == [count, count]
    total = 0.0
    for row, completion in zip(data, expected, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            logits = start(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        at = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(at[range(len(completion)), completion].sum())
    (logs,) = steps(run)
    assert logs["anchor"] == pytest.approx(total / count, rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["soft"] + 0.5 * total / count, rel=1e-5)


def reused(folder: Path, **changes: Any) -> Watched:
    rollout = {"steps_per_rollout": 2, "temperature": 1.0, "importance_clip": 1.5}
    settings = {"max_steps": 4, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    return trainer(folder, rollout=rollout, **settings | changes)


def test_reused_completions_know_the_student_that_wrote_them(tmp_path: Path) -> None:
    run = reused(tmp_path)
    start = models.copied(run.model)
    run.train()
    first, second, third, _ = run.trained
    expected = behaviour_log_probs(run._reader, start, first)
    torch.testing.assert_close(
        first["behaviour_log_probs"], expected, rtol=0, atol=0, equal_nan=True
    )
    for name in ("input_ids", "behaviour_log_probs"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first["input_ids"], third["input_ids"])
    ratios = [logs["importance_ratio"] for logs in steps(run)]
    assert ratios[0] == ratios[2] == 1.0
    assert min(abs(ratios[1] - 1.0), abs(ratios[3] - 1.0)) > 0.01
    once = trainer(tmp_path / "once", rollout={"importance_clip": 1.5}, max_steps=1)
    once.train()
    assert "behaviour_log_probs" not in once.trained[0]
    rollout = {"importance_clip": 1.5, "steps_per_rollout": 2, "on_policy_fraction": 0.0}
    read = trainer(tmp_path / "read", rollout=rollout, max_steps=2)
    read.train()
    assert all("behaviour_log_probs" not in batch for batch in read.trained)


def test_the_writers_log_probabilities_survive_a_restart(tmp_path: Path) -> None:
    straight = reused(tmp_path)
    straight.train()
    resumed = reused(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert models.difference(models.weights(resumed.model), models.weights(straight.model)) == 0.0
    assert steps(resumed)[-3]["importance_ratio"] == steps(straight)[1]["importance_ratio"] != 1.0
    end = models.weights(straight.model)
    straight.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert models.difference(models.weights(straight.model), end) == 0.0


@pytest.mark.parametrize(
    "changes",
    [{}, {"on_policy": False}, {"rollout": {"on_policy_fraction": 0.0}}],
    ids=["sampled", "off_policy", "of_the_data"],
)
def test_each_row_asks_the_teacher_of_its_column(tmp_path: Path, changes: dict) -> None:
    teachers = {"odd": ModelTeacher(models.llama(1)), "even": ModelTeacher(models.llama(2))}
    teacher = RoutedTeacher(teachers, column="domain")
    run = trainer(tmp_path, teacher=teacher, max_steps=2, **changes)
    run.train()
    for batch in run.trained:
        assert batch["teacher_route"].tolist() == [1, 0, 1, 0]
    swapped = RoutedTeacher({"even": teachers["odd"], "odd": teachers["even"]}, column="domain")
    other = trainer(tmp_path / "other", teacher=swapped, max_steps=1, **changes)
    other.train()
    assert abs(steps(other)[0]["soft"] - steps(run)[0]["soft"]) > 1e-4


def test_completions_that_recite_the_hint_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, max_steps=1, max_completion_length=20)
    tokenizer = run.processing_class
    assert run.rollouts is not None
    hints = [tokenizer(row["hint"])["input_ids"] for row in models.problems()[:4]]
    written = [hints[0], [9] * 8, [*hints[2][:6], 9, 9], [9] * 8]

    def sample(model: Any, prompts: Any, seed: int) -> list[list[int]]:
        return written

    monkeypatch.setattr(run.rollouts.engine, "sample", sample)
    run.train()
    # rows 0 and 2 have hints of four tokens and more: all of the first's runs of four stand in it,
    # and three of the five of the second
    assert len(hints[1]) < 4 <= len(hints[0])
    first = len(hints[0]) - 3
    assert steps(run)[0]["hint_overlap"] == (first + 3) / (first + 5)


def test_a_hint_may_be_recited_in_any_reply(tmp_path: Path) -> None:
    rollouts = trainer(tmp_path).rollouts
    assert rollouts is not None
    row, length = models.problems()[0], 5
    recited = models.tokenizer()(row["hint"])["input_ids"][:length]
    one = Episode(row, row["prompt"], 0, [[9] * length, recited], hints=[row["hint"]])
    rollouts._compare_with_hints([[one]])
    # two of the seven runs of four
    assert rollouts.read(training=True)["hint_overlap"] == pytest.approx(2 / 7)


def test_the_divergence_is_logged_by_class_of_token(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, rollout={"temperature": 1.0})
    run.train()
    (logs,) = steps(run)
    found = {name: logs[f"share_{name}"] for name in CLASSES if f"share_{name}" in logs}
    assert len(found) > 1
    assert sum(found.values()) == pytest.approx(1.0)
