"""A cache as a parquet file, for other programs: the values that a reader gives.

Each shard becomes a part beside the file, and the parts are joined when all are there, so that an
export that is interrupted goes on.

Shapes: n scored tokens of a row, K entries, m draws, V logits per token, H hidden.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from tqdm.auto import tqdm

from hf_distill.cache import fingerprints
from hf_distill.cache.codecs import HiddenStates
from hf_distill.cache.columns import HIDDEN, named_columns
from hf_distill.cache.errors import CacheError, RowMismatch
from hf_distill.cache.files import TMP, sync_folder
from hf_distill.cache.fingerprints import Collator, Data
from hf_distill.cache.launches import only_one_writes
from hf_distill.cache.shard import Row
from hf_distill.cache.teacher import CachedTeacher
from hf_distill.data.sides import IGNORE_INDEX

logger = logging.getLogger(__name__)

PARTS = ".parts"
METADATA = b"hf_distill"
GROUP_BYTES = 2**26  # of a row group, about
NAMES = {
    "ids": "top_ids",
    "log_probs": "top_log_probs",
    "log_tail": "log_tail",
    "samples.ids": "sample_ids",
    "samples.log_probs": "sample_log_probs",
    "samples.log_weights": "sample_log_weights",
    "powers.log_sums": "tail_log_sums",
    "powers.num_tail": "num_tail",
}
"""Columns of a sparse teacher, see `columns`."""
FULL = "log_probs"
COORDINATES = "coordinates"  # of hidden states, on the basis beside the head
TOKEN = pa.int32()


class Exporter:
    """Writes a cache as a parquet file with a row for each row of the data.

    Columns: `row` and `row_hash`; `input_ids` [L] and `labels` [L], -100 where nothing is scored,
    if the data are given; `positions` [n]; `temperature`, at which all log-probabilities are taken;
    `entropy` [n]; and what the codec stores. Of `TopK` and `HeadSamples` that is `top_ids` [n, K],
    -1 where a token has fewer, `top_log_probs` [n, K] and `log_tail` [n]. Of codecs with draws it
    is `sample_ids`, `sample_log_probs` and `sample_log_weights` [n, m], and where they are stored
    `tail_log_sums` [n, orders] and `num_tail` [n]. Of `Full` it is `log_probs` [n, V], and of
    `HiddenStates` `hidden` [n, H], without the head.

    Args:
        path: the cache's folder, or a URL that fsspec knows.
        data: the rows that were cached, or None.
        collator: that of the writing, for the data.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        data: Data | None = None,
        collator: Collator | None = None,
    ) -> None:
        if (data is None) != (collator is None):
            raise ValueError("data and their collator must be given together")
        self._teacher = CachedTeacher(path)
        self._reader, self._manifest = self._teacher.reader, self._teacher.manifest
        self._data, self._collator = data, collator
        if data is not None and len(data) != len(self._reader):
            raise RowMismatch(
                f"{self._reader.path} holds {len(self._reader)} rows, the data have {len(data)}"
            )

    def write(self, path: Path, overwrite: bool = False) -> int:
        """Write the file; returns its number of tokens.

        Raises:
            CacheError: there is a file of that name.
            CacheCorrupt, RowMismatch: the cache is damaged, or the data are not those of it.
        """
        if self._data is None:
            logger.info("input_ids are left out: a cache holds hashes of rows only, and the data "
                        "have their ids (--dataset)")  # fmt: skip
        parts = path.with_name(path.name + PARTS)
        with only_one_writes(parts):
            if path.exists() and not overwrite:
                raise CacheError(f"{path} is there already: name another, or pass --overwrite")
            self._write(path, parts)
            for part in parts.glob("*.parquet*"):
                part.unlink()
            shutil.rmtree(parts, ignore_errors=True)  # nobody else may have begun there
        return sum(shard.tokens for shard in self._manifest.shards)

    def _write(self, path: Path, parts: Path) -> None:
        """Write the parts that are missing, and join all."""
        shards = self._manifest.shards
        files = [parts / f"{number:05d}.parquet" for number in range(len(shards))]
        with tqdm(total=len(self._reader), unit="row", desc="export") as bar:
            for number, (part, shard) in enumerate(zip(files, shards, strict=True)):
                if not self._is_written(part, number):
                    tables = self._tables(shard.start, shard.stop)
                    _commit(part, parts, tables, self._schema(number))
                bar.update(shard.stop - shard.start)
        _commit(path, parts, _groups(files), self._schema(None))

    def _schema(self, number: int | None) -> pa.Schema:
        """Return the columns, with what they are of: a whole cache, or one shard."""
        fields = [("row", pa.int64()), ("row_hash", pa.uint64())]
        if self._data is not None:
            fields += [("input_ids", pa.list_(TOKEN)), ("labels", pa.list_(TOKEN))]
        fields += [("positions", pa.list_(TOKEN)), ("temperature", pa.float32())]
        values = self._values(None)
        fields += [(name, _type(x)) for name, x in values.items()]
        about = {
            "config_hash": self._manifest.config_hash,
            "teacher": self._manifest.config["teacher"].get("name_or_path"),
            "codec": self._manifest.config["codec"],
            "logit_dim": self._manifest.vocab_size,
            "orders": list(getattr(self._teacher.codec, "orders", ())),
        }
        if number is not None:
            about |= {"shard": number, "sha256": self._manifest.shards[number].sha256}
        return pa.schema(fields, {METADATA: json.dumps(about, sort_keys=True).encode()})

    def _is_written(self, part: Path, number: int) -> bool:
        """Say whether a part is there, of this shard and with these columns."""
        if not part.exists():
            return False
        try:
            found, wanted = pq.read_schema(part), self._schema(number)
        except (pa.ArrowException, OSError):
            return False
        is_same = (found.metadata or {}).get(METADATA) == wanted.metadata[METADATA]
        return is_same and found.names == wanted.names

    def _values(self, row: Row | None) -> dict[str, np.ndarray]:
        """Return what is stored of a row's tokens by column, [n] or [n, K]; of none, no tokens."""
        found = self._teacher.decoded([] if row is None else [row])
        if isinstance(found, Tensor):
            return self._dense(found)
        columns = {NAMES[name]: x.numpy() for name, x in named_columns(found)}
        if not self._has_head():
            columns = {k: x for k, x in columns.items() if not k.startswith("top_")}
        entropy = np.zeros(0) if row is None else row.arrays["entropy"]
        return columns | {"entropy": entropy.astype(np.float32)}

    def _dense(self, found: Tensor) -> dict[str, np.ndarray]:
        """Return hidden states, or their coordinates on a basis, or log-probabilities."""
        codec = self._teacher.codec
        if not isinstance(codec, HiddenStates):
            return {FULL: found.float().numpy()}
        name = HIDDEN if codec.rank is None else COORDINATES
        return {name: self._teacher.hidden(found).numpy()}

    def _has_head(self) -> bool:
        return getattr(self._teacher.codec, "top_k", 0) > 0

    def _tables(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Yield rows [start, stop), some at a time."""
        schema, rows, size = self._schema(None), [], 0
        for number in range(start, stop):
            rows.append(self._row(number))
            size += sum(x.nbytes for x in rows[-1].values())
            if size >= GROUP_BYTES or number == stop - 1:
                columns = [
                    _column([row[field.name] for row in rows], field.type) for field in schema
                ]
                yield pa.Table.from_arrays(columns, schema=schema)
                rows, size = [], 0

    def _row(self, number: int) -> dict[str, np.ndarray]:
        row = self._reader.row(number)
        made = {"row": np.int64(row.row), "row_hash": np.uint64(row.row_hash)}
        if self._data is not None:
            ids = self._ids(number, row)
            labels = np.full(len(ids), IGNORE_INDEX, np.int32)
            labels[row.positions] = ids[row.positions]
            made |= {"input_ids": ids, "labels": labels}
        made |= {
            "positions": row.positions,
            "temperature": np.float32(self._teacher.codec.temperature),
        }
        return made | self._values(row)

    def _ids(self, number: int, row: Row) -> np.ndarray:
        """Return the ids of a row of the data, which must be those that were cached."""
        assert self._data is not None
        assert self._collator is not None
        (found,) = fingerprints.collated(self._collator, [self._data[number]], number)
        if found.hash != row.row_hash:
            raise RowMismatch(
                f"{self._reader.path}: row {number} of the data ({len(found.ids)} tokens that "
                f"begin {found.ids[:8]}) is not the one that was cached. Data, tokenizer, chat "
                "template and hints must be those of the writing"
            )
        return np.array(found.ids, np.int32)


def _groups(files: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the row groups of parquet files, in order."""
    for path in files:
        with pq.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                yield file.read_row_group(i)


def _type(values: np.ndarray) -> pa.DataType:
    inner = TOKEN if np.issubdtype(values.dtype, np.integer) else pa.float32()
    return pa.list_(inner) if values.ndim == 1 else pa.list_(pa.list_(inner))


def _column(values: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    """Return rows' values, numbers or [n] or [n, K], as a column."""
    if not pa.types.is_nested(kind):
        return pa.array(np.array(values), kind)
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in values])]).astype(np.int32)
    if not pa.types.is_nested(kind.value_type):
        inner = pa.array(np.concatenate(values), kind.value_type)
        return pa.ListArray.from_arrays(offsets, inner)
    widths = np.concatenate([np.full(len(x), x.shape[1]) for x in values])
    ends = np.concatenate([[0], np.cumsum(widths)])
    if ends[-1] > np.iinfo(np.int32).max:
        raise CacheError(
            f"a row's lists must have at most 2^31 - 1 entries in parquet, got {ends[-1]}"
        )
    ends = ends.astype(np.int32)
    flat = pa.array(np.concatenate([x.reshape(-1) for x in values]), kind.value_type.value_type)
    return pa.ListArray.from_arrays(offsets, pa.ListArray.from_arrays(ends, flat))


def _commit(path: Path, folder: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Write a parquet file under another name in a folder, flush it to the disk, and rename it."""
    tmp = folder / f"{path.name}.{os.getpid()}{TMP}"
    try:
        with open(tmp, "wb") as file:
            with pq.ParquetWriter(file, schema) as writer:
                for table in tables:
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
