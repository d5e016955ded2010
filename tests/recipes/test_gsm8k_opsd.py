"""The recipe end to end, in miniature: what it measures, writes and saves."""

import json
import subprocess
import sys
from pathlib import Path

import gsm8k_opsd
import pytest
import word_problems
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainers.models import PEFT_WARNING

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

ROOT = Path(gsm8k_opsd.__file__).parent.parent
FEW = ["--num_eval", "6", "--max_completion_length", "12", "--disable_tqdm", "true", "--use_cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gsm8k_opsd.py", *map(str, arguments)])
    gsm8k_opsd.main()


def results(folder: Path) -> dict:
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small untrained model with a chat template, as a folder."""
    tokenizer = word_problems.build_tokenizer()
    word_problems.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"Tom has {i} apples . how many apples ?",
            "answer": f"<<{i}={i}>>{i}\n#### {i}",
        }
        for i in range(2, 40)
    ]
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows[:30]), ("test", rows[30:])):
        lines = "\n".join(map(json.dumps, part))
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    return tmp_path / "data"


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    few = [*FEW, "--warm_up_steps", 2, "--max_steps", 4, "--accuracy_steps", 2]
    run(monkeypatch, "--demo", *few, "--per_device_train_batch_size", 4, "--output_dir", tmp_path)
    found = results(tmp_path)
    names = [
        f"{view} {when}"
        for when in ("before", "after", "after SFT control")
        for view in ("unaided", "hinted")
    ]
    assert list(found["accuracies"]) == names
    assert all(value["total"] == 6 for value in found["accuracies"].values())
    assert [step for step, _ in found["unaided_curve"]] == [0, 2, 4]
    assert "unaided after SFT control" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_the_control_is_supervised_training_from_the_same_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    starts, trained = [], []

    class Spy(gsm8k_opsd.DistillTrainer):
        def train(self, *args, **kwargs):
            starts.append({k: v.clone() for k, v in self.model.state_dict().items()})
            trained.append((self.teacher, self.args.alpha, self.args.max_steps))
            return super().train(*args, **kwargs)

    class First(gsm8k_opsd.OPSDTrainer):
        def train(self, *args, **kwargs):
            starts.append({k: v.clone() for k, v in self.model.state_dict().items()})
            return super().train(*args, **kwargs)

    monkeypatch.setattr(gsm8k_opsd, "DistillTrainer", Spy)
    monkeypatch.setattr(gsm8k_opsd, "OPSDTrainer", First)
    few = [*FEW, "--warm_up_steps", 2, "--max_steps", 2, "--per_device_train_batch_size", 4]
    run(monkeypatch, "--demo", *few, "--output_dir", tmp_path)
    assert trained == [(None, 0.0, 2)]
    opsd, control = starts
    assert all(opsd[name].equal(control[name]) for name in opsd)


def test_gsm8k_with_lora_under_accelerate_launch(tmp_path: Path, checkpoint: Path, gsm8k: Path):
    config = tmp_path / "settings.yaml"
    config.write_text("max_steps: 2\nper_device_train_batch_size: 2\nlora_r: 4\nuse_peft: true\n")
    command = [
        Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "1",
        ROOT / "recipes" / "gsm8k_opsd.py", *FEW, "--config", config,
        "--model_name_or_path", checkpoint, "--dataset", gsm8k, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = results(tmp_path / "out")
    losses = [entry["loss"] for entry in found["log_history"] if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert found["config"]["max_steps"] == 2
    assert found["task"] == "gsm8k"
    assert "teacher base: the student with its adapters off" in done.stderr
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert any(p.abs().max() > 0 for p in trained)


def test_a_hint_that_does_not_help_is_reported(
    tmp_path: Path, checkpoint: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    run(
        monkeypatch, *FEW, "--max_steps", 1, "--per_device_train_batch_size", 2,
        "--model_name_or_path", checkpoint, "--dataset", gsm8k, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "the hint does not help the model" in caplog.text  # untrained: both accuracies are 0


def test_no_held_out_problem_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="num_eval must be at least 1, got 0"):
        run(monkeypatch, "--demo", "--num_eval", 0, "--use_cpu", "--output_dir", tmp_path)


@pytest.mark.parametrize("name", ["gsm8k_opsd.yaml", "arithmetic_smollm2.yaml"])
def test_yaml_names_only_arguments_that_exist(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path):
    parser = gsm8k_opsd.make_parser()
    path = ROOT / "recipes" / name
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--bf16", "false"]
    _, config, model_args = parser.parse_args_and_config(arguments)
    assert model_args.use_peft
    assert config.max_completion_length == {"gsm8k_opsd.yaml": 320}.get(name, 12)
