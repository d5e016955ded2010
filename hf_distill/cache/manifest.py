"""The manifest: what a cache holds, and the configuration that it was made with.

`config` is known before the first row: it is written as config.json at the start, so that a run
that goes on can say what has changed. manifest.json is written last; a cache without it is not
whole.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_distill.cache.errors import CacheCorrupt, FormatVersionError
from hf_distill.cache.files import canonical, commit, entry, parse, pretty
from hf_distill.cache.shard import FORMAT, FORMAT_VERSION, Entry

MANIFEST, CONFIG = "manifest.json", "config.json"
HEAD = "head.safetensors"  # of the teacher, where hidden states are stored
HASHES = "row_hashes.bin"  # of all rows in order, so that no shard is opened to find one
CHECKSUM = "sha256"  # of the rest of the file
SECTIONS = ("teacher", "logits", "dataset", "collator", "codec")
SHOWN = 80  # characters of a value in an error


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a configuration's canonical JSON."""
    return hashlib.sha256(canonical(config)).hexdigest()


def check_version(value: Mapping[str, Any], name: str) -> None:
    """Check that a file's format is one that is read here.

    Raises:
        CacheCorrupt: it does not say which.
        FormatVersionError: it is another major version.
    """
    version = entry(value, "format_version", str, name)
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise FormatVersionError(
            f"{name}: format_version must be {FORMAT_VERSION.split('.')[0]}.*, got {version!r}; "
            "read the cache with the version of hf_distill that wrote it, or write it again"
        )


@dataclass(frozen=True)
class Manifest:
    """Holds what manifest.json says.

    Attributes:
        config: teacher, tokenizer, logits, dataset, collator, codec and shard_rows; all of it is
            in `config_hash`.
        rows_digest: see `fingerprints.rows_digest`.
        stats: tokens, bytes, bytes_per_token, and means over all tokens, such as entropy in nats.
        shards: rows, tokens, bytes and sha256 of each shard, in order.
        written_by: versions and time, for people.
    """

    config: Mapping[str, Any]
    rows_digest: str
    stats: Mapping[str, Any]
    shards: Sequence[Entry]
    written_by: Mapping[str, Any]

    @property
    def config_hash(self) -> str:
        """Return the hash of `config`."""
        return config_hash(self.config)

    @property
    def num_rows(self) -> int:
        """Return the number of rows of the data, those without scored tokens included."""
        return self.config["dataset"]["num_rows"]

    @property
    def vocab_size(self) -> int:
        """Return the teacher's number of logits per token, padding of the vocabulary included."""
        return self.config["logits"]["logit_dim"]

    @property
    def head(self) -> tuple[int, str] | None:
        """Return bytes and sha256 of the file of the teacher's head, or None if there is none."""
        size, sha256 = self.stats.get("head_bytes"), self.stats.get("head_sha256")
        if type(size) is not int or not isinstance(sha256, str):
            return None
        return size, sha256

    def write(self, cache: Path) -> None:
        """Write manifest.json.

        Raises:
            OSError: it could not be written.
        """
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": self.config,
            "config_hash": self.config_hash,
            "rows_digest": self.rows_digest,
            "stats": self.stats,
            "shards": [shard.to_json() for shard in self.shards],
            "written_by": self.written_by,
        }
        checksum = hashlib.sha256(canonical(content)).hexdigest()
        commit(cache / MANIFEST, [pretty(content | {CHECKSUM: checksum})])

    @classmethod
    def read(cls, text: bytes, name: str = MANIFEST) -> "Manifest":
        """Read the bytes of a manifest.json.

        Raises:
            FormatVersionError: it is of another major version.
            CacheCorrupt: it is not what was written.
        """
        content = parse(text, name)
        check_version(content, name)
        checksum = content.pop(CHECKSUM, None)
        try:
            found = hashlib.sha256(canonical(content)).hexdigest()
        except (ValueError, RecursionError) as error:
            raise CacheCorrupt(f"{name}: {error}") from error
        if checksum != found:
            raise CacheCorrupt(f"{name}: sha256 must be {found}, got {str(checksum)[:SHOWN]!r}")
        made = cls._from(content, name)
        if content.get("config_hash") != made.config_hash:
            raise CacheCorrupt(f"{name}: config_hash must be {made.config_hash}")
        return made

    @classmethod
    def _from(cls, content: Mapping[str, Any], name: str) -> "Manifest":
        config, stats, by = (
            entry(content, x, dict, name) for x in ("config", "stats", "written_by")
        )
        for section in SECTIONS:
            entry(config, section, dict, name)
        num_rows = entry(config["dataset"], "num_rows", int, name)
        entry(config["logits"], "logit_dim", int, name)
        listed = entry(content, "shards", list, name)
        shards = [
            Entry.from_json(x if isinstance(x, dict) else {}, f"{name}: shard {i}")
            for i, x in enumerate(listed)
        ]
        edges = [0, *(shard.stop for shard in shards)]
        if [shard.start for shard in shards] != edges[:-1] or edges[-1] != num_rows:
            raise CacheCorrupt(f"{name}: shards must hold rows 0 to {num_rows - 1} in order")
        return cls(config, entry(content, "rows_digest", str, name), stats, shards, by)
