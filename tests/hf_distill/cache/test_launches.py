"""Two launches that write one cache: the second waits, takes nothing away, and goes on."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hf_distill.cache import CacheReader, cache_teacher, launches
from hf_distill.cache.errors import CacheConfigMismatch
from tests.hf_distill.trainers import models


def write(path: Path, **changes: Any) -> Any:
    rows = models.rows(8)
    given = {"data_collator": models.Pad(), "shard_rows": 2} | changes
    return cache_teacher(models.llama(1), rows, path, **given)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_second_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "ASKED_AGAIN", 0.02)
    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    half = cache / "shards" / "shard-00000.host.1.tmp"
    half.write_bytes(b"of the first launch")
    done: list[Any] = []
    second = threading.Thread(target=lambda: done.append(write(cache)))
    with FileLock(cache / launches.LOCK), caplog.at_level(logging.WARNING):
        second.start()
        until(lambda: "is being written by another launch" in caplog.text)
        assert half.exists()
        assert [x.name for x in (cache / "shards").iterdir()] == [half.name]
    second.join(60)
    (manifest,) = done
    assert not half.exists()  # its launch has ended
    assert len(CacheReader(cache).manifest.shards) == len(manifest.shards) == 4


def test_another_may_follow(tmp_path: Path) -> None:
    first = write(tmp_path / "cache")
    assert write(tmp_path / "cache").shards == first.shards


def test_a_launch_that_failed_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    with pytest.raises(CacheConfigMismatch, match="seed"):
        write(tmp_path / "cache", seed=1)
    with FileLock(tmp_path / "cache" / launches.LOCK).acquire(timeout=0):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "acquire", none)
    assert len(write(tmp_path / "cache").shards) == 4
    assert "has no locks (no flock here)" in caplog.text
