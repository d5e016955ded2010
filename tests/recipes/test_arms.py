"""Results that are kept, and the tables of recipes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import arms
from hf_distill import DistillConfig


@dataclass
class Recipe:
    rows: int = 3
    folder: str = "a"


def test_an_arm_is_made_once_and_its_results_are_whole(tmp_path: Path):
    calls = []

    def make() -> dict:
        calls.append(len(calls))
        return {"points": [(0, 1.5)], "call": len(calls)}

    first = arms.kept(tmp_path / "seed0" / "kd", {"rows": 3}, make)
    assert first == {"points": [[0, 1.5]], "call": 1, "settings": {"rows": 3}}  # as JSON gives it
    assert arms.kept(tmp_path / "seed0" / "kd", {"rows": 3}, make) == first
    assert arms.kept(tmp_path / "seed1" / "kd", {"rows": 3}, make)["call"] == 2
    assert calls == [0, 1]
    assert [path.name for path in (tmp_path / "seed0" / "kd").iterdir()] == ["results.json"]


def test_an_arm_that_fails_leaves_no_results(tmp_path: Path):
    def make() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arms.kept(tmp_path / "kd", {}, make)
    assert not (tmp_path / "kd").exists()


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path):
    arms.write(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        arms.write(tmp_path / "x.json", {"a": 2, "b": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_settings_are_what_results_depend_on(tmp_path: Path):
    def settings(recipe: Recipe, **changes: object) -> dict:
        config = DistillConfig(str(tmp_path), report_to="none", **changes)
        return arms.settings_of(recipe, config, ["folder"])

    plain = settings(Recipe())
    assert plain["rows"] == 3
    assert plain["clip"] == {"bound": None, "level": "vocab_entry"}
    assert json.loads(json.dumps(plain)) == plain
    assert settings(Recipe(folder="b"), logging_steps=7, dataloader_num_workers=2) == plain
    for changes in ({"alpha": 0.25}, {"max_steps": 4}, {"optim": "sgd"}, {"clip": {"bound": 1.0}}):
        assert settings(Recipe(), **changes) != plain
    assert settings(Recipe(rows=4)) != plain


def test_only_settings_that_both_know_are_compared(tmp_path: Path):
    arms.kept(tmp_path, {"rows": 3, "old": 1}, lambda: {})
    assert arms.kept(tmp_path, {"rows": 3, "new": 2}, lambda: {})["settings"]["old"] == 1
    with pytest.raises(ValueError, match="is of a run with rows 3, not 4: remove its folder, or"):
        arms.kept(tmp_path, {"rows": 4}, lambda: {})


def test_a_table_is_markdown():
    assert arms.table(["arm", "loss"], [["kd", "1.25"], ["hidden", "2"]]).splitlines() == [
        "| arm    | loss |",
        "| ------ | ---- |",
        "| kd     | 1.25 |",
        "| hidden | 2    |",
    ]
