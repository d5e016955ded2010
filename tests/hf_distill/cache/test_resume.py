"""A folder that has a cache already: what is kept, written again, refused or deleted."""

import builtins
import errno
from pathlib import Path
from typing import Any

import pytest

from hf_distill.cache import CacheConfigMismatch, CacheError, CacheReader, Full, TopK, progress
from hf_distill.cache.errors import CacheCorrupt, FormatVersionError
from tests.hf_distill.cache import caches
from tests.hf_distill.cache.caches import ROWS, collator
from tests.hf_distill.trainers import models


def test_a_finished_cache_is_left_alone(tmp_path: Path) -> None:
    caches.write(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shards/*")}
    caches.write(tmp_path, batch_size=2)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("shards/*")} == before


def test_only_what_is_missing_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caches.write(tmp_path)
    expected = caches.contents(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shards/*.safetensors")}
    shard = "shard-0000{}.safetensors"
    (tmp_path / "shards/shard-00001.json").unlink()
    (tmp_path / "shards" / shard.format(2)).unlink()
    (tmp_path / "shards" / shard.format(3)).write_bytes(b"torn")
    (tmp_path / "shards/shard-00004.json").write_bytes(b"torn")
    (tmp_path / "shards" / f"{shard.format(1)}.host.1.tmp").write_bytes(b"torn")
    (tmp_path / "manifest.json.host.1.tmp").write_bytes(b"torn")
    caches.write(tmp_path, shard_rows=None)  # the cache knows its own
    assert caches.contents(tmp_path) == expected
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shards/*.safetensors")}
    kept = {shard.format(i) for i in (0, 5)}
    assert {name for name in before if before[name] == after[name]} == kept
    assert not list(tmp_path.rglob("*.tmp"))
    assert "shard 3 is written again" in caplog.text
    CacheReader(tmp_path, "full")


def test_verify_full_finds_flipped_bits(tmp_path: Path) -> None:
    caches.write(tmp_path)
    expected = caches.contents(tmp_path)
    path = tmp_path / "shards/shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    caches.write(tmp_path)
    assert caches.contents(tmp_path) != expected
    caches.write(tmp_path, verify="full")
    assert caches.contents(tmp_path) == expected


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "codec": ({"codec": TopK(top_k=3)}, "codec.name = 'full', this one has 'topk'"),
    "setting": ({"codec": Full("int8")}, "codec.settings.format = 'fp16', this one has 'int8'"),
    "seed": ({"seed": 7}, "codec.seed = '0', this one has '7'"),
    "teacher": ({"model": models.llama(1)}, "teacher.weights_fingerprint = "),
    "revision": ({"teacher_revision": "main"}, "teacher.revision = 'None', this one has 'main'"),
    "rows": ({"dataset": models.problems(20)}, "dataset.num_rows = '21', this one has '20'"),
    "order": ({"dataset": models.problems(ROWS)[::-1]}, "dataset.sha256 = "),
    "hint": ({"data_collator": collator(hint="hint")}, "collator.probe_sha256 = "),
    "shards": ({"shard_rows": 5}, "shard_rows = '4', this one has '5'"),
    "tokenizer": (
        {"processing_class": models.tokenizer(pad_is_eos=True)},
        "tokenizer.sha256 = ",
    ),
}


def test_a_cache_of_something_else_is_not_touched(tmp_path: Path) -> None:
    caches.write(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for changes, message in OTHERS.values():
        with pytest.raises(CacheConfigMismatch) as caught:
            caches.write(tmp_path, **changes)
        assert f"holds a cache with {message}" in str(caught.value)
        assert "pass overwrite=True" in str(caught.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CacheConfigMismatch, match=r"shard-00000.json has config_hash"):
        caches.write(tmp_path, seed=7)
    (tmp_path / "config.json").unlink()  # of the attempt
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == {p: x for p, x in before.items() if p.name != "config.json"}


def test_overwrite_deletes_a_cache_and_nothing_else(tmp_path: Path) -> None:
    caches.write(tmp_path, shard_rows=2)
    (tmp_path / "notes.txt").write_text("mine")
    caches.write(tmp_path, seed=7, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(caches.contents(tmp_path)) == 6
    assert CacheReader(tmp_path, "full").manifest.config["codec"]["seed"] == 7
    caches.write(tmp_path / "fresh", seed=7, overwrite=True)
    assert caches.contents(tmp_path) == caches.contents(tmp_path / "fresh")


def test_overwrite_keeps_what_is_the_same(tmp_path: Path) -> None:
    """A job that is restarted with the same command goes on."""
    caches.write(tmp_path)
    lost = tmp_path / "shards" / "shard-00002.json"
    lost.unlink()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shards/*")}
    caches.write(tmp_path, overwrite=True)
    changed = {p for p in tmp_path.glob("shards/*") if before.get(p) != p.stat().st_mtime_ns}
    assert changed == {lost, lost.with_suffix(".safetensors")}
    (tmp_path / "config.json").write_text("{")
    caches.write(tmp_path, overwrite=True)
    assert not before.items() & {p: p.stat().st_mtime_ns for p in before}.items()
    (tmp_path / "config.json").unlink()
    with pytest.raises(CacheConfigMismatch, match=r"json has config_hash"):
        caches.write(tmp_path, seed=7)
    caches.write(tmp_path, seed=7, overwrite=True)
    assert CacheReader(tmp_path, "full").manifest.config["codec"]["seed"] == 7


def test_a_full_disk_is_an_error_and_what_is_whole_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches.write(tmp_path / "expected")
    opened = builtins.open

    def full(path: Any, *rest: Any, **options: Any) -> Any:
        file = opened(path, *rest, **options)
        if "shard-00003.safetensors" in str(path) and "w" in str(rest):
            file.write(b"half")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        message = "could not be written: .*No space left on device. Shards that are complete stay"
        with pytest.raises(CacheError, match=message):
            caches.write(tmp_path / "cache")
    names = sorted(p.name for p in (tmp_path / "cache/shards").iterdir())
    assert names == [f"shard-0000{i}.{x}" for i in range(3) for x in ("json", "safetensors")]
    assert not (tmp_path / "cache/manifest.json").exists()
    caches.write(tmp_path / "cache")
    assert caches.contents(tmp_path / "cache") == caches.contents(tmp_path / "expected")


def test_finishing_checks_every_shard(tmp_path: Path) -> None:
    caches.write(tmp_path)
    config = progress.read_config(tmp_path)
    assert config is not None
    sidecar = tmp_path / "shards/shard-00002.json"
    text = sidecar.read_text()
    faults: list[tuple[str, type[CacheError], str]] = [
        ("", CacheError, "there is no shards/shard-00002.json"),
        (text.replace('"shard": 2', '"shard": 1'), CacheCorrupt, "shard must be 2, got 1"),
        (text.replace('"sums": {}', '"sums": {"x": "y"}'), CacheCorrupt, "x must be of type float"),
        (text.replace('"1.1"', '"3.1"'), FormatVersionError, "got '3.1'"),
        (text.replace("  8,", "  7,"), CacheCorrupt, "must have rows 7 to 11"),
    ]
    for changed, kind, message in faults:
        assert changed != text
        sidecar.unlink(missing_ok=True)
        if changed:
            sidecar.write_text(changed)
        with pytest.raises(kind, match=message):
            progress.finish(tmp_path, config, {})
