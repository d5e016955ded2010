"""Rollouts by a real vLLM in the trainer's process are those of `generate`."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hf_distill.servers import colocated, venvs

pytestmark = pytest.mark.real_engine("vllm")


def run(model: Path, folder: Path, *words: str) -> dict[str, Any]:
    command = [venvs.python("vllm"), "-m", "tests.hf_distill.servers.colocated", model, *words]
    done = subprocess.run(
        [str(word) for word in command],
        env=venvs.environment("vllm"),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_they_are_those_of_generate(smollm2: Path, tmp_path: Path) -> None:
    """Greedy, in float32: with the first weights, with others, and in a training."""
    found = run(smollm2, tmp_path)
    with_vllm, plain = found["vllm"], found["generate"]
    for name in ("before", "completions", "moved"):
        assert with_vllm[name] == plain[name], name
    assert len(plain["completions"]) == 2 * colocated.STEPS
    assert sum(map(len, plain["before"])) > 2 * len(colocated.PROMPTS)
    assert plain["before"] != plain["moved"]  # other weights were sent
    for name in ("losses", "grad_norms"):
        # of the same tokens by the same code, in one process or in DDP of one
        assert with_vllm[name] == pytest.approx(plain[name], rel=1e-5), name
        assert len(set(plain[name])) == colocated.STEPS


def test_packed_weights_are_an_error(smollm2: Path, tmp_path: Path) -> None:
    """As vLLM is on a CPU, where the first sync would fail."""
    found = run(smollm2, tmp_path, "--packed")
    assert "vLLM has packed the weights of" in found["said"]
