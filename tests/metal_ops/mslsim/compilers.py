"""The host compiler, and a cache of what it has built."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

CPU_SHIMS = Path(__file__).parent / "shims" / "cpu"
PROCESSORS = ("x86_64", "AMD64", "aarch64", "arm64")


def _candidates() -> tuple[str, ...]:
    named = os.environ.get("CXX")
    return (named,) if named else ("g++", "clang++")


def unavailable() -> str | None:
    """Why no text can be run here, or None."""
    if platform.machine() not in PROCESSORS:
        return f"no fiber switch for {platform.machine()}, only for {', '.join(PROCESSORS)}"
    if platform.system() != "Linux":
        return f"needs Linux, this is {platform.system()}"
    if not any(shutil.which(name) for name in _candidates()):
        return f"needs a C++ compiler: none of {', '.join(_candidates())} is here"
    return None


def find() -> str:
    """The compiler: $CXX, else g++, else clang++."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"the Metal simulator {reason}")
    return next(name for name in _candidates() if shutil.which(name))


@functools.cache
def is_clang(compiler: str) -> bool:
    return "clang" in identity(compiler)


@functools.cache
def identity(compiler: str) -> str:
    """What a build depends on besides text and flags: versions, and the processor for -march."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    about = Path("/proc/cpuinfo")
    features = ""
    if about.exists():
        lines = about.read_text().splitlines()
        features = next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    return f"{compiler} {version.stdout} {platform.machine()} {features}"


@functools.cache
def _cache() -> Path:
    """A private folder; a temporary one where the user's cache cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "hf-distill" / "mslsim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="mslsim-"))
    return folder


def _shims() -> bytes:
    return b"".join(p.read_bytes() for p in sorted(CPU_SHIMS.iterdir()))


def run(command: list[str]) -> None:
    """A compiler's command; its messages are the SyntaxError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SyntaxError(f"{command[0]} failed:\n{done.stderr[:6000]}")


def cached(key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """What `make` wrote to a path, now or before; other processes may do the same."""
    path = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            made = Path(scratch) / path.name
            make(made)
            made.replace(path)
    return path


def library(text: str, flags: list[str], compiler: str) -> Path:
    """A shared library of C++ text and the simulator's runtime."""
    base = f"{identity(compiler)} {hashlib.sha256(_shims()).hexdigest()}"
    common = [compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w"]

    def make_runtime(path: Path) -> None:
        source = str(CPU_SHIMS / "runtime.cpp")
        run([*common, "-O2", "-g1", "-fno-exceptions", "-c", source, "-o", str(path)])

    def make(path: Path) -> None:
        source, compiled = path.with_suffix(".cpp"), path.with_suffix(".o")
        source.write_text(text)
        run([*common, *flags, f"-I{CPU_SHIMS}", "-c", str(source), "-o", str(compiled)])
        runtime = cached(base, ".o", make_runtime)
        run([compiler, "-shared", str(compiled), str(runtime), "-o", str(path), "-lm"])

    return cached(f"{base} {flags} {text}", ".so", make)
