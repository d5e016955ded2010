"""CacheReader: rows of a cache by number and by the hash of their ids."""

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME

from hf_distill.cache import fingerprints
from hf_distill.cache.errors import CacheCorrupt, CacheIncomplete, RowMismatch
from hf_distill.cache.files import Folder, entry, parse, sha256_of
from hf_distill.cache.manifest import HASHES, HEAD, MANIFEST, Manifest, check_version
from hf_distill.cache.shard import FOLDER, Entry, Row, Shard, shard_name, sidecar_name

VERIFY = ("lazy", "full", "size")
MAX_OPEN = 128  # shards; a process may often open 256 files
SHOWN = 8  # missing files in an error


class CacheReader:
    """Reads a whole cache, on this machine or another. Threads may share it.

    A pickled reader holds the path only: a worker opens the files for itself, without the checks of
    "full" that have been made already.

    Args:
        path: the cache's folder, or a URL that fsspec knows. Shards of a remote one are copied to
            this machine when they are first needed.
        verify: "lazy" compares the sha256 of a shard when it is first needed, "full" those of all
            now, "size" none. Sizes, the manifest's own sha256 and the structure of what is opened
            are always checked.
        copies: folder for copies of remote shards; None is `hf_distill` under HF_HOME.

    Attributes:
        manifest: what is in the cache.

    Raises:
        CacheIncomplete: the manifest or a shard is missing.
        CacheCorrupt: a file is not what was written.
        FormatVersionError: the format is of another major version.
        ValueError: `verify` is unknown.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        verify: str = "lazy",
        copies: str | os.PathLike[str] | None = None,
    ) -> None:
        if verify not in VERIFY:
            raise ValueError(f"verify must be one of {VERIFY}, got {verify!r}")
        self.path = os.fspath(path)
        self.verify = verify
        self.copies = Path(copies or Path(HF_HOME, "hf_distill"))
        self._begin()
        self.manifest = Manifest.read(self._folder.read(MANIFEST), f"{self.path}/{MANIFEST}")
        self._starts = np.array([shard.start for shard in self.manifest.shards], np.int64)
        self._verified: set[int] = set()
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        self._check_sizes()
        if verify == "full":
            for number in range(len(self.manifest.shards)):
                self._shard(number)
            if self.manifest.head is not None:
                self.head_file()

    def __getstate__(self) -> dict[str, Any]:
        verify = "size" if self.verify == "full" else self.verify
        return {"path": self.path, "verify": verify, "copies": self.copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        """Return the number of rows of the data."""
        return self.manifest.num_rows

    def _begin(self) -> None:
        self._folder = Folder(self.path, self.copies)  # some file systems must not be forked
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def _locked(self) -> threading.RLock:
        if self._process != os.getpid():  # a thread may have held the lock at the fork
            self._begin()
        return self._lock

    def _check_sizes(self) -> None:
        sizes = self._folder.sizes(FOLDER)
        numbered = range(len(self.manifest.shards))
        wanted = [name(i) for i in numbered for name in (shard_name, sidecar_name)]
        missing = [name for name in wanted if Path(name).name not in sizes]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise CacheIncomplete(
                f"{self.path}: there is no {', '.join(missing[:SHOWN])}{more}; write the cache "
                "again with the same settings, and only these are made"
            )
        for i, shard in enumerate(self.manifest.shards):
            size = sizes[Path(shard_name(i)).name]
            if size != shard.bytes:
                raise CacheCorrupt(
                    f"{self.path}/{shard_name(i)}: it must have {shard.bytes} bytes, got {size}"
                )

    def _shard(self, number: int) -> Shard:
        """Return an open shard, verified as far as it should be."""
        with self._locked():
            shard = self._open.get(number)
            if shard is None:
                shard = self._opened(number)
                while len(self._open) >= MAX_OPEN:  # closed when its last user lets go of it
                    self._open.popitem(last=False)
                self._open[number] = shard
            self._open.move_to_end(number)
            return shard

    def _opened(self, number: int) -> Shard:
        wanted, name = self.manifest.shards[number], shard_name(number)
        if self.verify == "size" or number in self._verified:
            path = self._folder.local(name, wanted.sha256, wanted.bytes)
        else:
            self._check_sidecar(number, wanted)
            path = self._verified_file(name, wanted.sha256, wanted.bytes)
            self._verified.add(number)
        return Shard(path, f"{self.path}/{name}", wanted)

    def _verified_file(self, name: str, sha256: str, size: int) -> Path:
        """Return a file of this machine with the bytes that were written."""
        path = self._folder.local(name, sha256, size)
        try:
            found = sha256_of(path)
            if found != sha256 and not self._folder.is_local:
                path.unlink(missing_ok=True)  # the copy has been damaged, not the file
                path = self._folder.local(name, sha256, size)
                found = sha256_of(path)
        except OSError as error:
            raise CacheCorrupt(f"{self.path}/{name} cannot be read: {error}") from error
        if found != sha256:
            raise CacheCorrupt(f"{self.path}/{name}: sha256 must be {sha256}, got {found}")
        return path

    def head_file(self) -> Path:
        """Return the file with the teacher's output head, checked as shards are.

        Raises:
            CacheCorrupt: the cache has none, or it is not what was written.
        """
        if self.manifest.head is None:
            raise CacheCorrupt(f"{self.path}: the manifest must name the file of the head")
        size, sha256 = self.manifest.head
        if self.verify == "size":
            return self._folder.local(HEAD, sha256, size)
        return self._verified_file(HEAD, sha256, size)

    def _check_sidecar(self, number: int, wanted: Entry) -> None:
        file = sidecar_name(number)
        name = f"{self.path}/{file}"
        content = parse(self._folder.read(file), name)
        check_version(content, name)
        if entry(content, "shard", int, name) != number:
            raise CacheCorrupt(f"{name}: shard must be {number}, got {content['shard']}")
        if Entry.from_json(content, name) != wanted:
            raise CacheCorrupt(f"{name}: it must say what the manifest says of its shard")
        if entry(content, "config_hash", str, name) != self.manifest.config_hash:
            raise CacheCorrupt(f"{name}: config_hash must be that of the manifest")

    def _hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows' hashes, ascending, and the rows' numbers; they are read at first use."""
        with self._locked():
            if self._index is None:
                name, wanted = f"{self.path}/{HASHES}", self.manifest.rows_digest
                raw = self._folder.read(HASHES)
                found = hashlib.sha256(raw).hexdigest()
                if len(raw) != 8 * len(self) or found != wanted:
                    raise CacheCorrupt(
                        f"{name}: it must have {8 * len(self)} bytes and sha256 {wanted}, got "
                        f"{len(raw)} and {found}"
                    )
                hashes = np.frombuffer(raw, "<u8")
                order = np.argsort(hashes, kind="stable")
                self._index = hashes[order], order
            return self._index

    def find(self, row_hash: int) -> np.ndarray:
        """Return the numbers of rows with a hash, int64 ascending; identical rows have one hash."""
        hashes, order = self._hashes()
        value = np.uint64(row_hash)
        first, last = (np.searchsorted(hashes, value, side) for side in ("left", "right"))
        return order[first:last]

    def row(self, number: int) -> Row:
        """Return a row of the data by its number.

        Raises:
            IndexError: there is no such row.
            CacheCorrupt: it is not what was written.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {number}")
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._shard(at).row(number - int(self._starts[at]))

    def match(self, wanted: fingerprints.SideRow) -> tuple[Row, np.ndarray]:
        """Find the stored row with a row's ids whose stored tokens hold its scored ones.

        Returns:
            The row, and [n] int64: the place of each scored token among the stored ones.

        Raises:
            RowMismatch: no stored row has these ids, or none has all of these tokens.
            CacheCorrupt: the row is not what was written.
        """
        row = None
        for number in self.find(wanted.hash):
            row = self.row(int(number))
            if row.row_hash != wanted.hash:
                raise CacheCorrupt(
                    f"{self.path}: row {row.row} has changed since its hash was read"
                )
            at = np.searchsorted(row.positions, wanted.positions)
            inside = at < len(row.positions)
            if inside.all() and (row.positions[at] == wanted.positions).all():
                return row, at
        begins = f"{len(wanted.ids)} tokens that begin {wanted.ids[:SHOWN]}"
        if row is None:
            raise RowMismatch(
                f"{self.path}: no stored row has the ids of the batch's row of {begins}. Data, "
                "tokenizer, chat template, truncation and hints must be those of the writing, and "
                "rows for evaluation must be cached too"
            )
        missing = [int(x) for x in wanted.positions if x not in row.positions]
        raise RowMismatch(
            f"{self.path}: row {row.row} ({begins}) must have been stored with the scored token at "
            f"position {missing[0]}; it has {len(row.positions)} others"
        )
