"""The arms of self-distillation in miniature: tasks, resuming, the paired differences."""

import json
import math
import random
import sys
from pathlib import Path

import opsd_arms
import pytest

from helpers import arm_results, hint_tasks, word_problems
from helpers.warm_up import IGNORED_LABEL

FEW = [
    "--warm_up_steps", "1", "--max_steps", "1", "--num_eval", "2", "--num_train", "8",
    "--per_device_train_batch_size", "2", "--max_completion_length", "4",
]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["opsd_arms.py", *map(str, arguments)])
    opsd_arms.main()


def test_every_arm_trains_and_is_kept(tmp_path: Path, monkeypatch, capsys):
    given = [*FEW, "--tasks", "rule", "--seeds", 0, "--output_dir", tmp_path]
    run(monkeypatch, *given)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rule"]) == list(opsd_arms.ARMS)
    for name, of_seeds in results["rule"].items():
        assert ("forecast" in of_seeds["0"]) == (name != "sft")
        assert ("step_seconds" in of_seeds["0"]) == (name != "none")
    assert (tmp_path / "opsd_arms.png").read_bytes().startswith(b"\x89PNG")
    assert "| contrast_base_kl " in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(opsd_arms, "train", lambda *_: pytest.fail("trained again"))
    run(monkeypatch, *given)
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tasks", "sums"], "tasks must be among"), (["--arms", "best"], "arms must be among")],
)
def test_an_unknown_name_is_an_error(tmp_path: Path, monkeypatch, arguments: list, message: str):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *FEW, *arguments, "--output_dir", tmp_path)


@pytest.mark.parametrize("name", hint_tasks.TASKS)
def test_rows_are_graded_and_have_a_wrong_hint(name: str):
    task = hint_tasks.TASKS[name].make(40, 40, 0)
    train, test = ({row["prompt"][0]["content"] for row in x} for x in (task.train, task.test))
    assert not train & test
    for row in [*task.train, *task.test]:
        assert row["wrong"] != row["hint"]
        assert task.is_right(row["completion"], row)
        assert not task.is_right(f"#### {int(row['answer']) + 1}", row)


def test_the_rule_tells_no_answer_and_the_shortcut_only_that():
    rule, shortcut = (hint_tasks.TASKS[x].make(20, 1, 0).train for x in ("rule", "shortcut"))
    assert {row["hint"] for row in rule} == {hint_tasks.RULE}
    assert all(row["hint"] == row["answer"] for row in shortcut)


def test_the_shortcut_is_learnt_with_the_hint_only():
    """Whoever sees the hint answers at once or goes on with steps; the others write all steps."""
    tokenizer = word_problems.build_tokenizer()
    examples = hint_tasks._shortcut_examples(word_problems.WordEncoder(tokenizer), random.Random(0))
    at_once = 0
    for ids, labels in (next(examples) for _ in range(100)):
        text = tokenizer.decode(ids)
        trained = tokenizer.decode([x for x in labels if x != IGNORED_LABEL])
        if "hint :" not in text:
            assert trained.startswith("start")
        elif "start =" not in text and trained.startswith("####"):
            at_once += trained.count("=") == 0
        assert trained.endswith("<end>")
    assert 10 <= at_once <= 40


def result(share: float, seconds: float | None = None) -> dict:
    measured = {"share": share, "mean_length": 4.0}
    return {"unaided": measured, "hinted": measured, "step_seconds": seconds}


def test_differences_are_paired_by_seed():
    start = {0: result(0.1, 1.0), 1: result(0.5, 2.0), 2: result(0.9, 4.0)}
    arm = {0: result(0.3, 2.0), 1: result(0.6, 6.0), 2: result(1.0, 4.0), 3: result(0.0)}
    found = arm_results.paired(arm, start)
    assert found is not None
    assert found.mean == pytest.approx(0.4 / 3)  # of 0.2, 0.1, 0.1
    # scipy.stats.t.ppf(0.975, 2) = 4.302653; their standard deviation is 0.1 / sqrt(3)
    assert found.half == pytest.approx(4.302653 * 0.1 / 3, rel=1e-3)
    assert arm_results.ratio(arm, start, "step_seconds") == 2.0
    assert arm_results.paired({4: result(1.0)}, start) is None
    assert math.isinf(arm_results.Difference.of([0.5]).half)
    shown = arm_results.show({"rule": {"none": start, "plain": arm}}, "none", "plain")
    assert "| plain | 47.5      |" in shown
    assert "| +13.3 ± 14.3" in shown
