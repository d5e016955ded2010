"""Each config file of accelerate starts a recipe, with CPU processes in the place of devices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_large
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import word_problems

ROOT = Path(distill_large.__file__).parents[1]
FILES = ROOT / "recipes" / "accelerate"
FEW = ["--num_rows", 16, "--num_eval", 4, "--max_tokens", 40, "--max_steps", 4]
FEW += ["--logging_steps", 1, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 1]
FEW += ["--learning_rate", "1e-3", "--disable_tqdm", "true"]
KINDS = {
    "one_gpu": (DistributedType.NO, 1),
    "mac": (DistributedType.NO, 1),
    "eight_gpus_fsdp2": (DistributedType.FSDP, 8),
    "eight_gpus_zero3": (DistributedType.DEEPSPEED, 8),
    "tensor_parallel": (DistributedType.MULTI_GPU, 8),
}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A teacher of the checkpoint's tokenizer, wider than it."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = word_problems.build_model(tokenizer, seed=0).config
    config.hidden_size, config.num_hidden_layers = 96, 2
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(name: str, given: list[object], out: Path, *arguments: object) -> list[str]:
    """`accelerate launch` of the recipe with a file; `given` are the launcher's own words."""
    words: list[object] = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", FILES / f"{name}.yaml", *given]
    words += [ROOT / "tests" / "recipes" / "on_cpu.py", ROOT / "recipes" / "distill_large.py"]
    return list(map(str, [*words, *FEW, "--output_dir", out, *arguments]))


def said_by(commands: list[list[str]]) -> str:
    """What the commands print, run side by side, as on several machines."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    given = {"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE}
    running = [subprocess.Popen(x, stderr=subprocess.STDOUT, **given) for x in commands]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), printed[0][-6000:]
    return "".join(printed)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_every_file(name: str) -> None:
    """What is in no field of accelerate's is an error of its reader."""
    kind, processes = KINDS[name]
    path = FILES / f"{name}.yaml"
    read = load_config_from_file(str(path))
    assert (read.distributed_type, read.num_processes) == (kind, processes)
    assert read.num_machines == 1
    text = yaml.safe_load(path.read_text())
    if "deepspeed_config" in text:
        assert (ROOT / text["deepspeed_config"]["deepspeed_config_file"]).is_file()


def test_no_file_is_forgotten() -> None:
    assert {path.stem for path in FILES.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize(
    ("option", "launcher", "processes", "size"),
    [
        (None, None, 8, 1),
        (None, "4", 8, 4),  # of accelerate's file
        (2, "4", 8, 2),
        (1, "4", 8, 1),
    ],
)
def test_the_size_of_a_tensor_parallel_group(
    option: int | None,
    launcher: str | None,
    processes: int,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PARALLELISM_CONFIG_TP_SIZE", raising=False)
    if launcher is not None:
        monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", launcher)
    state = SimpleNamespace(num_processes=processes)
    monkeypatch.setattr(distill_large, "PartialState", lambda: state)
    found = distill_large.placed(option)
    assert (found == {}) == (size == 1)
    assert size == 1 or found["distributed_config"].tp_size == size
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"tp_size must divide the 8 processes, got {wrong}"):
            distill_large.placed(wrong)


SAID = {
    "eight_gpus_fsdp2": "teacher: in pieces on the processes, by the student's engine (FSDP)",
    "eight_gpus_zero3": "teacher: in pieces on the processes, by the student's engine (DEEPSPEED)",
    "tensor_parallel": "output heads on several processes: in pieces",
    "one_gpu": "student: read by its hidden states",
    "mac": "student: read by its hidden states",
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[needs_deepspeed] if "zero" in x else []) for x in KINDS]
)
def test_a_recipe_trains_under_every_file(
    name: str, checkpoint: Path, larger: Path, gsm8k: Path, tmp_path: Path
) -> None:
    models = ["--student_name_or_path", checkpoint, "--teacher_name_or_path", larger]
    processes = min(2, KINDS[name][1])
    given: list[object] = ["--num_processes", processes, "--main_process_port", 29541]
    given += ["--parallelism_config_tp_size", 2] if name == "tensor_parallel" else []
    words = command(name, given, tmp_path / "out", *models, "--dataset", gsm8k)
    assert SAID[name] in said_by([words])
    check(tmp_path / "out", checkpoint)


def check(out: Path, checkpoint: Path) -> None:
    """A run has taken its steps, learnt, and saved the whole student."""
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert found["steps"] == 4
    losses = [log["loss"] for log in found["log_history"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    saved = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    moved = [float((x - start[n]).abs().max()) for n, x in saved.state_dict().items()]
    assert max(moved) > 1e-3


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_with_a_process_each(
    checkpoint: Path, larger: Path, gsm8k: Path, tmp_path: Path
) -> None:
    """Both are this one: what they must agree on is on their command lines."""
    models = ["--student_name_or_path", checkpoint, "--teacher_name_or_path", larger]
    place = ["--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1"]
    place += ["--main_process_port", 29543]
    given = [*models, "--dataset", gsm8k]
    name = "eight_gpus_fsdp2"
    ranks = ([*place, "--machine_rank", rank] for rank in range(2))
    printed = said_by([command(name, x, tmp_path / "out", *given) for x in ranks])
    assert SAID[name] in printed
    check(tmp_path / "out", checkpoint)
