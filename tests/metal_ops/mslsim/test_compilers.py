"""Which compiler, on which machine, and builds that are kept."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from tests.metal_ops.mslsim import compile_shader, compilers

TEXT = """
using namespace metal;
kernel void count(device int* out, uint i [[thread_position_in_grid]]) { out[i] = int(i); }
"""
needs_compiler = pytest.mark.skipif(
    compilers.unavailable() is not None, reason=f"the simulator {compilers.unavailable()}"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilers._cache.cache_clear()
    yield tmp_path / "hf-distill" / "mslsim"
    compilers._cache.cache_clear()


def _counts(check: bool = False) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    compile_shader(TEXT, check).count(out)
    assert torch.equal(out, torch.arange(32).int())


@needs_compiler
def test_builds_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch):
    _counts()
    built = sorted(cache.iterdir())
    assert [p.suffix for p in built].count(".so") == 1
    with monkeypatch.context() as patch:
        patch.setattr(compilers, "run", lambda command: pytest.fail(f"ran {command}"))
        _counts()
    assert sorted(cache.iterdir()) == built
    _counts(check=True)
    assert [p.suffix for p in cache.iterdir()].count(".so") == 2

    with monkeypatch.context() as patch:
        patch.setattr(compilers, "_shims", lambda: b"others")
        patch.setattr(compilers, "run", lambda command: pytest.fail("built again"))
        with pytest.raises(pytest.fail.Exception, match="built again"):
            _counts()


def test_builds_at_the_same_time(cache: Path):
    """Each makes its own, the last to finish stays, nobody sees half of one."""
    started = Barrier(4)

    def make(path: Path) -> None:
        started.wait()
        path.write_text(path.name * 1000)

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: compilers.cached("key", ".so", make), range(4)))
    (path,) = paths
    assert path.read_text() == path.name * 1000
    assert list(cache.iterdir()) == [path]  # no scratch folder is left


def test_a_build_that_fails_leaves_nothing(cache: Path):
    def make(path: Path) -> None:
        path.touch()
        raise SyntaxError

    with pytest.raises(SyntaxError):
        compilers.cached("key", ".so", make)
    assert list(cache.iterdir()) == []


def test_no_place_for_a_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilers._cache.cache_clear()
    path = compilers.cached("key", ".so", Path.touch)
    assert path.exists()
    assert tmp_path not in path.parents


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for machine, reason in (("x86_64", "no-such-compiler"), ("riscv64", "riscv64")):
        monkeypatch.setattr(compilers.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(compilers.platform, "system", lambda: "Linux")
        assert reason in str(compilers.unavailable())
        with pytest.raises(RuntimeError, match=f"the Metal simulator .*{reason}"):
            compile_shader(TEXT)


@needs_compiler
def test_messages_of_the_compiler():
    with pytest.raises(SyntaxError, match=r"text.metal:3:.*error"):
        compile_shader(TEXT.replace("int(i)", "int(j)"), name="text.metal")
