"""The table of completions: its file, what is shown, what trackers get, and resuming."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from hf_distill.monitoring import completion_table
from hf_distill.monitoring.completion_table import CompletionTable
from tests.hf_distill.trainers import models

TOKENIZER = models.tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def table(folder: Path, report_to: Any = (), num_shown: int = 2) -> CompletionTable:
    return CompletionTable(str(folder), report_to, TOKENIZER, num_shown, Accelerator(cpu=True))


def fill(made: CompletionTable, step: int, count: int = 1, extra: Any = None) -> None:
    prompts = [ids(f"What is {1 + i} + 1 ?") for i in range(count)]
    answers = [ids(f"{2 + i} <|im_end|>") for i in range(count)]
    made.add(step, prompts, [["Hint : 2", "done"]] * count, answers, extra)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_all_rows_are_in_the_file_with_special_tokens(tmp_path: Path) -> None:
    made = table(tmp_path / "new" / "folder", num_shown=1)
    fill(made, 0, 2)
    fill(made, 3, 1, {"reward": [0.5]})
    made.write(4)
    fill(made, 4)
    made.write(5)
    hints = ["Hint : 2", "done"]
    assert read(tmp_path / "new" / "folder") == [
        {"step": 0, "prompt": "What is 1 + 1 ?", "hints": hints, "completion": "2 <|im_end|>"},
        {"step": 0, "prompt": "What is 2 + 1 ?", "hints": hints, "completion": "3 <|im_end|>"},
        {
            "step": 3,
            "prompt": "What is 1 + 1 ?",
            "hints": hints,
            "completion": "2 <|im_end|>",
            "reward": 0.5,
        },
        {"step": 4, "prompt": "What is 1 + 1 ?", "hints": hints, "completion": "2 <|im_end|>"},
    ]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    monkeypatch.setattr(
        completion_table,
        "print_prompt_completions_sample",
        lambda *args, extra: calls.append((*args, extra)),
    )
    return calls


def test_a_few_rows_are_shown_and_their_columns_belong_together(
    tmp_path: Path, printed: list
) -> None:
    made = table(tmp_path, num_shown=3)
    fill(made, 0, 8, {"length": list(range(8))})
    random.seed(5)
    state = random.getstate()
    made.write(1)
    assert random.getstate() == state
    ((prompts, completions, rewards, advantages, step, extra),) = printed
    assert (rewards, advantages, step) == ({}, None, 1)
    assert list(extra) == ["hints", "step", "length"]
    assert len(set(prompts)) == 3
    assert extra["hints"] == ["Hint : 2\n\ndone"] * 3
    for prompt, completion, length in zip(prompts, completions, extra["length"], strict=True):
        assert prompt == f"What is {1 + int(length)} + 1 ?"
        assert completion == f"{2 + int(length)} <|im_end|>"


def test_other_logs_show_other_rows(tmp_path: Path, printed: list) -> None:
    made = table(tmp_path, num_shown=1)
    for step in range(6):
        fill(made, step, 8)
        made.write(step)
    assert len({prompts[0] for prompts, *_ in printed}) > 1


def test_fewer_rows_than_asked_for_and_none(tmp_path: Path, printed: list) -> None:
    made = table(tmp_path, num_shown=5)
    made.write(1)
    assert printed == []
    assert not (tmp_path / "completions.jsonl").exists()
    fill(made, 1, 2)
    made.write(2)
    made.write(3)
    assert [len(prompts) for prompts, *_ in printed] == [2]


def test_what_is_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    made = table(tmp_path)
    made.add(0, [ids("What is 1 ?")], [["[bold]Hint : 2"]], [ids("done <|im_end|>")])
    made.write(7)
    shown = capsys.readouterr().out
    for text in ("Step 7", "What is 1 ?", "[bold]Hint : 2", "done <|im_end|>"):
        assert text in shown


def tracker(monkeypatch: pytest.MonkeyPatch, name: str, run: Any = "a run") -> list[Any]:
    """A package that records what is logged; a table is its data frame."""
    logged: list[Any] = []

    def Table(*, dataframe: Any) -> Any:
        return dataframe

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(run=run, log=logged.append, Table=Table))
    return logged


@pytest.mark.parametrize("names", [["wandb"], ["trackio"], ["tensorboard", "wandb", "trackio"]])
def test_trackers_get_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    logged = {name: tracker(monkeypatch, name) for name in ("wandb", "trackio")}
    made = table(tmp_path, names, num_shown=1)
    fill(made, 0, 2, {"reward": [0.5, 0.25]})
    fill(made, 1, 1)
    made.flush()
    fill(made, 2, 1)
    made.write(3)
    fill(made, 3, 1)
    made.write(4)
    for name, calls in logged.items():
        if name not in names:
            assert calls == []
            continue
        assert [list(call) for call in calls] == [["completions"], ["completions"]]
        first, second = (call["completions"] for call in calls)
        assert list(first) == ["step", "prompt", "hints", "completion", "reward"]
        assert first["step"].tolist() == [0, 0, 1, 2]
        assert first["hints"].tolist() == ["Hint : 2\n\ndone"] * 4
        assert first["completion"].tolist()[:2] == ["2 <|im_end|>", "3 <|im_end|>"]
        assert first["reward"].tolist()[:2] == [0.5, 0.25]
        assert first["reward"].isna().tolist() == [False, False, True, True]
        assert second["step"].tolist() == [3]


def test_without_a_run_wandb_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = tracker(monkeypatch, "wandb", run=None)
    made = table(tmp_path, ["wandb"])
    fill(made, 0)
    made.write(1)
    assert logged == []


def test_a_resumed_run_writes_no_row_twice(tmp_path: Path) -> None:
    made = table(tmp_path)
    for step in range(4):
        fill(made, step)
    made.flush()
    fill(made, 4)  # never written: the run is killed here
    again = table(tmp_path)
    again.start(2)
    assert [row["step"] for row in read(tmp_path)] == [0, 1]
    fill(again, 2)
    again.write(3)
    assert [row["step"] for row in read(tmp_path)] == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["completions.jsonl"]


def test_starting_again_forgets_what_was_collected(tmp_path: Path) -> None:
    made = table(tmp_path)
    fill(made, 0)
    made.start(0)
    made.write(1)
    assert not (tmp_path / "completions.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 10])
def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    made = table(tmp_path)
    fill(made, 0, 2)
    made.flush()
    path = tmp_path / "completions.jsonl"
    path.write_text(path.read_text()[:-cut])
    again = table(tmp_path)
    again.start(5)
    fill(again, 5)
    again.flush()
    assert [row["step"] for row in read(tmp_path)] == [0, 5]


def test_a_new_run_starts_with_an_empty_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = table(tmp_path)
    fill(made, 0, 3)
    made.flush()
    with caplog.at_level("INFO", "hf_distill.monitoring.completion_table"):
        table(tmp_path).start(0)
    assert read(tmp_path) == []
    assert "completions.jsonl: 3 rows dropped" in caplog.text


def test_other_processes_write_nothing(tmp_path: Path, printed: list, monkeypatch: Any) -> None:
    made = table(tmp_path)
    monkeypatch.setattr(type(made.accelerator), "is_main_process", False)
    fill(made, 0)
    made.write(1)
    assert printed == []
    assert not (tmp_path / "completions.jsonl").exists()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_shown must be at least 1, got 0"):
        table(tmp_path, num_shown=0)
    made = table(tmp_path)
    with pytest.raises(ValueError, match=r"must not be one of .*, got 'prompt'"):
        fill(made, 0, 1, {"prompt": ["x"]})
    with pytest.raises(ValueError, match=r"as many rows, got {'prompt': 1, .*'reward': 2}"):
        fill(made, 0, 1, {"reward": [1, 2]})
