"""A Trainer script becomes a distillation script by its class, its config and a teacher."""

import difflib
import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.hf_distill.trainers import models

HERE = Path(__file__).parent
PLAIN, DISTILL = HERE / "run_clm.py", HERE / "run_clm_distill.py"


def changed_lines() -> list[str]:
    """Lines of the distillation script that the plain one lacks, imports and blank lines apart."""
    plain, distill = (p.read_text(encoding="utf-8").splitlines() for p in (PLAIN, DISTILL))
    diff = difflib.ndiff(plain, distill)
    return [line[2:].strip() for line in diff if line.startswith("+ ") and line[2:].strip()]


def test_few_lines_differ() -> None:
    assert changed_lines() == [
        "from hf_distill import DistillConfig, DistillTrainer",
        "parser = HfArgumentParser((ScriptArguments, DistillConfig))",
        "trainer = DistillTrainer(",
        "teacher=script_args.teacher_name_or_path,",
    ]


@pytest.fixture
def command_line(tmp_path: Path) -> list[str]:
    for name, seed in (("student", 0), ("teacher", 1)):
        models.llama(seed).save_pretrained(tmp_path / name)
        models.tokenizer().save_pretrained(tmp_path / name)
    lines = [f"{row['prompt']} {row['completion']} {row['hint']}" for row in models.problems(40)]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    return [
        f"--model_name_or_path={tmp_path / 'student'}",
        f"--teacher_name_or_path={tmp_path / 'teacher'}",
        f"--train_file={tmp_path / 'train.txt'}",
        "--max_steps=2",
        "--per_device_train_batch_size=4",
        "--logging_steps=1",
        "--save_strategy=no",
        "--report_to=none",
        "--use_cpu=True",
    ]


def run(script: Path, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The script's state and evaluation, and its final weights."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, f"--output_dir={folder}"])
    runpy.run_path(str(script), run_name="__main__")
    state, metrics = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("trainer_state.json", "eval_results.json")
    )
    return {"state": state, "eval": metrics, "weights": load_file(folder / "model.safetensors")}


def test_both_scripts_run(
    tmp_path: Path, command_line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(PLAIN, command_line, tmp_path / "plain", monkeypatch)
    distill = run(DISTILL, [*command_line, "--alpha=0.5"], tmp_path / "distill", monkeypatch)
    hard = run(DISTILL, [*command_line, "--alpha=0"], tmp_path / "hard", monkeypatch)
    assert plain["state"]["global_step"] == distill["state"]["global_step"] == 2
    assert {"eval_loss", "eval_soft", "eval_hard"} <= distill["eval"].keys()
    assert models.difference(plain["weights"], distill["weights"]) > 1e-4
    # alpha 0: the same run, to rounding; Adam's default epsilon makes gradients of 1e-8 count
    assert hard["eval"]["eval_loss"] == pytest.approx(plain["eval"]["eval_loss"], rel=1e-5)
    assert distill["eval"]["eval_loss"] != pytest.approx(plain["eval"]["eval_loss"], rel=1e-2)
