"""A shard: the arrays of some rows in one safetensors file, and a sidecar that commits it.

`cache_format.md` describes both to the byte. Nothing in a file is trusted: what can be wrong is
checked when it is opened, and damage is a `CacheCorrupt`. Files are read with `pread`, not mapped:
a file that shrinks or a disk that fails while it is used is then an exception, not a signal.

Shapes: S rows of a shard, n tokens of a row.
"""

import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_distill.cache.errors import CacheCorrupt
from hf_distill.cache.files import commit, entry, parse, pretty

FORMAT = "hf_distill teacher cache"
FORMAT_VERSION = "1.1"  # another first number is refused
FOLDER = "shards"

OFFSETS = "offsets."
ROW, ROW_HASH, POSITIONS = "row", "row_hash", "positions"
FIXED = {ROW: np.dtype("<i8"), ROW_HASH: np.dtype("<u8")}
"""One value per row; all other arrays have `offsets`."""
DTYPES = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 2**20  # bytes; a shard has some ten arrays


class Row(NamedTuple):
    """Holds what is stored of a row of the data.

    row: its number in the data.
    row_hash: see `fingerprints.row_hash`.
    positions: [n] int32 ascending, the scored tokens' places among the row's real tokens; >= 1.
    arrays: what the codec made, by name, 1-D.
    """

    row: int
    row_hash: int
    positions: np.ndarray
    arrays: Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """Holds what a manifest knows of a shard: rows [start, stop), tokens, bytes and sha256."""

    start: int
    stop: int
    tokens: int
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it stands in a manifest or a sidecar."""
        rest = {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha256}
        return {"rows": [self.start, self.stop], **rest}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], name: str) -> "Entry":
        """Read an entry of a manifest or a sidecar.

        Raises:
            CacheCorrupt: a field is missing or of another type.
        """
        rows = entry(value, "rows", list, name)
        if len(rows) != 2 or any(type(x) is not int for x in rows) or not 0 <= rows[0] < rows[1]:
            raise CacheCorrupt(f"{name}: rows must be [first, behind the last], got {rows}")
        tokens, size = (entry(value, key, int, name) for key in ("tokens", "bytes"))
        return cls(rows[0], rows[1], tokens, size, entry(value, "sha256", str, name))


def shard_name(number: int) -> str:
    """Return the name of a shard's file inside the cache."""
    return f"{FOLDER}/shard-{number:05d}.safetensors"


def sidecar_name(number: int) -> str:
    """Return the name of the file that commits a shard."""
    return f"{FOLDER}/shard-{number:05d}.json"


def _array(name: str, values: np.ndarray) -> np.ndarray:
    """Return contiguous, little-endian values."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    if values.ndim != 1 or values.dtype not in NAMES:
        raise ValueError(
            f"array {name!r} must be 1-D and of one of {sorted(DTYPES)}, got {values.dtype} of "
            f"shape {values.shape}"
        )
    return values


def tensors(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return a shard's tensors by name: every array of the rows end to end, and where each starts.

    Raises:
        ValueError: there are no rows, rows have arrays of other names or dtypes, an array is not
            1-D, or a name is one of the container's own.
    """
    if not rows:
        raise ValueError("a shard must have at least one row, got none")
    names = list(rows[0].arrays)
    own = [x for x in names if x in (*FIXED, POSITIONS) or x.startswith(OFFSETS)]
    if own:
        raise ValueError(f"{own[0]!r} is a name of the container, a codec must not use it")
    made = {
        ROW: np.array([row.row for row in rows], FIXED[ROW]),
        ROW_HASH: np.array([row.row_hash for row in rows], FIXED[ROW_HASH]),
    }
    for row in rows:
        if list(row.arrays) != names:
            raise ValueError(f"row {row.row} must have arrays {names}, got {list(row.arrays)}")
    parts = {name: [row.arrays[name] for row in rows] for name in names}
    parts[POSITIONS] = [row.positions.astype("<i4") for row in rows]
    for name, values in parts.items():
        dtypes = {str(x.dtype) for x in values}
        if len(dtypes) > 1:
            raise ValueError(f"array {name!r} must have one dtype, got {sorted(dtypes)}")
        made[name] = _array(name, np.concatenate(values))
        lengths = np.array([len(x) for x in values], "<i8")
        made[OFFSETS + name] = np.concatenate([np.zeros(1, "<i8"), lengths.cumsum(dtype="<i8")])
    return made


def serialize(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; equal arrays give equal bytes.

    Wider dtypes come first, then names in order, so that every array lies at a multiple of its
    item size.
    """
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, values in ordered:
        place = [at, at + values.nbytes]
        header[name] = {
            "dtype": NAMES[values.dtype],
            "shape": [len(values)],
            "data_offsets": place,
        }
        at += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, values in ordered:
        if len(values):  # an empty array has no bytes to look at
            yield values.view(np.uint8).data


def write_shard(
    cache: Path, number: int, rows: Sequence[Row], config_hash: str, **notes: Any
) -> Entry:
    """Write a shard and commit it.

    Args:
        cache: the cache's folder.
        number: of the shard.
        rows: consecutive rows of the data.
        config_hash: of the cache's configuration.
        **notes: more entries of the sidecar, which JSON can hold.

    Raises:
        ValueError: see `tensors`.
        OSError: it could not be written; it is then not there.
    """
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    metadata |= {"config_hash": config_hash, "shard": str(number)}
    made = tensors(rows)
    size, digest = commit(cache / shard_name(number), serialize(made, metadata))
    entry = Entry(rows[0].row, rows[-1].row + 1, len(made[POSITIONS]), size, digest)
    sidecar = {"format_version": FORMAT_VERSION, "shard": number, "config_hash": config_hash}
    sidecar |= entry.to_json() | notes
    commit(cache / sidecar_name(number), [pretty(sidecar)])
    return entry


class _Place(NamedTuple):
    """Says where an array lies in a file."""

    dtype: np.dtype
    items: int
    start: int


class Shard:
    """Reads a shard. Threads may share it.

    Args:
        path: of the file on this machine.
        name: for messages.
        entry: what the manifest says of it, or None to take it as it is.

    Raises:
        CacheCorrupt: the file breaks a rule of the format, or is not what the manifest says.
    """

    def __init__(self, path: Path, name: str, entry: Entry | None = None) -> None:
        self.name = name
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheCorrupt(f"{name} cannot be opened: {error}") from error
        weakref.finalize(self, os.close, self._file)  # when its last reader lets go of it
        self._places, self.metadata = self._header()
        self.offsets = {
            place[len(OFFSETS) :]: self._whole(place)
            for place in self._places
            if place.startswith(OFFSETS)
        }
        self.rows = self._whole(ROW)
        self._check_offsets()
        if entry is not None:
            self._check_entry(entry)

    def __len__(self) -> int:
        """Return its number of rows."""
        return len(self.rows)

    def _refuse(self, rule: str) -> CacheCorrupt:
        return CacheCorrupt(f"{self.name}: {rule}")

    def _read(self, start: int, count: int) -> np.ndarray:
        """Return [count] uint8, writable: PyTorch warns of arrays that are not."""
        buffer = np.empty(count, np.uint8)
        done = 0
        while done < count:  # one call gives at most 2 GiB
            try:
                got = os.preadv(self._file, [buffer[done:].data], start + done)
            except OSError as error:
                raise self._refuse(f"bytes from {start} on cannot be read: {error}") from error
            if not got:
                raise self._refuse(
                    f"the file must have {start + count} bytes, it has become shorter"
                )
            done += got
        return buffer

    def _header(self) -> tuple[dict[str, _Place], dict[str, Any]]:
        size = os.fstat(self._file).st_size
        if size < 8:
            raise self._refuse(f"the file must have at least 8 bytes, got {size}")
        length = int(self._read(0, 8).view("<u8")[0])
        if length > min(size - 8, MAX_HEADER):
            raise self._refuse(
                f"the header must have at most {min(size - 8, MAX_HEADER)} bytes, got {length}"
            )
        header = parse(self._read(8, length).tobytes(), f"{self.name}: the header")
        metadata = header.pop("__metadata__", {})
        places, at = {}, 0
        for name, value in header.items():
            places[name] = self._place(name, value, at, 8 + length)
            at += places[name].items * places[name].dtype.itemsize
        if 8 + length + at != size:
            raise self._refuse(
                f"header and arrays must fill the file of {size}, got {8 + length + at}"
            )
        if not isinstance(metadata, dict):
            raise self._refuse("metadata must be an object")
        return places, metadata

    def _place(self, name: str, value: Any, at: int, data: int) -> _Place:
        """Check an array's entry in the header; it must start where the one before ends."""
        value = value if isinstance(value, dict) else {}
        dtype, shape, place = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        is_known = isinstance(dtype, str) and dtype in DTYPES
        if not is_known or not isinstance(shape, list) or len(shape) != 1:
            raise self._refuse(f"{name} must be 1-D and of one of {sorted(DTYPES)}, got {value}")
        count = shape[0]
        if type(count) is not int or count < 0:
            raise self._refuse(f"{name} must have a number of values, got {count!r}")
        end = at + count * DTYPES[dtype].itemsize
        if place != [at, end]:
            raise self._refuse(f"{name} must lie at {[at, end]}, got {place}")
        return _Place(DTYPES[dtype], count, data + at)

    def _whole(self, name: str) -> np.ndarray:
        place = self._places.get(name)
        if place is None:
            raise self._refuse(f"there is no array {name!r}")
        return self._read(place.start, place.items * place.dtype.itemsize).view(place.dtype)

    def _check_offsets(self) -> None:
        wanted = FIXED | {POSITIONS: np.dtype("<i4")}
        for name, dtype in wanted.items():
            if name not in self._places or self._places[name].dtype != dtype:
                raise self._refuse(f"there must be an array {name!r} of {NAMES[dtype]}")
        values = {x for x in self._places if x not in FIXED and not x.startswith(OFFSETS)}
        if values != self.offsets.keys():
            raise self._refuse(
                f"arrays and offsets must match, {values ^ self.offsets.keys()} do not"
            )
        if self._places[ROW_HASH].items != len(self):
            raise self._refuse(f"row and row_hash must have one length, got {len(self)} rows")
        for name, offsets in self.offsets.items():
            is_valid = offsets.dtype == FIXED[ROW] and len(offsets) == len(self) + 1
            if not is_valid or offsets[0] != 0 or offsets[-1] != self._places[name].items:
                raise self._refuse(
                    f"offsets of {name!r} must be {len(self) + 1} I64 from 0 to "
                    f"{self._places[name].items}"
                )
            if (offsets[1:] < offsets[:-1]).any():
                raise self._refuse(f"offsets of {name!r} must not fall")

    def _check_entry(self, entry: Entry) -> None:
        if len(self) != entry.stop - entry.start or (
            (self.rows != np.arange(entry.start, entry.stop)).any()
        ):
            raise self._refuse(f"it must have rows {entry.start} to {entry.stop - 1} in order")
        if self._places[POSITIONS].items != entry.tokens:
            raise self._refuse(
                f"it must have {entry.tokens} tokens, got {self._places[POSITIONS].items}"
            )

    def row_hashes(self) -> np.ndarray:
        """Return [S] uint64, the hashes of its rows."""
        return self._whole(ROW_HASH)

    def row(self, index: int) -> Row:
        """Return the row at a place in the shard.

        Raises:
            CacheCorrupt: its positions do not ascend from 1 on, or the file has become shorter.
        """
        arrays = {name: self._slice(name, index) for name in self.offsets}
        positions = arrays.pop(POSITIONS)
        if len(positions) and (positions[0] < 1 or (positions[1:] <= positions[:-1]).any()):
            raise self._refuse(f"positions of row {self.rows[index]} must ascend from 1 on")
        place = self._places[ROW_HASH]
        row_hash = int(self._read(place.start + 8 * index, 8).view(place.dtype)[0])
        return Row(int(self.rows[index]), row_hash, positions, arrays)

    def _slice(self, name: str, index: int) -> np.ndarray:
        start, end = (int(x) for x in self.offsets[name][index : index + 2])
        place = self._places[name]
        size = place.dtype.itemsize
        return self._read(place.start + start * size, (end - start) * size).view(place.dtype)
