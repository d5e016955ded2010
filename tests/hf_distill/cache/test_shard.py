"""Shards: their bytes, what is read back, and what is refused."""

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_distill.cache import files
from hf_distill.cache.errors import CacheCorrupt
from hf_distill.cache.shard import (
    DTYPES,
    FOLDER,
    MAX_HEADER,
    Entry,
    Row,
    Shard,
    shard_name,
    tensors,
    write_shard,
)


def row(number: int, positions: list[int], codes: list[int], masses: list[float]) -> Row:
    arrays = {"codes": np.array(codes, np.uint8), "masses": np.array(masses, np.float16)}
    return Row(number, 1000 + number, np.array(positions, np.int32), arrays)


ROWS = [row(6, [2, 5], [7, 8, 9], [-0.5, -1.0]), row(7, [], [], []), row(8, [1], [255], [-2.0])]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir()
    return tmp_path


# As cache_format.md says: header, then wider types first, names in order
HEADER = (
    '{"__metadata__":{"config_hash":"c0ffee","format":"hf_distill teacher cache",'
    '"format_version":"1.1","shard":"2"},'
    '"offsets.codes":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
    '"offsets.masses":{"dtype":"I64","shape":[4],"data_offsets":[32,64]},'
    '"offsets.positions":{"dtype":"I64","shape":[4],"data_offsets":[64,96]},'
    '"row":{"dtype":"I64","shape":[3],"data_offsets":[96,120]},'
    '"row_hash":{"dtype":"U64","shape":[3],"data_offsets":[120,144]},'
    '"positions":{"dtype":"I32","shape":[3],"data_offsets":[144,156]},'
    '"masses":{"dtype":"F16","shape":[3],"data_offsets":[156,162]},'
    '"codes":{"dtype":"U8","shape":[4],"data_offsets":[162,166]}}'
)
DATA = bytes.fromhex(
    "0000000000000000 0300000000000000 0300000000000000 0400000000000000"  # offsets.codes
    "0000000000000000 0200000000000000 0200000000000000 0300000000000000"  # offsets.masses
    "0000000000000000 0200000000000000 0200000000000000 0300000000000000"  # offsets.positions
    "0600000000000000 0700000000000000 0800000000000000"  # row
    "ee03000000000000 ef03000000000000 f003000000000000"  # row_hash
    "02000000 05000000 01000000"  # positions
    "00b8 00bc 00c0"  # masses
    "07 08 09 ff"  # codes
)


def test_a_shard_has_these_bytes(cache: Path) -> None:
    entry = write_shard(cache, 2, ROWS, "c0ffee")
    header = HEADER.encode() + b" " * (-len(HEADER) % 8)
    assert len(header) != len(HEADER)  # the padding is seen
    expected = struct.pack("<Q", len(header)) + header + DATA
    path = cache / "shards/shard-00002.safetensors"
    assert path.read_bytes() == expected
    assert entry == Entry(6, 9, 3, len(expected), files.sha256_of(path))


def test_a_sidecar_has_these_bytes(cache: Path) -> None:
    entry = write_shard(cache, 2, ROWS, "c0ffee", sums={"entropy": 1.5})
    assert (cache / "shards/shard-00002.json").read_text() == (
        f'{{\n "bytes": {entry.bytes},\n "config_hash": "c0ffee",\n "format_version": "1.1",\n'
        f' "rows": [\n  6,\n  9\n ],\n "sha256": "{entry.sha256}",\n "shard": 2,\n'
        ' "sums": {\n  "entropy": 1.5\n },\n "tokens": 3\n}\n'
    )


def test_the_safetensors_library_reads_a_shard(cache: Path) -> None:
    write_shard(cache, 0, ROWS, "c0ffee")
    loaded = load_file(cache / shard_name(0))
    assert loaded.keys() == tensors(ROWS).keys()
    for name, values in tensors(ROWS).items():
        assert loaded[name].dtype == values.dtype
        assert (loaded[name] == values).all()


def opened(cache: Path, entry: Entry | None = None) -> Shard:
    return Shard(cache / shard_name(0), "it", entry)


def test_rows_come_back(cache: Path) -> None:
    shard = opened(cache, write_shard(cache, 0, ROWS, "c0ffee"))
    assert len(shard) == 3
    assert shard.row_hashes().tolist() == [1006, 1007, 1008]
    for i, want in enumerate(ROWS):
        got = shard.row(i)
        assert got[:2] == want[:2]
        assert got.positions.tolist() == want.positions.tolist()
        for name, values in want.arrays.items():
            assert got.arrays[name].dtype == values.dtype
            assert got.arrays[name].tolist() == values.tolist()
            assert got.arrays[name].flags.writeable  # PyTorch warns of others


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_comes_back(cache: Path, dtype: str) -> None:
    values = np.array([0, 1, 100], DTYPES[dtype])
    big = values.astype(values.dtype.newbyteorder(">"))  # stored little-endian all the same
    write_shard(cache, 0, [Row(0, 1, np.zeros(0, np.int32), {"x": big})], "c")
    got = opened(cache).row(0).arrays["x"]
    assert got.dtype == values.dtype
    assert got.tolist() == values.tolist()


def test_a_shard_of_rows_without_tokens(cache: Path) -> None:
    entry = write_shard(cache, 0, [ROWS[1]], "c0ffee")
    assert entry.tokens == 0
    assert opened(cache, entry).row(0).arrays["codes"].tolist() == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must have at least one row, got none"),
        ([ROWS[0], Row(7, 1, ROWS[1].positions, {})], r"row 7 must have arrays \['codes'"),
        ([Row(0, 1, ROWS[1].positions, {"row": np.zeros(1)})], "'row' is a name of the container"),
        ([Row(0, 1, ROWS[1].positions, {"offsets.x": np.zeros(1)})], "'offsets.x' is a name"),
        ([Row(0, 1, ROWS[1].positions, {"x": np.zeros((1, 2))})], r"1-D .* of shape \(1, 2\)"),
        ([Row(0, 1, ROWS[1].positions, {"x": np.zeros(1, bool)})], "got bool"),
        (
            [
                Row(i, 1, ROWS[1].positions, {"x": np.zeros(1, dtype)})
                for i, dtype in enumerate(("u1", "f4"))
            ],
            r"must have one dtype, got \['float32', 'uint8'\]",
        ),
    ],
)
def test_rows_that_are_no_shard(cache: Path, rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(cache, 0, rows, "c0ffee")
    assert list((cache / FOLDER).iterdir()) == []


def test_a_full_disk_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(cache, 0, ROWS, "c0ffee")
    assert list((cache / FOLDER).iterdir()) == []


def test_a_shard_is_flushed_before_its_sidecar_is_there(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, rename, folder; then the same for the sidecar."""
    said = []
    replace, fsync = os.replace, os.fsync

    def flushed(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        said.append("folder" if path.is_dir() else f"{path.name.split('.')[1]} {path.suffix}")
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        said.append(f"rename {new.suffix}")
        replace(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_shard(cache, 0, ROWS, "c0ffee")
    kinds = ("safetensors", "json")
    assert said == [x for k in kinds for x in (f"{k} .tmp", f"rename .{k}", "folder")]


Header = dict[str, Any]


def changed(cache: Path, change: Callable[[Header], Any]) -> None:
    """Write the shard with another header; its data stay."""
    path = cache / shard_name(0)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    result = change(header)
    text = result if isinstance(result, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_entry(name: str, key: str, value: Any) -> Callable[[Header], None]:
    return lambda header: header[name].update({key: value})


def rename(old: str, new: str) -> Callable[[Header], bytes]:
    return lambda header: json.dumps(header).replace(f'"{old}"', f'"{new}"').encode()


BAD_HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no JSON": (lambda _: b"{", "header must be JSON"),
    "deep JSON": (lambda _: b"[" * 100_000, "header must be JSON"),
    "a list": (lambda _: b"[]", "must be a JSON object, got list"),
    "no UTF-8": (lambda _: b'{"\xff": 1}', "header must be JSON"),
    "empty": (lambda _: b"{}", "must fill the file"),
    "metadata": (lambda h: h.update(__metadata__=3), "metadata must be an object"),
    "no object": (lambda h: h.update(codes=3), "codes must be 1-D"),
    "dtype": (set_entry("codes", "dtype", "BF16"), "codes must be 1-D and of one of"),
    "dtype list": (set_entry("codes", "dtype", ["U8"]), "codes must be 1-D and of one of"),
    "shape": (set_entry("codes", "shape", [2, 2]), "codes must be 1-D"),
    "count": (set_entry("codes", "shape", [-4]), "must have a number of values, got -4"),
    "true": (set_entry("codes", "shape", [True]), "must have a number of values, got True"),
    "huge": (set_entry("codes", "shape", [10**30]), "codes must lie at"),
    "gap": (set_entry("codes", "data_offsets", [163, 167]), "codes must lie at"),
    "backwards": (set_entry("codes", "data_offsets", [166, 162]), "codes must lie at"),
    "types": (set_entry("codes", "data_offsets", "x"), "codes must lie at"),
    "signed hash": (set_entry("row_hash", "dtype", "I64"), "must be an array 'row_hash' of U64"),
    "no rows": (rename("row", "raw"), "no array 'row'"),
    "positions": (set_entry("positions", "dtype", "F32"), "an array 'positions' of I32"),
    "lost offsets": (rename("offsets.codes", "offsets.x"), "arrays and offsets must match"),
    "unsigned offsets": (set_entry("offsets.codes", "dtype", "U64"), "must be 4 I64 from 0 to 4"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(cache: Path, case: str) -> None:
    write_shard(cache, 0, ROWS, "c0ffee")
    change, message = BAD_HEADERS[case]
    changed(cache, change)
    with pytest.raises(CacheCorrupt, match=f"^it: .*{message}|^it: {message}"):
        opened(cache)


def bytes_at(name: str, index: int, value: int, size: int = 8) -> Callable[[bytearray], None]:
    places = json.loads(HEADER)

    def change(data: bytearray) -> None:
        at = places[name]["data_offsets"][0] + index * size
        data[at : at + size] = value.to_bytes(size, "little", signed=True)

    return change


BAD_DATA = {
    "start": (bytes_at("offsets.codes", 0, 1), "offsets of 'codes' must be 4 I64 from 0 to 4"),
    "end": (bytes_at("offsets.codes", 3, 5), "offsets of 'codes' must be 4 I64 from 0 to 4"),
    "falls": (bytes_at("offsets.masses", 1, 3), "offsets of 'masses' must not fall"),
    "negative": (bytes_at("offsets.masses", 1, -1), "offsets of 'masses' must not fall"),
    "order": (bytes_at("row", 1, 9), "must have rows 6 to 8 in order"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_offsets_and_rows_are_refused(cache: Path, case: str) -> None:
    entry = write_shard(cache, 0, ROWS, "c0ffee")
    path = cache / shard_name(0)
    raw = path.read_bytes()
    change, message = BAD_DATA[case]
    data = bytearray(raw[-len(DATA) :])
    change(data)
    path.write_bytes(raw[: -len(DATA)] + data)
    with pytest.raises(CacheCorrupt, match=message):
        opened(cache, entry)


@pytest.mark.parametrize(("index", "value"), [(0, 0), (0, -3), (1, 2), (0, 5)])
def test_positions_must_ascend_from_one(cache: Path, index: int, value: int) -> None:
    write_shard(cache, 0, ROWS, "c0ffee")
    path = cache / shard_name(0)
    raw = path.read_bytes()
    data = bytearray(raw[-len(DATA) :])
    bytes_at("positions", index, value, 4)(data)
    path.write_bytes(raw[: -len(DATA)] + data)
    shard = opened(cache)
    with pytest.raises(CacheCorrupt, match="positions of row 6 must ascend from 1 on"):
        shard.row(0)
    assert shard.row(2).positions.tolist() == [1]


def test_every_truncation_is_refused(cache: Path) -> None:
    entry = write_shard(cache, 0, ROWS, "c0ffee")
    path = cache / shard_name(0)
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CacheCorrupt):
            opened(cache, entry)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CacheCorrupt, match="must fill the file"):
        opened(cache, entry)


def test_a_file_that_shrinks_while_it_is_open(cache: Path) -> None:
    write_shard(cache, 0, ROWS, "c0ffee")
    shard = opened(cache)
    path = cache / shard_name(0)
    os.truncate(path, path.stat().st_size - len(DATA))
    with pytest.raises(CacheCorrupt, match="it has become shorter"):
        shard.row(0)


def test_a_header_that_is_too_long(cache: Path) -> None:
    path = cache / shard_name(0)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}" + bytes(100))
    with pytest.raises(CacheCorrupt, match=f"at most 102 bytes, got {2**63}"):
        opened(cache)
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + bytes(MAX_HEADER + 9))
    with pytest.raises(CacheCorrupt, match=f"at most {MAX_HEADER} bytes"):
        opened(cache)


def test_a_shard_of_other_rows_or_tokens(cache: Path) -> None:
    entry = write_shard(cache, 0, ROWS, "c0ffee")
    with pytest.raises(CacheCorrupt, match="must have rows 9 to 11 in order"):
        opened(cache, entry._replace(start=9, stop=12))
    with pytest.raises(CacheCorrupt, match="must have rows 6 to 9 in order"):
        opened(cache, entry._replace(stop=10))
    with pytest.raises(CacheCorrupt, match="must have 4 tokens, got 3"):
        opened(cache, entry._replace(tokens=4))


def test_a_shard_that_cannot_be_opened(cache: Path) -> None:
    with pytest.raises(CacheCorrupt, match=r"it cannot be opened: .*No such file"):
        opened(cache)
