"""Reading a cache: what is found, what is refused, and by whom it may be read."""

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_distill.cache import CacheReader, reader
from hf_distill.cache.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    FormatVersionError,
    RowMismatch,
)
from hf_distill.cache.files import canonical, pretty
from hf_distill.cache.fingerprints import SideRow
from hf_distill.cache.manifest import MANIFEST, Manifest, config_hash
from hf_distill.cache.progress import finish
from hf_distill.cache.shard import Row, write_shard
from tests import processes

ROWS, SHARD_ROWS = 11, 3
LAST = "shards/shard-00003"
CONFIG = {name: {} for name in ("teacher", "collator", "codec")} | {
    "tokenizer": None,
    "logits": {"logit_dim": 300, "real_vocab": 299},
    "dataset": {"num_rows": ROWS, "sha256": ""},
    "shard_rows": SHARD_ROWS,
}


def ids(number: int) -> list[int]:
    """Rows 4 and 9 are the same; of row 9 fewer tokens are scored."""
    number = 4 if number == 9 else number
    return [number * 7 + i for i in range(5 + number)]


def side_row(number: int, first: int = 2) -> SideRow:
    first = 4 if number == 9 else first
    return SideRow(ids(number), np.arange(first, len(ids(number)), dtype=np.int32))


def values(number: int) -> np.ndarray:
    return np.arange(len(side_row(number).positions), dtype=np.float32) + 100 * number


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "shards").mkdir(parents=True)
    for number in range(-(-ROWS // SHARD_ROWS)):
        rows = [
            Row(i, side_row(i).hash, side_row(i).positions, {"x": values(i)})
            for i in range(number * SHARD_ROWS, min(ROWS, (number + 1) * SHARD_ROWS))
        ]
        write_shard(folder, number, rows, config_hash(CONFIG), sums={"entropy": 2.0})
    finish(folder, CONFIG, {})
    return folder


def everything(found: CacheReader) -> list[tuple[list[int], list[float]]]:
    rows = [found.row(i) for i in range(len(found))]
    return [(row.positions.tolist(), row.arrays["x"].tolist()) for row in rows]


EXPECTED = [(side_row(i).positions.tolist(), values(i).tolist()) for i in range(ROWS)]


@pytest.mark.parametrize("verify", reader.VERIFY)
def test_rows_by_number(cache: Path, verify: str) -> None:
    found = CacheReader(cache, verify)
    assert everything(found) == EXPECTED
    for number in (-1, ROWS):
        with pytest.raises(IndexError, match=rf"row must be in \[0, {ROWS}\), got {number}"):
            found.row(number)


def test_the_manifest_sums_up(cache: Path) -> None:
    manifest = CacheReader(cache).manifest
    tokens = sum(len(side_row(i).positions) for i in range(ROWS))
    size = sum(p.stat().st_size for p in cache.glob("shards/*.safetensors"))
    assert manifest.stats == {
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "mean_entropy": 4 * 2.0 / tokens,
    }
    assert (manifest.num_rows, manifest.vocab_size) == (ROWS, 300)
    assert manifest.config == CONFIG


def test_rows_by_their_hash(cache: Path) -> None:
    found = CacheReader(cache)
    for i in range(ROWS):
        assert found.find(side_row(i).hash).tolist() == ([4, 9] if i in (4, 9) else [i])
    assert found.find(12345).tolist() == []
    assert found.find(2**64 - 1).tolist() == []


def test_some_of_the_stored_tokens(cache: Path) -> None:
    found = CacheReader(cache)
    row, at = found.match(side_row(6, first=5))
    assert row.row == 6
    assert row.positions[at].tolist() == side_row(6, first=5).positions.tolist()
    assert row.arrays["x"][at].tolist() == values(6)[3:].tolist()
    row, at = found.match(side_row(6)._replace(positions=np.array([3, 7], np.int32)))
    assert at.tolist() == [1, 5]
    assert found.match(side_row(6)._replace(positions=np.zeros(0, np.int32)))[1].tolist() == []


@pytest.mark.parametrize("order", [(4, 9), (9, 4)])
def test_a_row_that_is_there_twice_has_the_tokens_of_either(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    (tmp_path / "shards").mkdir()
    rows = [
        Row(i, side_row(x).hash, side_row(x).positions, {"x": values(x)})
        for i, x in enumerate(order)
    ]
    config = CONFIG | {"dataset": {"num_rows": 2}, "shard_rows": 2}
    write_shard(tmp_path, 0, rows, config_hash(config), sums={})
    finish(tmp_path, config, {})
    row, at = CacheReader(tmp_path).match(side_row(4))
    assert row.row == order.index(4)
    assert len(at) == len(values(4))


def test_rows_that_are_not_there(cache: Path) -> None:
    found = CacheReader(cache)
    changed = side_row(3)._replace(ids=[*ids(3)[:-1], 999])
    with pytest.raises(RowMismatch, match=r"no stored row has the ids .* 8 tokens that begin \[21"):
        found.match(changed)
    with pytest.raises(RowMismatch, match="the scored token at position 1; it has 6 others"):
        found.match(side_row(3, first=1))
    beyond = side_row(3)._replace(positions=np.array([2, 8], np.int32))
    with pytest.raises(RowMismatch, match="the scored token at position 8"):
        found.match(beyond)


def test_a_reader_is_pickled_by_its_path(cache: Path) -> None:
    found = CacheReader(cache, "full")
    everything(found)
    raw = pickle.dumps(found)
    assert len(raw) < 400
    again = pickle.loads(raw)
    assert everything(again) == EXPECTED
    assert (again.path, again.verify) == (str(cache), "size")


SPAWN = pytest.param("spawn", marks=pytest.mark.slow)  # pickles the same, and imports everything


class Rows(Dataset):
    def __init__(self, found: CacheReader) -> None:
        self.found = found

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[int, float]:
        row, _ = self.found.match(side_row(i))
        return i, float(row.arrays["x"].sum())


@pytest.mark.parametrize("method", ["fork", "forkserver", SPAWN])
def test_workers_read_for_themselves(cache: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    processes.context()  # a server that has the libraries imported
    found = CacheReader(cache)
    found.match(side_row(0))  # the parent has a shard open
    loader = DataLoader(
        Rows(found), batch_size=2, num_workers=2, multiprocessing_context=method, shuffle=True
    )
    sums = {int(i): float(x) for batch in loader for i, x in zip(*batch, strict=True)}
    assert sums == {i: float(values(4 if i == 9 else i).sum()) for i in range(ROWS)}


def test_an_error_reaches_the_caller_from_a_worker(cache: Path) -> None:
    flipped(cache / f"{LAST}.safetensors", -1)
    loader = DataLoader(Rows(CacheReader(cache)), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(CacheCorrupt, match=r"shard-00003.safetensors: sha256 must be"):
        list(loader)


def test_threads_share_a_reader(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 1)  # shards are closed under the other threads' hands
    found = CacheReader(cache)
    numbers = [int(i) for i in torch.randint(ROWS, (600,))]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(found.row, numbers))
    for i, row in zip(numbers, rows, strict=True):
        assert (row.positions.tolist(), row.arrays["x"].tolist()) == EXPECTED[i]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count open files")
def test_few_shards_are_open(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 2)
    gc.collect()
    before = open_files()
    found = CacheReader(cache)
    everything(found)
    assert open_files() - before == 2
    del found
    gc.collect()
    assert open_files() == before


def test_a_shard_is_hashed_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each time that it is opened."""
    hashed, compute = [], reader.sha256_of
    monkeypatch.setattr(reader, "MAX_OPEN", 1)
    monkeypatch.setattr(reader, "sha256_of", lambda path: hashed.append(path) or compute(path))
    found = CacheReader(cache)
    for _ in range(2):
        everything(found)
    assert len(hashed) == 4


def flipped(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_when_a_flipped_bit_is_found(cache: Path) -> None:
    flipped(cache / f"{LAST}.safetensors", -1)
    with pytest.raises(CacheCorrupt, match=r"shard-00003.safetensors: sha256 must be .*, got"):
        CacheReader(cache, "full")
    found = CacheReader(cache)
    assert found.row(8).row == 8
    for _ in range(2):
        with pytest.raises(CacheCorrupt, match=r"shard-00003.safetensors: sha256"):
            found.row(9)
    CacheReader(cache, "size").row(9)  # asked not to look


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(cache: Path) -> None:
        path = cache / name
        path.write_bytes(pretty(json.loads(path.read_bytes()) | changes))

    return edit


def forged(**changes: Any) -> Callable[[Path], None]:
    """An edited manifest that has its own sha256 right."""

    def forge(cache: Path) -> None:
        content = json.loads((cache / MANIFEST).read_bytes()) | changes
        content.pop("sha256")
        digest = hashlib.sha256(canonical(content)).hexdigest()
        (cache / MANIFEST).write_bytes(pretty(content | {"sha256": digest}))

    return forge


def removed(name: str) -> Callable[[Path], None]:
    return lambda cache: (cache / name).unlink()


def appended(name: str) -> Callable[[Path], None]:
    return lambda cache: (cache / name).write_bytes((cache / name).read_bytes() + b" ")


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda cache: (cache / name).write_bytes(content)


def swapped(suffix: str) -> Callable[[Path], None]:
    def swap(cache: Path) -> None:
        one, other = (cache / f"shards/shard-0000{i}{suffix}" for i in (0, 3))
        one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
        one.write_bytes(other_bytes)
        other.write_bytes(one_bytes)

    return swap


SHARDS = [[0, 3], [3, 6], [6, 9], [9, 11]]
FAULTS: dict[str, tuple[Callable[[Path], Any], type[CacheError], str]] = {
    "no manifest": (removed(MANIFEST), CacheIncomplete, "there is no manifest.json"),
    "no folder": (lambda c: c.rename(c.with_name("x")), CacheIncomplete, "no manifest.json"),
    "no shard": (removed(f"{LAST}.safetensors"), CacheIncomplete, f"{LAST}.safetensors; write"),
    "no sidecar": (removed(f"{LAST}.json"), CacheIncomplete, f"there is no {LAST}.json"),
    "no hashes": (removed("row_hashes.bin"), CacheIncomplete, "there is no row_hashes.bin"),
    "longer": (appended(f"{LAST}.safetensors"), CacheCorrupt, "bytes, got"),
    "swapped": (swapped(".safetensors"), CacheCorrupt, "bytes, got"),
    "sidecars": (swapped(".json"), CacheCorrupt, "shard must be 0, got 3"),
    "no JSON": (written(MANIFEST, b"{"), CacheCorrupt, "must be JSON"),
    "NaN": (written(MANIFEST, b'{"format_version":"1.0","x":NaN}'), CacheCorrupt, "not JSON comp"),
    "version": (edited(MANIFEST, format_version="2.0"), FormatVersionError, "1.*, got '2.0'"),
    "versions": (edited(MANIFEST, format_version=1), CacheCorrupt, "must be of type str, got '1'"),
    "edited": (edited(MANIFEST, stats={}), CacheCorrupt, "manifest.json: sha256 must be"),
    "config": (forged(config=CONFIG | {"seed": 1}), CacheCorrupt, "config_hash must be"),
    "no config": (forged(config=3), CacheCorrupt, "config must be of type dict, got '3'"),
    "fewer": (
        forged(config=CONFIG | {"dataset": {"num_rows": 10}}),
        CacheCorrupt,
        "shards must hold rows 0 to 9 in order",
    ),
    "rows": (forged(dataset={}, config=CONFIG | {"dataset": {}}), CacheCorrupt, "num_rows must"),
    "shards": (forged(shards=[3]), CacheCorrupt, "shard 0: rows must be of type list"),
    "shard rows": (forged(shards=[{"rows": [3, 1]}]), CacheCorrupt, "rows must be .first, behind"),
    "digest": (forged(rows_digest="x"), CacheCorrupt, "88 bytes and sha256 x, got 88 and"),
    "hashes": (
        lambda c: flipped(c / "row_hashes.bin", 5),
        CacheCorrupt,
        "row_hashes.bin: it must have 88 bytes and sha256",
    ),
    "fewer hashes": (written("row_hashes.bin", b""), CacheCorrupt, "88 bytes .* got 0 and"),
    "sidecar": (edited(f"{LAST}.json", tokens=4), CacheCorrupt, "what the manifest says"),
    "sidecar version": (edited(f"{LAST}.json", format_version="7"), FormatVersionError, "'7'"),
    "other config": (edited(f"{LAST}.json", config_hash=""), CacheCorrupt, "config_hash must be"),
    "sidecar type": (
        edited(f"{LAST}.json", bytes=-1),
        CacheCorrupt,
        "bytes must be of type int >= 0",
    ),
}


def use(cache: Path) -> None:
    found = CacheReader(cache)
    for i in range(ROWS):
        found.match(side_row(i))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(cache: Path, fault: str) -> None:
    use(cache)
    damage, kind, message = FAULTS[fault]
    damage(cache)
    with pytest.raises(kind, match=message) as caught:
        use(cache)
    assert str(cache) in str(caught.value)


def test_a_newer_minor_version_is_read(cache: Path) -> None:
    forged(format_version="1.9", news=True)(cache)
    use(cache)


def test_verify_must_be_known(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"verify must be one of .* got 'some'"):
        CacheReader(cache, "some")


def test_a_manifest_comes_back(cache: Path) -> None:
    raw = (cache / MANIFEST).read_bytes()
    made = Manifest.read(raw)
    made.write(cache)
    assert (cache / MANIFEST).read_bytes() == raw


def test_a_remote_cache(cache: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(cache), "/remote/cache", recursive=True)
    copies = tmp_path / "copies"
    try:
        found = CacheReader("memory://remote/cache", copies=copies)
        found.match(side_row(0))
        assert len(list(copies.iterdir())) == 1  # only what is needed
        assert everything(found) == EXPECTED
        assert everything(pickle.loads(pickle.dumps(found))) == EXPECTED
        assert len(list(copies.iterdir())) == 4
        shard = next(copies.iterdir())
        shard.unlink()
        flipped(cache / f"{LAST}.safetensors", -1)
        memory.put(f"{cache}/{LAST}.safetensors", f"/remote/cache/{LAST}.safetensors")
        others = tmp_path / "others"
        with pytest.raises(CacheCorrupt, match=r"shard-00003.safetensors: sha256 must be"):
            everything(CacheReader("memory://remote/cache", "size", copies=others))
        assert len(list(others.iterdir())) == 3  # nothing of the damaged one
        memory.rm(f"/remote/cache/{LAST}.json")
        with pytest.raises(CacheIncomplete, match=f"there is no {LAST}.json"):
            CacheReader("memory://remote/cache")
    finally:
        memory.rm("/remote", recursive=True)
