"""Rows of arrays by number, from parquet, arrow, JSON and npz files, as numpy.

Shapes: R rows; a value of a row is [n] or [n, K], with lists of other lengths filled up.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from hf_distill.cache.datasets import load_data
from hf_distill.cache.files import BLOCK

NPZ = ".npz"


class Table(Protocol):
    """Gives values of rows by column."""

    @property
    def columns(self) -> Sequence[str]:
        """Return the names of the columns."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def value(self, row: int, column: str) -> np.ndarray:
        """Return [n] or [n, K]; of lists of other lengths the last values are NaN, or -1."""
        ...

    def sha256(self) -> str:
        """Return a digest of all values, for the manifest."""
        ...


class DatasetTable:
    """Reads a `datasets.Dataset`, which lies as arrow on this machine.

    Args:
        data: the rows.
        files: whose bytes are the table's identity; none for the data's own fingerprint.
    """

    def __init__(self, data: Dataset, files: Sequence[Path] = ()) -> None:
        self._data, self._files = data, files
        self.columns: Sequence[str] = data.column_names
        self._views = {x: data.select_columns([x]).with_format("arrow") for x in self.columns}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._data)

    def value(self, row: int, column: str) -> np.ndarray:
        """See `Table.value`."""
        table: Any = self._views[column][row : row + 1]
        scalar = table[column][0]
        if not scalar.is_valid:
            return np.zeros(0)
        return _numpy(scalar.values) if pa.types.is_nested(scalar.type) else np.array(scalar)

    def sha256(self) -> str:
        """See `Table.sha256`."""
        if not self._files:
            return hashlib.sha256(self._data._fingerprint.encode()).hexdigest()
        return _sha256_of_all(self._files)


def _numpy(values: Any) -> np.ndarray:
    """Return an arrow array, [n] or a list array [n, K], as numpy."""
    if not pa.types.is_nested(values.type):
        return values.to_numpy(zero_copy_only=False)
    lengths = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if not len(lengths) or (lengths == lengths[0]).all():
        return flat.reshape(len(lengths), -1 if len(flat) else 0)
    inside = np.arange(lengths.max()) < lengths[:, None]
    fill = np.nan if np.issubdtype(flat.dtype, np.floating) else -1
    dtype = flat.dtype if fill != -1 else np.int64
    padded = np.full(inside.shape, fill, dtype)
    padded[inside] = flat
    return padded


class NpzTable:
    """Reads .npz files, which have one row ([T], [n, K]) or many ([R, T], [R, n, K]) each.

    Args:
        files: in order; one of them is in memory at a time.
        ids: names of the column of ids, whose dimensions tell one row from many.

    Raises:
        ValueError: a file holds no column of ids, or objects, which are not read.
    """

    def __init__(self, files: Sequence[Path], ids: Sequence[str]) -> None:
        self._files, self._open = files, -1
        self._arrays: dict[str, np.ndarray] = {}
        names: Sequence[str] = ()
        self._places: list[tuple[int, int]] = []  # of each row: the file, and the row in it
        for number, _ in enumerate(tqdm(files, desc="files", unit="file")):
            arrays = self._load(number)
            name = next((x for x in ids if x in arrays), None)
            if name is None or arrays[name].ndim not in (1, 2):
                raise ValueError(
                    f"{files[number]} must have an array [T] or [R, T] that is one of {tuple(ids)},"
                    f" got {sorted(arrays)}"
                )
            rows = 1 if arrays[name].ndim == 1 else len(arrays[name])
            self._single = arrays[name].ndim == 1
            if number and sorted(arrays) != sorted(names):
                raise ValueError(
                    f"all files must have the arrays {sorted(names)} of {files[0]}, "
                    f"{files[number]} has {sorted(arrays)}"
                )
            names = tuple(arrays)
            self._places += [(number, -1 if self._single else i) for i in range(rows)]
        self.columns: Sequence[str] = list(self._arrays)

    def _load(self, number: int) -> dict[str, np.ndarray]:
        if self._open != number:
            try:
                with np.load(self._files[number], allow_pickle=False) as file:
                    arrays = dict(file)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(
                    f"{self._files[number]} must be an .npz of numbers: {error}"
                ) from error
            self._arrays, self._open = arrays, number
        return self._arrays

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    def value(self, row: int, column: str) -> np.ndarray:
        """See `Table.value`."""
        file, index = self._places[row]
        values = self._load(file)[column]
        return values if index < 0 or values.ndim == 0 else values[index]

    def sha256(self) -> str:
        """See `Table.sha256`."""
        return _sha256_of_all(self._files)


def _sha256_of_all(files: Sequence[Path]) -> str:
    """Return the sha256 of files' bytes, end to end."""
    digest = hashlib.sha256()
    total = sum(file.stat().st_size for file in files)
    with tqdm(desc="sha256", unit="B", unit_scale=True, total=total) as bar:
        for path in files:
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


def open_table(name: str, ids: Sequence[str], split: str = "train") -> Table:
    """Open a file, a folder of .npz or of data files, or a data set of the hub.

    Args:
        name: of it.
        ids: names of the column of ids, for .npz.
        split: of a folder or a data set of the hub.

    Raises:
        ValueError: see `load_data`, `NpzTable`.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file())
    arrays = [x for x in files if x.suffix == NPZ]
    if arrays:
        return NpzTable(arrays, ids)
    return DatasetTable(load_data(name, split), files)
