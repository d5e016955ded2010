"""Caches that are not plain files of this machine: behind links, or on another machine."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import DataLoader

from hf_distill.cache import CacheReader
from tests.hf_distill.cache import caches


class Far(AsyncFileSystem):
    """Local files, read as those of a network are: in a thread that a fork does not copy."""

    protocol = "far"
    files = LocalFileSystem()

    async def _cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        return self.files.cat_file(path)

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return self.files.ls(path, detail=detail)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self.files.open(path, mode)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    caches.write(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def remote(cache: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(cache), "/elsewhere", recursive=True)
    yield "memory://elsewhere"
    memory.rm("/elsewhere", recursive=True)


def test_files_may_be_links(cache: Path, tmp_path: Path) -> None:
    """As in the folder that a download from the hub leaves."""
    linked = tmp_path / "snapshot"
    (linked / "shards").mkdir(parents=True)
    for path in cache.rglob("*.*"):
        os.symlink(path, linked / path.relative_to(cache))
    found = CacheReader(linked, "full")
    assert [found.row(i).row for i in range(len(found))] == list(range(caches.ROWS))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_workers_connect_for_themselves(cache: Path, tmp_path: Path) -> None:
    fsspec.register_implementation("far", Far, clobber=True)
    found = CacheReader(f"far://{cache}", copies=tmp_path / "copies")
    assert pickle.loads(pickle.dumps(found)).row(0).row == 0  # the parent has connected
    loader = DataLoader(
        range(caches.ROWS),  # type: ignore[arg-type]
        num_workers=2,
        collate_fn=lambda numbers: found.row(numbers[0]).row,
        multiprocessing_context="fork",
    )
    assert sorted(loader) == list(range(caches.ROWS))


@pytest.mark.parametrize("verify", ["lazy", "size"])
def test_a_copy_that_was_cut_is_made_again(remote: str, tmp_path: Path, verify: str) -> None:
    copies = tmp_path / "copies"
    row = CacheReader(remote, copies=copies).row(0)
    (copy,) = copies.iterdir()
    copy.write_bytes(copy.read_bytes()[:-9])
    assert CacheReader(remote, verify, copies).row(0).row_hash == row.row_hash


def test_a_copy_that_was_changed_is_made_again(remote: str, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    CacheReader(remote, copies=copies).row(0)
    (copy,) = copies.iterdir()
    right = copy.read_bytes()
    copy.write_bytes(right[:-9] + bytes([right[-9] ^ 1]) + right[-8:])
    assert CacheReader(remote, copies=copies).row(0).row == 0
    assert copy.read_bytes() == right
