"""The folder of a cache while it is written: what is begun, what is missing, what completes it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_distill.cache import fingerprints, server_teachers
from hf_distill.cache.errors import CacheConfigMismatch, CacheCorrupt, CacheError, CacheIncomplete
from hf_distill.cache.files import TMP, commit, entry, parse, pretty, sha256_of
from hf_distill.cache.fingerprints import first_difference
from hf_distill.cache.manifest import (
    CONFIG,
    HASHES,
    HEAD,
    MANIFEST,
    SHOWN,
    Manifest,
    check_version,
    config_hash,
)
from hf_distill.cache.shard import FOLDER, FORMAT_VERSION, Entry, Shard, shard_name, sidecar_name
from hf_distill.cache.stored_head import SIDECAR, head_stats

logger = logging.getLogger(__name__)

VERIFY = ("size", "full")


def write_config(cache: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, before the first shard.

    Raises:
        OSError: it could not be written.
    """
    commit(cache / CONFIG, [pretty({"format_version": FORMAT_VERSION, "config": config})])


def read_config(cache: Path) -> Mapping[str, Any] | None:
    """Read the configuration of a cache that was begun in a folder, or return None.

    Raises:
        CacheCorrupt: config.json is not what was written.
        FormatVersionError: it is of another major version.
    """
    path = cache / CONFIG
    if not path.exists():
        return None
    content = parse(path.read_bytes(), str(path))
    check_version(content, str(path))
    return entry(content, "config", dict, str(path))


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], cache: Path) -> None:
    """Check that a folder's cache is the one that is being written.

    Raises:
        CacheConfigMismatch: naming the first entry that differs, and both values; of servers, both
            fingerprints.
    """
    fault = server_teachers.difference(found["teacher"], wanted["teacher"])
    if fault is not None:
        raise CacheConfigMismatch(
            f"{cache} holds a cache of another teacher: {fault}; write this one to another folder, "
            "or pass overwrite=True"
        )
    difference = first_difference(found, wanted)
    if difference is not None:
        name, old, new = difference
        raise CacheConfigMismatch(
            f"{cache} holds a cache with {name} = {str(old)[:SHOWN]!r}, this one has "
            f"{str(new)[:SHOWN]!r}: write it to another folder, or pass overwrite=True"
        )


def going_on(cache: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the teacher of the cache in the folder, if that is the same one.

    A server's model says the same at another address, and up to its rounding.
    """
    try:
        found = read_config(cache)
    except CacheError:
        return config  # `begin` says so
    if found is None or not server_teachers.is_same(found.get("teacher"), config["teacher"]):
        return config
    return config | {"teacher": found["teacher"]}


def shard_rows(cache: Path) -> int | None:
    """Read the rows per shard of a cache that was begun in a folder, or return None."""
    config = read_config(cache)
    return None if config is None else entry(config, "shard_rows", int, str(cache / CONFIG))


def begin(cache: Path, config: Mapping[str, Any], overwrite: bool, verify: str) -> list[int]:
    """Make the folder ready for a configuration; only the main process does.

    Args:
        cache: the folder; it is made if it is not there.
        config: as it will stand in the manifest.
        overwrite: whether to delete what is there of another cache.
        verify: see `cache_teacher`.

    Returns:
        Numbers of the shards that are not there yet.

    Raises:
        CacheConfigMismatch: the folder has another cache.
        OSError: the folder cannot be written.
    """
    (cache / FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        return _missing(cache, config, verify)
    except CacheError:
        if not overwrite:
            raise
    delete(cache)
    return _missing(cache, config, verify)


def _missing(cache: Path, config: Mapping[str, Any], verify: str) -> list[int]:
    """Return the numbers of missing shards; raise CacheError if the folder has another's."""
    for stale in (*cache.glob(f"*{TMP}"), *(cache / FOLDER).glob(f"*{TMP}")):
        stale.unlink()
    found = read_config(cache)
    if found is not None:
        check_same(found, config, cache)
    else:
        write_config(cache, config)
    digest = config_hash(config)
    numbers = range(num_shards(config))
    return [i for i in numbers if _flaw(cache, i, digest, verify) is not None]


def num_shards(config: Mapping[str, Any]) -> int:
    """Return how many shards a cache has in the end."""
    return -(-config["dataset"]["num_rows"] // config["shard_rows"])


def delete(cache: Path) -> None:
    """Delete a cache's files and no others, the manifest first, so that none is half there."""
    for path in (cache / MANIFEST, cache / HASHES, *(cache / FOLDER).glob("shard-*")):
        path.unlink(missing_ok=True)
    for name in (SIDECAR, HEAD, CONFIG):
        (cache / name).unlink(missing_ok=True)


def _flaw(cache: Path, number: int, digest: str, verify: str) -> str | None:
    """Return why a shard must be written, or None."""
    sidecar = cache / sidecar_name(number)
    if not sidecar.exists():
        return "it has no sidecar"
    try:
        wanted = read_sidecar(cache, number, digest)
        path = cache / shard_name(number)
        if not path.exists() or path.stat().st_size != wanted.bytes:
            raise CacheCorrupt(f"{path} must have {wanted.bytes} bytes")
        if verify == "full" and sha256_of(path) != wanted.sha256:
            raise CacheCorrupt(f"{path}: sha256 must be {wanted.sha256}")
    except CacheCorrupt as error:
        logger.warning("shard %d is written again: %s", number, error)
        return str(error)
    return None


def read_sidecar(cache: Path, number: int, digest: str) -> Entry:
    """Read what a shard's sidecar says.

    Raises:
        CacheConfigMismatch: it is of another configuration.
        CacheCorrupt: it is not what was written.
        FormatVersionError: it is of another major version.
    """
    path = cache / sidecar_name(number)
    content = parse(path.read_bytes(), str(path))
    check_version(content, str(path))
    found = entry(content, "config_hash", str, str(path))
    if found != digest:
        raise CacheConfigMismatch(
            f"{path} has config_hash {found[:SHOWN]!r}, this cache {digest!r}: write it to another "
            "folder, or pass overwrite=True"
        )
    if entry(content, "shard", int, str(path)) != number:
        raise CacheCorrupt(f"{path}: shard must be {number}, got {content['shard']}")
    return Entry.from_json(content, str(path))


def finish(cache: Path, config: Mapping[str, Any], written_by: Mapping[str, Any]) -> Manifest:
    """Check that every row is there, once, and write the manifest; only the main process does.

    Raises:
        CacheIncomplete: a shard is missing.
        CacheCorrupt: a shard is not what its sidecar says.
        OSError: a file cannot be written.
    """
    digest = config_hash(config)
    entries, hashes, sums = [], [np.zeros(0, "<u8")], {}
    for number in range(num_shards(config)):
        if not (cache / sidecar_name(number)).exists():
            raise CacheIncomplete(f"{cache}: there is no {sidecar_name(number)}")
        wanted = read_sidecar(cache, number, digest)
        path = cache / shard_name(number)
        hashes.append(Shard(path, str(path), wanted).row_hashes())
        entries.append(wanted)
        content = parse((cache / sidecar_name(number)).read_bytes(), str(path))
        found = entry(content, "sums", dict, str(path))
        for name in found:
            sums[name] = sums.get(name, 0.0) + entry(found, name, float, str(path))
    joined = np.concatenate(hashes)
    commit(cache / HASHES, [joined.astype("<u8").tobytes()])
    stats = _stats(entries, sums) | head_stats(cache)
    made = Manifest(config, fingerprints.rows_digest(joined), stats, entries, written_by)
    made.write(cache)
    return made


def _stats(entries: Sequence[Entry], sums: Mapping[str, float]) -> dict[str, Any]:
    tokens, size = sum(x.tokens for x in entries), sum(x.bytes for x in entries)
    means = {f"mean_{name}": value / max(tokens, 1) for name, value in sums.items()}
    return {"tokens": tokens, "bytes": size, "bytes_per_token": size / max(tokens, 1)} | means
