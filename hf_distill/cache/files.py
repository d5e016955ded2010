"""Files that are there whole or not at all, and folders that may be remote."""

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from hf_distill.cache.errors import CacheCorrupt, CacheIncomplete

TMP = ".tmp"
BLOCK = 2**22  # bytes that are hashed or copied at a time


def commit(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file under another name, flush it to the disk, and rename it.

    Args:
        path: of the file, in a folder that exists. A file of that name is replaced.
        parts: its bytes.

    Returns:
        Its size, and the sha256 of its bytes in hexadecimal.

    Raises:
        OSError: it could not be written. What there was of it is removed.
    """
    digest, size = hashlib.sha256(), 0
    host = re.sub(r"\W+", "-", socket.gethostname())  # folders may be shared between machines
    tmp = path.with_name(f"{path.name}.{host}.{os.getpid()}{TMP}")
    try:
        with open(tmp, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that renames in it outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> bytes:
    """Return JSON with sorted keys and without spaces: equal values give equal bytes.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def pretty(value: Mapping[str, Any]) -> bytes:
    """Return JSON to be read by people."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def parse(text: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CacheCorrupt: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{name} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise CacheCorrupt(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def entry(value: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    """Return an entry of a JSON object that must be there, and of a type.

    Raises:
        CacheCorrupt: it is not, or it is a negative number where an int is asked for.
    """
    found = value.get(key)
    if type(found) is not kind or (isinstance(found, int) and found < 0):
        what = "int >= 0" if kind is int else kind.__name__
        raise CacheCorrupt(f"{name}: {key} must be of type {what}, got {str(found)[:80]!r}")
    return found


class Folder:
    """Reads from a folder, on this machine or another.

    Args:
        path: a path, or a URL that fsspec knows ("s3://bucket/cache", "hf://...").
        copies: where remote files are kept on this machine; they are named by their sha256.
    """

    def __init__(self, path: str | os.PathLike[str], copies: Path) -> None:
        self.name = os.fspath(path)
        self._fs, self._root = fsspec.core.url_to_fs(self.name)
        self._copies = copies
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def read(self, name: str) -> bytes:
        """Return a small file's bytes.

        Raises:
            CacheIncomplete: it is not there.
        """
        try:
            data = self._fs.cat_file(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise CacheIncomplete(f"{self.name}: there is no {name}") from error
        return bytes(data)

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes in bytes of a sub-folder's files by name; empty if it is not there."""
        try:
            listed = self._fs.ls(f"{self._root}/{name}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        files = [x for x in listed if x["type"] != "directory"]  # or links to files
        return {x["name"].rsplit("/", 1)[-1]: int(x["size"]) for x in files}

    def local(self, name: str, sha256: str, size: int) -> Path:
        """Return a file of this machine with the file's bytes; a remote one is copied once.

        A copy of another size is made again.

        Raises:
            CacheCorrupt: a remote file has another sha256.
        """
        if self.is_local:
            return Path(self._root, name)
        copy = self._copies / f"{sha256}{Path(name).suffix}"
        if not copy.exists() or copy.stat().st_size != size:
            self._copies.mkdir(parents=True, exist_ok=True)
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                _, found = commit(copy, iter(lambda: file.read(BLOCK), b""))
            if found != sha256:
                copy.unlink()
                raise CacheCorrupt(f"{name}: sha256 must be {sha256}, got {found}")
        return copy
