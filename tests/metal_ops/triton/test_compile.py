"""Triton's compilers take every kernel, for GPUs that need not be here: interpreting is lenient."""

import json
import subprocess
import sys
from typing import Any

import pytest

from metal_ops.spec import KINDS
from tests.metal_ops.triton import interpreter

REGISTERS = 128  # with 8 warps, two programs on a multiprocessor


def compile_for(targets: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    monkeypatch.delenv(interpreter.NAME, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-m", "tests.metal_ops.triton.compiling", *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(lines: list[dict]) -> None:
    for line in lines:
        assert not line["double"], line
        assert line["wide rows"], line
        if "reg" in line:
            assert line["reg"] <= REGISTERS, line
            assert line["stack"] <= 16, line  # bytes: a few registers kept in memory


def test_one_kind(tmp_path, monkeypatch):
    lines = compile_for(["cuda:90"], tmp_path, monkeypatch)
    assert {x["kernel"] for x in lines} == {
        "forward",
        "backward",
        "normalise",
        "log_sums",
        "join_log_sums",
        "spread",
        "mse",
        "cosine",
    }
    check(lines)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:75", "cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_every_kind(target, tmp_path, monkeypatch):
    lines = compile_for([target, "--all"], tmp_path, monkeypatch)
    assert {x["KIND"] for x in lines if "KIND" in x} == set(KINDS)
    check(lines)
