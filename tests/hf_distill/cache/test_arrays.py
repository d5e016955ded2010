"""Arrays in every format, with every name, are the log-probabilities that they hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_distill.cache import ArrayLogProbs, CachedTeacher, cache_log_probs
from hf_distill.cache.datasets import TokenCollator
from tests.hf_distill.trainers import models

K, TOP_K = 5, 4
LENGTHS = (6, 9, 7)
Rows = list[dict[str, Any]]


def made() -> Rows:
    """Rows whose tokens are among the teacher's entries: entry t is of token t + 1, [L, K]."""
    rng = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        logits = rng.normal(0, 2, (length, models.VOCAB))
        log_probs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
        top_ids = np.argsort(-log_probs, -1)[:, :K]
        values = np.take_along_axis(log_probs, top_ids, -1)
        ids = [3, *(int(top[i % K]) for i, top in enumerate(top_ids[:-1]))]
        rows.append(
            {"input_ids": ids, "top_ids": top_ids.tolist(), "top_log_probs": values.tolist()}
        )
    return rows


ROWS = made()


def renamed(rows: Rows, **names: str) -> Rows:
    return [{names.get(k, k): v for k, v in row.items()} for row in rows]


def as_logits(row: dict[str, Any]) -> dict[str, Any]:
    sums = np.arange(len(row["input_ids"])) / 3
    logits = np.array(row["top_log_probs"]) + sums[:, None]
    rest = {k: v for k, v in row.items() if k != "top_log_probs"}
    return rest | {"topk_logits": logits.tolist(), "logsumexp": sums.tolist()}


def shifted(row: dict[str, Any]) -> dict[str, Any]:
    """Entry t is of token t, and the first token's is null."""
    return row | {x: [None, *row[x][:-1]] for x in ("top_ids", "top_log_probs")}


def cut(row: dict[str, Any]) -> dict[str, Any]:
    return row | {x: row[x][:-1] for x in ("top_ids", "top_log_probs")}


def unsorted(row: dict[str, Any]) -> dict[str, Any]:
    return row | {x: [y[::-1] for y in row[x]] for x in ("top_ids", "top_log_probs")}


def write(path: Path, rows: Rows) -> Path:
    """Write rows in the format that a path's suffix names; of a folder, each to an .npz."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".npz":
        width = max(len(row["input_ids"]) for row in rows)
        padded: dict[str, Any] = {"attention_mask": [[1] * len(x["input_ids"]) for x in rows]}
        padded |= {name: [row[name] for row in rows] for name in rows[0]}
        np.savez(path, **{k: np.stack([fill(x, width) for x in v]) for k, v in padded.items()})
    else:
        path.mkdir()
        for i, row in enumerate(rows):
            np.savez(path / f"{i}.npz", **{k: np.array(v) for k, v in row.items()})
    return path


def fill(values: Any, width: int) -> np.ndarray:
    array = np.array(values)
    return np.pad(array, [(0, width - len(array))] + [(0, 0)] * (array.ndim - 1))


def assert_same(source: ArrayLogProbs, rows: Rows = ROWS) -> None:
    source.start(models.VOCAB)
    assert len(source) == len(source.rows) == len(rows)
    for i, row in enumerate(rows):
        ids = row["input_ids"]
        assert source.rows[i] == {"input_ids": ids, "labels": [-100, *ids[1:]]}
        found = source.top_columns(ids, np.arange(1, len(ids)))
        assert found.ids.tolist() == [x[:TOP_K] for x in row["top_ids"][: len(ids) - 1]]
        wanted = np.array([x[:TOP_K] for x in row["top_log_probs"][: len(ids) - 1]])
        np.testing.assert_allclose(found.log_probs, wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.npz", "folder"])
def test_formats(tmp_path: Path, name: str) -> None:
    assert_same(ArrayLogProbs(write(tmp_path / name, ROWS), TOP_K, "a model"))


VERL = {"top_ids": "teacher_topk_indices", "top_log_probs": "teacher_topk_logps"}
NAMES: dict[str, Rows] = {
    "verl": renamed(ROWS, **VERL),
    "short": renamed(ROWS, input_ids="ids", top_ids="topk_ids", top_log_probs="topk_logprobs"),
    "NeMo": renamed([as_logits(row) for row in ROWS], top_ids="topk_indices"),
    "the first token's are null": [shifted(row) for row in ROWS],
    "one entry less": [cut(row) for row in ROWS],
    "unsorted": [unsorted(row) for row in ROWS],
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_places(tmp_path: Path, name: str) -> None:
    assert_same(ArrayLogProbs(write(tmp_path / "rows.jsonl", NAMES[name]), TOP_K, "a model"))


def test_where_entries_are_of_is_found_or_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [shifted(row) for row in ROWS])
    with caplog.at_level("INFO", "hf_distill"):
        assert ArrayLogProbs(path, TOP_K, "a model").entries == "own"
    assert "entry t is of the own token, as" in caplog.text
    said = ArrayLogProbs(path, TOP_K, "a model", entries="next")
    assert said.identity()["entries"] == "next"
    said.start(models.VOCAB)
    assert said.rows[0]["labels"][1] == -100  # the null is then of the second token
    ids = ROWS[0]["input_ids"]
    assert said.top_columns(ids, np.array([2])).ids.tolist() == [ROWS[0]["top_ids"][0][:TOP_K]]
    with pytest.raises(ValueError, match="position 1 has no log-probabilities"):
        said.top_columns(ids, np.array([1, 2]))


def test_packed_rows_are_cut_at_their_masks(tmp_path: Path) -> None:
    names = ("input_ids", "top_ids", "top_log_probs")
    padding = {name: [ROWS[0][name][0]] * 2 for name in names}
    joined: dict[str, Any] = {x: [*ROWS[0][x], *ROWS[1][x], *padding[x]] for x in names}
    joined["attention_mask"] = [1] * LENGTHS[0] + [2] * LENGTHS[1] + [0] * 2
    path = write(tmp_path / "rows.jsonl", [joined, ROWS[2] | {"attention_mask": [1] * LENGTHS[2]}])
    assert_same(ArrayLogProbs(path, TOP_K, "a model"))


def test_labels_say_what_is_scored_and_the_cache_holds_it(tmp_path: Path) -> None:
    rows = [row | {"labels": [-100] * 3 + row["input_ids"][3:]} for row in ROWS]
    source = ArrayLogProbs(write(tmp_path / "rows.parquet", rows), TOP_K, "a model")
    assert [source.rows[i]["labels"] for i in range(3)] == [row["labels"] for row in rows]
    manifest = cache_log_probs(source, source.rows, tmp_path / "cache", vocab_size=models.VOCAB)
    assert manifest.config["teacher"]["answers_sha256"] == source.identity()["answers_sha256"]
    found = CachedTeacher(tmp_path / "cache").columns(TokenCollator()(rows))
    for i, row in enumerate(rows):
        count = len(row["input_ids"]) - 3
        assert found["ids"][i, :count].tolist() == [x[:TOP_K] for x in row["top_ids"][2:-1]]
        values = np.array(row["top_log_probs"])[2:-1, :TOP_K]
        # of 16 bits, and head and tail are divided by their sum
        np.testing.assert_allclose(found["log_probs"][i, :count], values, atol=4e-3)
        rest = np.log(1 - np.exp(values).sum(-1))
        np.testing.assert_allclose(found["log_tail"][i, :count], rest, atol=8e-3)


def changed(name: str, *value: Any) -> Rows:
    row = {k: list(v) for k, v in ROWS[0].items()}
    row[name] = value[0] if value else row.pop(name) and None
    return [{k: v for k, v in row.items() if v is not None}]


LOGITS = [[x + 9 for x in each] for each in ROWS[0]["top_log_probs"]]
SURE = [[-0.1] * K for _ in ROWS[0]["top_log_probs"]]
TWICE = [[5, *each[1:-1], 5] for each in ROWS[0]["top_ids"]]
WRONG: list[tuple[Rows, str]] = [
    (changed("input_ids"), r"must have a column that is one of \('input_ids', 'ids'"),
    (changed("top_ids"), r"must have a column that is one of \('top_ids', 'topk_ids'"),
    (changed("top_log_probs"), r"must have a column that is one of \('top_log_probs'"),
    (renamed(changed("top_log_probs", LOGITS), top_log_probs="topk_logits"), "need their log-sum"),
    (changed("top_log_probs", LOGITS), "row 0: a log-probability must not be positive, got"),
    (changed("top_log_probs", SURE), "must not sum to more than 1, got 4.5"),
    (changed("top_log_probs", SURE[:-1]), r"top ids and their log-probabilities \[n, K\], got"),
    (changed("top_ids", TWICE), "a token's ids must differ, got 5 twice"),
    (changed("top_ids", [[61] * K] * 6), r"ids must be in \[0, 61\), got 61"),
    (changed("attention_mask", [1]), "attention_mask must have 6 values, as ids, got 1"),
    ([cut(cut(ROWS[0]))], "there must be 6 entries, as ids, or one less, got 4"),
]


@pytest.mark.parametrize(("rows", "words"), WRONG)
def test_arrays_that_are_wrong(tmp_path: Path, rows: Rows, words: str) -> None:
    path = write(tmp_path / "rows.jsonl", rows)

    def read() -> None:
        source = ArrayLogProbs(path, TOP_K, "a model")
        source.start(models.VOCAB)
        source.top_columns(ROWS[0]["input_ids"], np.array([1, 2]))

    with pytest.raises(ValueError, match=words):
        read()


def test_lists_of_other_lengths(tmp_path: Path) -> None:
    """vLLM's k or k + 1: more than top_k are cut, fewer are an error."""
    row = {k: list(v) for k, v in ROWS[0].items()}
    for name in ("top_ids", "top_log_probs"):
        row[name][1] = row[name][1][:TOP_K]
    source = ArrayLogProbs(write(tmp_path / "rows.jsonl", [row, *ROWS[1:]]), TOP_K, "a model")
    assert_same(source)
    wider = ArrayLogProbs(tmp_path / "rows.jsonl", K, "a model")
    wider.start(models.VOCAB)
    assert wider.top_columns(row["input_ids"], np.array([1])).ids.shape == (1, K)
    with pytest.raises(ValueError, match="row 0: each token must have 5 entries, got 4"):
        wider.top_columns(row["input_ids"], np.array([1, 2]))


def test_positions_say_which_tokens_entries_are_of(tmp_path: Path) -> None:
    """As cache export writes them."""
    row, at = ROWS[1], [2, 5, 6]
    scored = {name: [row[name][x - 1] for x in at] for name in ("top_ids", "top_log_probs")}
    given = {"input_ids": row["input_ids"], "positions": at, "temperature": 1.0}
    source = ArrayLogProbs(write(tmp_path / "rows.jsonl", [given | scored]), TOP_K, "a model")
    source.start(models.VOCAB)
    ids = row["input_ids"]
    labels = [token if i in at else -100 for i, token in enumerate(ids)]
    assert source.rows[0]["labels"] == labels
    found = source.top_columns(ids, np.array([5, 2]))
    assert found.ids.tolist() == [row["top_ids"][x][:TOP_K] for x in (4, 1)]
    with pytest.raises(ValueError, match="position 3 has no log-probabilities"):
        source.top_columns(ids, np.array([3]))
    for name, value, words in (
        ("positions", [2, 5], r"3 positions in \[1, 9\), one for each entry, got \[2, 5\]"),
        ("positions", [0, 2, 5], r"3 positions in \[1, 9\)"),
        ("temperature", 2.0, "log-probabilities at temperature 1, got 2"),
    ):
        path = write(tmp_path / f"{words[:5]}.jsonl", [given | scored | {name: value}])
        wrong = ArrayLogProbs(path, TOP_K, "a model")
        with pytest.raises(ValueError, match=f"row 0: there must be {words}"):
            wrong.top_columns(ids, np.array([2]))


def test_arguments_and_files_that_are_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        ArrayLogProbs(path, 0, "a model")
    with pytest.raises(ValueError, match=r"entries must be one of .* or None, got 'all'"):
        ArrayLogProbs(path, 1, "a model", entries="all")
    np.savez(tmp_path / "objects.npz", input_ids=np.array([None, {}], object))
    with pytest.raises(ValueError, match=r"objects\.npz must be an \.npz of numbers"):
        ArrayLogProbs(tmp_path / "objects.npz", 1, "a model")
    np.savez(tmp_path / "other.npz", tokens=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz must have an array \[T\] or \[R, T\]"):
        ArrayLogProbs(tmp_path / "other.npz", 1, "a model")
    several = tmp_path / "several"
    several.mkdir()
    for i, more in enumerate(({}, {"labels": np.zeros(3)})):
        np.savez(several / f"{i}.npz", input_ids=np.arange(3), **more)
    with pytest.raises(ValueError, match=r"all files must have the arrays \['input_ids'\] of"):
        ArrayLogProbs(several, 1, "a model")
    source = ArrayLogProbs(path, TOP_K, "a model")
    with pytest.raises(ValueError, match=r"no row of 2 tokens that begin \[1, 2\]"):
        source.top_columns([1, 2], np.array([1]))
    with pytest.raises(IndexError, match=r"row must be in \[0, 3\), got 3"):
        source.rows[3]
