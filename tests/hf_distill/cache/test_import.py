"""python -m hf_distill cache import: dumps of others become caches, also after an interruption."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hf_distill.__main__ import main
from hf_distill.cache import CachedTeacher, CacheReader, commands
from hf_distill.cache.datasets import TokenCollator
from tests.hf_distill.cache import caches, test_arrays, test_distillkit, test_recorded
from tests.hf_distill.trainers import models

COUNT = 10
VOCAB = ["--vocab_size", str(models.VOCAB)]
SAID = [1, 2, 3]


def completion(number: int) -> dict[str, Any]:
    """A sampled completion behind a prompt of another length each."""
    prompt = list(range(3, 5 + number))
    tops = [{f"token_id:{x + 20}": -0.5 - x for x in SAID} for _ in SAID]
    reply = {"token_ids": [20 + x for x in SAID], "logprobs": {"top_logprobs": tops}}
    return {"choices": [{"index": 0, "prompt_token_ids": prompt, **reply}]}


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl.gz"
    lines = [json.dumps(completion(i)) + "\n" for i in range(COUNT)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


def imports(source: Path, out: Path, *more: str, kind: str = "completions") -> int:
    given = ["--out", str(out), "--top_k", "3", "--shard_rows", "2"]
    return main(["cache", "import", kind, str(source), *given, *more])


def test_completions(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    more = ["--tokenizer", str(tmp_path / "tokenizer"), "--rows", str(rows), "--name", "one"]
    assert imports(answers, tmp_path / "cache", *more, *VOCAB) == 0
    shown = capsys.readouterr().err
    assert all(f"{bar}:" in shown for bar in ("index", "rows", "cache"))
    manifest = CacheReader(tmp_path / "cache", "full").manifest
    assert (manifest.num_rows, manifest.stats["tokens"]) == (COUNT, 3 * COUNT)
    assert manifest.config["teacher"]["name_or_path"] == "one"
    assert manifest.config["tokenizer"]["name_or_path"] == str(tmp_path / "tokenizer")
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert written[4]["input_ids"] == [*range(3, 9), 21, 22, 23]
    assert written[4]["labels"] == [-100] * 6 + [21, 22, 23]
    found = CachedTeacher(tmp_path / "cache").columns(TokenCollator()(written))
    assert found["ids"].tolist() == [[[21, 22, 23]] * 3] * COUNT


def test_an_import_that_is_interrupted_goes_on(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    assert imports(answers, whole, *VOCAB) == 0

    class Interrupted(commands.RecordedLogProbs):
        def top_log_probs(self, ids: Any) -> Any:
            if len(ids) == 5 + 6:  # of row 6, in the fourth shard
                raise KeyboardInterrupt
            return super().top_log_probs(ids)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "RecordedLogProbs", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            imports(answers, cache, *VOCAB)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("shards/*.safetensors")}
    assert len(kept) == 3
    assert imports(answers, cache, *VOCAB) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert caches.contents(cache) == caches.contents(whole)


def test_arrays_and_distillkit(tmp_path: Path) -> None:
    path = test_arrays.write(tmp_path / "rows.parquet", test_arrays.ROWS)
    assert imports(path, tmp_path / "arrays", *VOCAB, "--entries", "next", kind="arrays") == 0
    assert CacheReader(tmp_path / "arrays").manifest.stats["tokens"] == 19
    curve = test_distillkit.compressed("curve")
    dump = test_distillkit.write(tmp_path / "dump", curve, test_distillkit.MADE["curve"][0])
    assert imports(dump, tmp_path / "distillkit", *VOCAB, kind="distillkit") == 0
    config = ["--config", str(dump / "compression_config.yaml")]
    alone = dump / "data_0.parquet"
    assert imports(alone, tmp_path / "file", *VOCAB, *config, kind="distillkit") == 0
    rows = [CacheReader(tmp_path / x).row(0) for x in ("distillkit", "file")]
    assert [row.positions.tolist() for row in rows] == [[1, 2, 3]] * 2
    assert rows[0].arrays["head_exact"].tolist() == rows[1].arrays["head_exact"].tolist()


def test_some_rows(answers: Path, tmp_path: Path) -> None:
    row = {"input_ids": [3, 4, 5, 6, 21, 22, 23], "labels": [-100] * 5 + [22, 23]}
    data = tmp_path / "some.jsonl"
    data.write_text(json.dumps(row) + "\n")
    assert imports(answers, tmp_path / "cache", *VOCAB, "--dataset", str(data)) == 0
    assert CacheReader(tmp_path / "cache").manifest.stats["tokens"] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "ValueError: the logits per token must be known: give --tokenizer or --vocab_size"),
        ([*VOCAB, "--config", "x"], "--config is of distillkit, not of completions"),
        ([*VOCAB, "--entries", "own"], "--entries is of arrays and distillkit, not of completions"),
        ([*VOCAB, "--source_split", "x"], "--source_split is of arrays and distillkit"),
        ([*VOCAB, "--split", "x"], "--split and --subset are of the rows that --dataset names"),
        (["--vocab_size", "22"], "row 0 of the data: ids must be below 22"),
        ([*VOCAB, "--top_k", "4"], "position 3: each token must have 4 entries, got 3"),
    ],
)
def test_what_cannot_be_imported(
    answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    assert imports(answers, tmp_path / "cache", *more) == 1
    assert words in capsys.readouterr().err


def test_text_is_refused_at_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = test_recorded.write(tmp_path / "answers.jsonl", test_recorded.TEXT)
    assert imports(path, tmp_path / "cache", *VOCAB) == 1
    assert "line 1, position 1: tokens must be ids" in capsys.readouterr().err
