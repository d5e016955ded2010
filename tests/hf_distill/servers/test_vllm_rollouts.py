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
    for state in ("before", "moved"):
        with_vllm, plain = found[state]
        assert with_vllm == plain, state
        assert [len(row) for row in plain] == [colocated.NEW_TOKENS] * len(colocated.PROMPTS)
    assert found["before"][1] != found["moved"][1]  # the other weights were sent
    with_vllm, plain = found["vllm"], found["generate"]
    assert with_vllm["completions"] == plain["completions"]
    assert len(plain["completions"]) == 2 * colocated.STEPS
    for name in ("loss", "grad_norm"):  # of the same tokens by the same code
        assert with_vllm[name] == plain[name], name
        assert len(set(plain[name])) == colocated.STEPS


def test_packed_weights_are_an_error(smollm2: Path, tmp_path: Path) -> None:
    """As vLLM is on a CPU, where the first sync would fail."""
    found = run(smollm2, tmp_path, "--packed")
    assert "vLLM has packed the weights of" in found["said"]
