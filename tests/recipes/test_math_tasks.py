"""Rows, hints and grading of the recipes' tasks."""

import json
from pathlib import Path

import pytest

from helpers import math_tasks
from helpers.accuracy import Accuracy

EXAMPLE = {
    "question": "Natalia sold clips to 48 friends, then half as many. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72.\n#### 72",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    other = {**EXAMPLE, "answer": "It costs $<<1000*1.5=1500>>1,500.\n#### 1,500"}
    for split, rows in (("train", [EXAMPLE, other]), ("test", [other, EXAMPLE, EXAMPLE])):
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    return tmp_path


def test_gsm8k_rows(folder: Path):
    task = math_tasks.gsm8k(str(folder), num_test=2)
    assert len(task.train) == 2
    assert [row["answer"] for row in task.test] == ["1,500", "72"]
    row = task.train[0]
    assert row["hint"] == "She sold 48/2 = 24 clips.\nThat is 48+24 = 72.\n#### 72"
    assert row["prompt"][0]["content"].startswith(EXAMPLE["question"])
    assert "72" not in row["prompt"][0]["content"]


def test_gsm8k_hint_reaches_the_teacher_only(folder: Path):
    task = math_tasks.gsm8k(str(folder), num_test=1)
    row = task.train[0]
    prompt = [dict(message) for message in row["prompt"]]
    taught = task.hint.insert(row["prompt"], task.hint.render(row))
    assert row["hint"] in taught[-1]["content"]
    assert taught[-1]["content"].startswith(prompt[0]["content"])
    assert row["prompt"] == prompt


def test_a_folder_without_test_is_refused(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text(json.dumps(EXAMPLE))
    with pytest.raises(FileNotFoundError, match=r"a dataset folder must hold test\.jsonl"):
        math_tasks.gsm8k(str(tmp_path), num_test=1)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so it is\n#### 72", "72", True),
        ("#### $1,500.00", "1500", True),
        ("#### 1500", "1,500", True),
        ("#### 72.", "72", True),
        ("#### -3", "-3", True),
        ("first #### 5 then #### 72", "72", True),  # the last one counts
        ("#### 5 then #### 7", "5", False),
        ("the answer is 72", "72", False),  # without the marks there is no answer
        ("#### 7 2", "72", False),
        ("####", "72", False),
    ],
)
def test_grading(folder: Path, text: str, answer: str, right: bool):
    task = math_tasks.gsm8k(str(folder), num_test=1)
    assert task.is_right(text, {"answer": answer}) is right


def test_arithmetic_rows_are_disjoint_right_and_complete():
    task = math_tasks.arithmetic(num_test=100, seed=0)
    assert len(task.test) == 100
    assert len(task.train) > 2000
    seen = [row["prompt"][0]["content"] for row in task.train + task.test]
    assert len(set(seen)) == len(seen)
    for row in task.train[:200]:
        question = row["prompt"][0]["content"].split("?")[0].removeprefix("What is ")
        assert eval(question) == int(row["answer"]) >= 0  # the question is two numbers and a sign
    assert task.is_right("The answer is 12.", {"answer": "12"})
    assert not task.is_right("12 or 13", {"answer": "12"})
    assert task.hint.render(task.train[0]) == f"The correct answer is {task.train[0]['answer']}."


def test_arithmetic_depends_on_the_seed():
    first, second = (math_tasks.arithmetic(50, seed) for seed in (0, 1))
    assert first.test != second.test
    assert first.test == math_tasks.arithmetic(50, 0).test


@pytest.mark.parametrize(("right", "total"), [(1, 10), (5, 10), (223, 256)])
def test_interval_holds_the_shares_that_the_count_does_not_reject(right: int, total: int):
    """Wilson's bounds are the two p whose z-score for the observed share is 1.96."""
    for bound, inwards in zip(Accuracy(right, total, 1.0, 1.0).interval(), (1, -1), strict=True):
        p = bound + inwards * 1e-12
        z = abs(right / total - p) / (p * (1 - p) / total) ** 0.5
        assert z == pytest.approx(1.959964, abs=1e-4)


def test_interval_of_a_known_count():
    assert Accuracy(5, 10, 1.0, 1.0).interval() == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Accuracy(0, 10, 1.0, 1.0).interval() == pytest.approx((0.0, 0.2775), abs=1e-4)
