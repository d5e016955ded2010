"""The recipe end to end, in miniature: what it measures, writes and saves."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import gsm8k_opsd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hf_distill.trainers.models import PEFT_WARNING

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

ROOT = Path(gsm8k_opsd.__file__).parent.parent
FEW = ["--num_eval", "6", "--max_completion_length", "12", "--disable_tqdm", "true", "--use_cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gsm8k_opsd.py", *map(str, arguments)])
    gsm8k_opsd.main()


def results(folder: Path) -> dict:
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    few = [*FEW, "--warm_up_steps", 2, "--max_steps", 4, "--accuracy_steps", 2]
    run(monkeypatch, "--demo", *few, "--per_device_train_batch_size", 4, "--output_dir", tmp_path)
    found = results(tmp_path)
    names = [f"{view} {when}" for when in ("before", "after") for view in ("unaided", "hinted")]
    names.append("unaided after SFT control")
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


def launch(cwd: Path, processes: int, *arguments: object) -> str:
    """Standard error of the recipe under `accelerate launch --num_processes N --cpu`."""
    accelerate = Path(sys.executable).parent / "accelerate"
    command = [accelerate, "launch", "--num_processes", processes, "--cpu"]
    command += ["--main_process_port", 29531, ROOT / "recipes" / "gsm8k_opsd.py", *FEW, *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path, checkpoint: Path, gsm8k: Path):
    def weights(processes: int, rows: int) -> dict[str, torch.Tensor]:
        out = tmp_path / str(rows * processes) / str(processes)
        source = ["--model_name_or_path", checkpoint, "--dataset", gsm8k, "--output_dir", out]
        steps = ["--max_steps", 2, "--per_device_train_batch_size", rows, "--warmup_steps", 0]
        greedy = ["--rollout", '{"temperature": 0}', "--adam_epsilon", 1e-4]
        launch(tmp_path, processes, *source, *steps, *greedy)
        return load_file(out / "model.safetensors")

    start = load_file(checkpoint / "model.safetensors")
    one, two, other = weights(1, 4), weights(2, 2), weights(1, 2)

    def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(float((a[name] - b[name]).abs().max()) for name in start)

    assert difference(one, two) < 1e-6
    assert difference(one, start) > 1e-5
    assert difference(one, other) > 1e-5


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gsm8k_with_lora(
    tmp_path: Path,
    checkpoint: Path,
    gsm8k: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    launched: bool,
):
    """In this process, and under `accelerate launch`."""
    config = tmp_path / "settings.yaml"
    config.write_text("max_steps: 2\nper_device_train_batch_size: 2\nlora_r: 4\nuse_peft: true\n")
    source = ["--model_name_or_path", checkpoint, "--dataset", gsm8k]
    words = ["--config", config, *source, "--output_dir", tmp_path / "out"]
    if launched:
        logged = launch(tmp_path, 1, *words)
    else:
        with caplog.at_level(logging.INFO):
            run(monkeypatch, *FEW, *words)
        logged = caplog.text
    found = results(tmp_path / "out")
    losses = [entry["loss"] for entry in found["log_history"] if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert found["config"]["max_steps"] == 2
    assert found["task"] == "gsm8k"
    assert "teacher base: the student with its adapters off" in logged
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
