"""Log-probabilities from arrays: ids, top ids and their log-probabilities, or logits, of each row.

Shapes: L ids of a row, n its entries, K entries of a position.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from hf_distill.cache import fingerprints
from hf_distill.cache.tables import Table, open_table
from hf_distill.data.sides import IGNORE_INDEX
from hf_distill.teachers.vllm_client import MASS_TOLERANCE, TopK

logger = logging.getLogger(__name__)

IDS = ("input_ids", "ids", "prompt_token_ids")
TOP_IDS = ("top_ids", "topk_ids", "topk_indices", "topk_token_ids", "teacher_topk_ids")
TOP_IDS += ("teacher_topk_indices", "teacher_topk_token_ids")
LOG_PROBS = ("top_log_probs", "topk_log_probs", "topk_logprobs", "teacher_topk_logps")
LOG_PROBS += ("teacher_topk_log_probs", "teacher_topk_logprobs")
LOGITS = ("top_logits", "topk_logits", "teacher_topk_logits")
LOG_SUMS = ("logsumexp", "log_sum_exp", "log_sum_exp_logits", "teacher_logsumexp")
LOG_TAIL = "log_tail"
MASK = "attention_mask"
LABELS, POSITIONS, TEMPERATURE = "labels", "positions", "temperature"
ENTRIES = ("next", "own")
PROBED = 64  # rows whose own tokens are looked for
MOST = 1.05  # mass of a token's entries: of rounded log-probabilities
NO_ENTRY = -1


class TopKRow(NamedTuple):
    """Holds entries of some positions.

    ids [m, K] int64 and log_probs [m, K] float64; -1 and -inf where an entry has no probability,
    NaN where there is none. log_tail [m] float64: log of the mass of all others, or None where it
    is 1 less theirs.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    log_tail: np.ndarray | None

    def with_none(self) -> "TopKRow":
        """Return the same with a position more, of which nothing is known."""
        ids = np.pad(self.ids, [(0, 1), (0, 0)], constant_values=NO_ENTRY)
        log_probs = np.pad(self.log_probs, [(0, 1), (0, 0)], constant_values=np.nan)
        return TopKRow(
            ids, log_probs, None if self.log_tail is None else np.pad(self.log_tail, (0, 1))
        )

    def at(self, index: np.ndarray) -> "TopKRow":
        """Return the entries of the positions that an index takes."""
        tail = None if self.log_tail is None else self.log_tail[index]
        return TopKRow(self.ids[index], self.log_probs[index], tail)


class _Place(NamedTuple):
    """Says where a row is: [start, stop) of a row of the table."""

    row: int
    start: int
    stop: int


class ArrayLogProbs:
    """Reads top-k log-probabilities from columns of parquet, arrow, JSON or npz files.

    A row has `input_ids` (or `ids`), [L]; `top_ids` [n, K], also named `topk_ids`, `topk_indices`,
    `topk_token_ids`, each also with `teacher_` before it, as verl and NeMo write them; and
    `top_log_probs` [n, K] (`topk_log_probs`, `topk_logprobs`, `teacher_topk_logps`), or
    `topk_logits` [n, K] with their log-sum-exp over the whole vocabulary, `logsumexp` [n]
    (`log_sum_exp`, `log_sum_exp_logits`, `teacher_logsumexp`). As `cache export` writes them, there
    may be `log_tail` [n], the mass of the rest; `positions` [n], the token of each entry; and the
    `temperature`, which must be 1.

    With `attention_mask`, ids at 0 are padding, and each run of another number (a row of several
    that are packed) is a row of its own. Positions that `labels` ignores are not scored.

    Args:
        path: a file, a folder of .npz or of data files, or the name of a data set of the hub.
        top_k: the number of entries of each token that are kept, at least 1. There must be as many.
        name: the name of the teacher, for the manifest.
        entries: says of which token entry t is: "next" is token t + 1, as logits are, and "own" is
            token t, as in vLLM's `prompt_logprobs`. None takes the one that has more of the rows'
            own tokens among its entries, or "next" where a row has one entry less than ids.
        split: the split of a folder or a data set of the hub.

    Raises:
        ValueError: an argument is out of range, or the columns are others.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        top_k: int,
        name: str,
        *,
        entries: str | None = None,
        split: str = "train",
    ) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if entries is not None and entries not in ENTRIES:
            raise ValueError(f"entries must be one of {ENTRIES} or None, got {entries!r}")
        self.path, self.top_k, self.name = os.fspath(path), top_k, name
        self._table: Table = open_table(self.path, IDS, split)
        self._lock = threading.Lock()
        self._names = self._columns()
        self._vocab = 0
        self._places: list[_Place] = []
        self._by_hash: dict[int, int] = {}
        self._index()
        self._sha256 = self._table.sha256()
        self.entries = self._aligned() if entries is None else entries

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    def _columns(self) -> dict[str, str]:
        """Return the table's names of the columns that are read."""
        known = {"ids": IDS, "top_ids": TOP_IDS, "log_probs": LOG_PROBS, "logits": LOGITS}
        known |= {"log_sums": LOG_SUMS, "log_tail": (LOG_TAIL,)}
        found = self._named(known)
        if "log_probs" not in found and "logits" in found and "log_sums" not in found:
            raise ValueError(
                f"{self.path}: logits need their log-sum-exp over the whole vocabulary, without "
                f"which the mass of the rest is not known: a column that is one of {LOG_SUMS}"
            )
        missing = [x for x in ("ids", "top_ids") if x not in found]
        missing += [] if {"log_probs", "logits"} & found.keys() else ["log_probs"]
        if missing:
            raise ValueError(
                f"{self.path} must have a column that is one of {known[missing[0]]}, got "
                f"{sorted(self._table.columns)}"
            )
        return found

    def _named(self, known: Mapping[str, Sequence[str]]) -> dict[str, str]:
        known = {**known, "mask": (MASK,), "labels": (LABELS,), "positions": (POSITIONS,)}
        columns = set(self._table.columns)
        pairs = {
            name: next((x for x in names if x in columns), "") for name, names in known.items()
        }
        return {name: column for name, column in pairs.items() if column}

    def _value(self, row: int, name: str) -> np.ndarray:
        with self._lock:  # one file is open at a time
            return np.asarray(self._table.value(row, self._names[name]))

    def _index(self) -> None:
        """Find every row, by its ids."""
        for row in tqdm(range(len(self._table)), desc="index", unit="row"):
            ids = self._value(row, "ids").astype(np.int64)
            mask = self._value(row, "mask") if "mask" in self._names else np.ones(len(ids))
            if len(mask) != len(ids):
                raise ValueError(f"{self.path}, row {row}: attention_mask must have {len(ids)} "
                                 f"values, as ids, got {len(mask)}")  # fmt: skip
            edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
            for start, stop in pairwise(edges):
                if stop > start and mask[start]:
                    self._by_hash[fingerprints.row_hash(ids[start:stop].tolist())] = len(self)
                    self._places.append(_Place(row, start, stop))

    def _read(self, row: int) -> TopKRow:
        """Return all entries of a row of the table."""
        if TEMPERATURE in self._table.columns:
            with self._lock:
                said = float(self._table.value(row, TEMPERATURE))
            self._check(row, said == 1.0, f"log-probabilities at temperature 1, got {said:g}")
        ids = self._value(row, "top_ids").astype(np.int64)
        name = "log_probs" if "log_probs" in self._names else "logits"
        values = self._value(row, name).astype(np.float64)
        tail = None
        if name == "logits":
            sums = self._value(row, "log_sums").astype(np.float64)
            self._check(row, len(sums) == len(values), f"one log-sum-exp for each of {len(values)} "
                        f"entries, got {len(sums)}")  # fmt: skip
            values = values - sums[:, None]
        if "log_tail" in self._names:
            tail = self._value(row, "log_tail").astype(np.float64)
        self._check(row, ids.ndim == 2 and ids.shape == values.shape, "top ids and their "
                    f"log-probabilities [n, K], got {ids.shape} and {values.shape}")  # fmt: skip
        return TopKRow(ids, values, tail)

    def _check(self, row: int, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{self.path}, row {row}: there must be {rule}")

    def _of(self, number: int, entries: str | None = None) -> tuple[TopKRow, np.ndarray]:
        """Return what is known at positions 1, 2, ... of a row [m], and where it is [m] bool."""
        place = self._places[number]
        found = self._read(place.row)
        length, count = len(self._value(place.row, "ids")), len(found.ids)
        if "positions" in self._names:
            index = self._indexed(place.row, length, count)
            found = found.with_none()
        else:
            self._check(place.row, count in (length, length - 1),
                        f"{length} entries, as ids, or one less, got {count}")  # fmt: skip
            is_own = (entries or self.entries) == "own" and count == length
            index = np.arange(length) - (0 if is_own else 1)
        kept = found.at(index[place.start + 1 : place.stop])
        is_entry = (kept.ids >= 0) & (kept.log_probs > -np.inf)
        return kept, np.asarray(is_entry.any(-1))

    def _indexed(self, row: int, length: int, count: int) -> np.ndarray:
        """Return the entry of each token [L], by the column `positions`; -1 for none."""
        positions = self._value(row, "positions").astype(np.int64)
        fits = len(positions) == count and ((positions > 0) & (positions < length)).all()
        self._check(row, bool(fits), f"{count} positions in [1, {length}), one for each entry, got "
                    f"{positions.tolist()[:8]}")  # fmt: skip
        index = np.full(length, -1)
        index[positions] = np.arange(count)
        return index

    def _aligned(self) -> str:
        """Find out which token an entry is of, and say why."""
        if "positions" in self._names:
            return "own"
        tokens, hits = 0, dict.fromkeys(ENTRIES, 0)
        for number in range(min(PROBED, len(self))):
            own = np.array(self.ids(number), np.int64)[1:, None]
            tokens += len(own)
            for name in ENTRIES:
                hits[name] += int((self._of(number, name)[0].ids == own).any(-1).sum())
        chosen = max(ENTRIES, key=hits.__getitem__)
        logger.info(
            "%s: entry t is of the %s token, as %d of %d tokens are among the entries before them "
            "and %d among those at their place",
            self.path, chosen, hits["next"], tokens, hits["own"],
        )  # fmt: skip
        return chosen

    @property
    def rows(self) -> "LogProbRows":
        """Return the rows as data: `input_ids`, and `labels` where something is known."""
        return LogProbRows(self)

    def ids(self, number: int) -> list[int]:
        """Return the ids of a row."""
        place = self._places[number]
        return self._value(place.row, "ids")[place.start : place.stop].astype(np.int64).tolist()

    def labels(self, number: int) -> list[int]:
        """Return the ids of a row, -100 where nothing is known of them or labels ignore them."""
        place, ids = self._places[number], np.array(self.ids(number), np.int64)
        scored = np.zeros(len(ids), bool)
        scored[1:] = self._of(number)[1]
        if "labels" in self._names:
            scored &= self._value(place.row, "labels")[place.start : place.stop] != IGNORE_INDEX
        return np.where(scored, ids, IGNORE_INDEX).tolist()

    def identity(self) -> dict[str, Any]:
        """Return the sha256 of all files: data that have changed are another teacher."""
        return {"answers_sha256": self._sha256, "entries": self.entries}

    def start(self, vocab: int) -> None:
        """Keep the vocabulary, below which ids must be."""
        self._vocab = vocab

    def top_log_probs(self, ids: Sequence[int]) -> list[TopK | None]:
        """Return the most probable tokens at positions 1 to len(ids) - 1; None where unknown.

        Raises:
            ValueError: see `top_columns`.
        """
        known = np.flatnonzero(self._of(self._find(ids))[1])
        found = self.top_columns(ids, known + 1)
        answer: list[TopK | None] = [None] * (len(ids) - 1)
        for at, own, values in zip(known, found.ids, found.log_probs, strict=True):
            answer[at] = dict(zip(own.tolist(), values.tolist(), strict=True))
        return answer

    def _find(self, ids: Sequence[int]) -> int:
        number = self._by_hash.get(fingerprints.row_hash(ids))
        if number is None:
            raise ValueError(f"{self.path} has no row of {len(ids)} tokens that begin "
                             f"{list(ids[:8])}")  # fmt: skip
        return number

    def top_columns(self, ids: Sequence[int], positions: np.ndarray) -> TopKRow:
        """Return the top_k most probable tokens at some positions of a whole row, descending.

        Args:
            ids: of the row.
            positions: [m] int, at least 1.

        Raises:
            ValueError: there is no such row, nothing is known of a position, or its entries are not
                log-probabilities of top_k tokens of the vocabulary.
        """
        number = self._find(ids)
        found, known = self._of(number)
        at = np.asarray(positions, np.int64) - 1
        where = f"{self.path}, row {self._places[number].row}"
        if not known[at].all():
            missing = int(at[~known[at]][0]) + 1
            raise ValueError(f"{where}: position {missing} has no log-probabilities, and must not "
                             "be scored")  # fmt: skip
        try:
            return best(found.at(at), self.top_k, self._vocab)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def best(found: TopKRow, top_k: int, vocab: int) -> TopKRow:
    """Return the top_k most probable entries of each position, checked, descending.

    Raises:
        ValueError: they are not log-probabilities of top_k tokens of the vocabulary.
    """
    none = found.log_probs == -np.inf
    ids = np.where(none, NO_ENTRY, found.ids)
    absent = np.isnan(found.log_probs)
    fewest = int((~absent).sum(-1).min(initial=found.ids.shape[1]))
    if fewest < top_k:
        raise ValueError(f"each token must have {top_k} entries, got {fewest}")
    held = ids[~none & ~absent]
    if len(held) and not 0 <= held.min() <= held.max() < vocab:
        raise ValueError(f"ids must be in [0, {vocab}), got {held.min()} to {held.max()}")
    sorted_ids = np.sort(np.where(none | absent, NO_ENTRY, ids), axis=-1)
    twice = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
    if twice.any():
        raise ValueError(f"a token's ids must differ, got {sorted_ids[:, 1:][twice][0]} twice")
    log_probs = np.where(absent, -np.inf, found.log_probs)
    if (log_probs > MASS_TOLERANCE).any():
        raise ValueError(
            f"a log-probability must not be positive, got {log_probs.max():g}: are these logits?"
        )
    mass = np.exp(log_probs).sum(-1)
    if (mass > MOST).any():
        raise ValueError(f"the probabilities must not sum to more than 1, got {mass.max():g}")
    order = np.argsort(-log_probs, axis=-1, kind="stable")
    ids, log_probs = (np.take_along_axis(x, order, -1) for x in (ids, np.minimum(log_probs, 0.0)))
    tail = found.log_tail
    if tail is not None:
        with np.errstate(divide="ignore"):  # there may be no rest
            tail = np.log(np.exp(tail) + np.exp(log_probs[:, top_k:]).sum(-1))
    return TopKRow(ids[:, :top_k], log_probs[:, :top_k], tail)


class LogProbRows:
    """Gives the rows of recorded log-probabilities as data: `input_ids`, and `labels` where known.

    Args:
        source: the log-probabilities.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._source)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """Return a row."""
        if not 0 <= number < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {number}")
        return {"input_ids": self._source.ids(number), "labels": self._source.labels(number)}
