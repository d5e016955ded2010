"""RecordedLogProbs: what a server has answered earlier, from a file with one answer a line."""

import gzip
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from hf_distill.cache import fingerprints
from hf_distill.cache.arrays import LogProbRows
from hf_distill.cache.responses import Answer, read_answers
from hf_distill.data.sides import IGNORE_INDEX
from hf_distill.teachers import vllm_client
from hf_distill.teachers.vllm_client import TopK

logger = logging.getLogger(__name__)

GZIP = ".gz"


class _Place(NamedTuple):
    """Says where an answer is: a line's number, its first byte and bytes, which of its choices."""

    line: int
    start: int
    size: int
    choice: int


class RecordedLogProbs:
    """Reads a server's answers from a file, one JSON object a line: .jsonl, or .jsonl.gz.

    An object is a whole response of vLLM or of another OpenAI-compatible server, a line of a
    batch's output, or one choice; `responses.py` lists the fields that are read. Tokens must be ids
    everywhere: ask a server with `return_token_ids` and `return_tokens_as_token_ids`.

    The row of an answer is its `input_ids` or, without them, the prompt and what was sampled behind
    it; a prompt that is scored itself, with at most one token behind it, is the row alone.
    Positions that an answer does not score must not be scored by the data.

    Args:
        path: of the file. A compressed one is unpacked into a temporary file.
        top_k: entries of each token that are kept, >= 1; there must be as many.
        name: of the teacher, for the manifest.

    Raises:
        ValueError: top_k is out of range, or a line is no such object; naming the line.
    """

    def __init__(self, path: str | os.PathLike[str], top_k: int, name: str) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.path, self.top_k, self.name = Path(path), top_k, name
        self._places: list[_Place] = []
        self._by_hash: dict[int, int] = {}  # the answer of a row, by its ids' hash
        self._vocab = 0
        self._file = _opened(self.path)
        weakref.finalize(self, self._file.close)
        self._sha256 = self._read_all()

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._places)

    def _read_all(self) -> str:
        """Find every answer's row; returns the sha256 of all lines."""
        digest, size = hashlib.sha256(), os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        rows: dict[int, int] = {}
        with tqdm(desc="index", unit="B", unit_scale=True, total=size) as bar:
            for number, (start, line) in enumerate(_lines(self._file), 1):
                for choice, answer in enumerate(self._parsed(line, number)):
                    self._places.append(_Place(number, start, len(line), choice))
                    row, *others = map(answer.ids.__getitem__, map(slice, answer.lengths))
                    self._by_hash[fingerprints.row_hash(row)] = len(self._places) - 1
                    for other in others:  # unless an answer is of that row itself
                        rows.setdefault(fingerprints.row_hash(other), len(self._places) - 1)
                digest.update(line)
                bar.update(len(line))
        self._by_hash = rows | self._by_hash
        return digest.hexdigest()

    def _parsed(self, line: bytes, number: int) -> list[Answer]:
        try:
            return read_answers(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {number}: {error}") from error

    def _answer(self, number: int) -> Answer:
        place = self._places[number]
        line = os.pread(self._file.fileno(), place.size, place.start)
        return self._parsed(line, place.line)[place.choice]

    @property
    def rows(self) -> LogProbRows:
        """Return the answers' rows as data: `input_ids`, and `labels` where something is known."""
        return LogProbRows(self)

    def ids(self, number: int) -> list[int]:
        """Return the ids of an answer's row."""
        return self._answer(number).row

    def labels(self, number: int) -> list[int]:
        """Return the ids of an answer's row, -100 where nothing is known of them.

        Raises:
            ValueError: a position is of no form that is read; naming the line.
        """
        answer, line = self._answer(number), self._places[number].line
        try:
            known = [None, *answer.entries()]
        except ValueError as error:
            raise ValueError(f"{self.path}, line {line}, {error}") from error
        pairs = zip(answer.row, known, strict=False)
        return [IGNORE_INDEX if x is None else token for token, x in pairs]

    def identity(self) -> dict[str, Any]:
        """Return the sha256 of all answers: a file that has changed is another teacher."""
        return {"answers_sha256": self._sha256}

    def start(self, vocab: int) -> None:
        """Keep the vocabulary, below which ids must be."""
        self._vocab = vocab

    def top_log_probs(self, ids: Sequence[int]) -> list[TopK | None]:
        """Return the most probable tokens at positions 1 to len(ids) - 1 of a whole row.

        Returns:
            Of each position top_k entries, descending; None where the answer has nothing.

        Raises:
            ValueError: no answer is of these ids, or it has not top_k log-probabilities for each.
        """
        number = self._by_hash.get(fingerprints.row_hash(ids))
        if number is None:
            raise ValueError(f"{self.path} has no answer for a row of {len(ids)} tokens that "
                             f"begin {list(ids[:8])}")  # fmt: skip
        where = f"{self.path}, line {self._places[number].line}"
        try:
            positions = self._answer(number).entries()[: len(ids) - 1]
        except ValueError as error:
            raise ValueError(f"{where}, {error}") from error
        for at, entries in enumerate(positions, 1):
            fault = None if entries is None else self._fault(entries)
            if fault is not None:
                raise ValueError(f"{where}, position {at}: {fault}")
        return [None if x is None else vllm_client.largest(x, self.top_k) for x in positions]

    def _fault(self, entries: TopK) -> str | None:
        if len(entries) < self.top_k:
            return f"each token must have {self.top_k} entries, got {len(entries)}"
        if not 0 <= min(entries) <= max(entries) < self._vocab:
            return f"ids must be in [0, {self._vocab}), got {min(entries)} to {max(entries)}"
        return vllm_client.mass_fault(entries)


def _opened(path: Path) -> Any:
    """Open a file of which any part can be read: a compressed one is unpacked.

    Raises:
        ValueError: it is not a whole gzip file.
    """
    if path.suffix != GZIP:
        return open(path, "rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115, it is returned
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, unpacked, 2**20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        unpacked.close()
        raise ValueError(f"{path} must be a whole gzip file: {error}") from error
    unpacked.flush()
    size = unpacked.tell()
    logger.info("%s is unpacked into a temporary file of %d bytes, to be read anywhere", path, size)
    return unpacked


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    start = 0
    for line in file:
        if line.strip():
            yield start, line
        start += len(line)
