"""python -m hf_distill cache export: the values that a reader gives, and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_distill.__main__ import main
from hf_distill.cache import (
    CachedTeacher,
    Full,
    HeadSamples,
    HiddenStates,
    Sampled,
    TopK,
    cache_teacher,
    export,
)
from hf_distill.cache.columns import named_columns
from hf_distill.cache.datasets import TokenCollator
from tests.hf_distill.cache import caches
from tests.hf_distill.trainers import models

ROWS = models.rows(7)[::-1]  # in which heads of other sizes lie in one shard
CODECS = {
    "topk": TopK(top_k=6),
    "topp": TopK(top_k=6, top_p=0.2),  # heads of 2 to 6
    "head_samples": HeadSamples(top_k=4, num_samples=5),
    "sampled": Sampled(num_samples=9),
    "full": Full(),
    "hidden": HiddenStates(),
    "int8": HiddenStates("int8"),
    "rank": HiddenStates("int8", rank=8),
}


HIDDEN = ("hidden", "int8", "rank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of all codecs, and their rows."""
    made = tmp_path_factory.mktemp("caches")
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = models.llama()
    for name, codec in CODECS.items():
        given: dict[str, Any] = {"codec": codec, "data_collator": TokenCollator(), "shard_rows": 3}
        cache_teacher(model, ROWS, made / name, **given)
    return made


def exports(folder: Path, name: str, to: Path, *more: str) -> int:
    return main(["cache", "export", str(folder / name), "--to", str(to), *more])


def with_rows(folder: Path) -> list[str]:
    return ["--dataset", str(folder / "rows.jsonl")]


def values_of(folder: Path, name: str, number: int) -> dict[str, np.ndarray]:
    """What a reader gives of a row, by the exporter's names."""
    teacher = CachedTeacher(folder / name)
    row = teacher.reader.row(number)
    if name in HIDDEN:
        device = torch.device("cpu")
        hidden = teacher._signal(teacher.decoded([row]), device).hidden  # that losses are given
        assert hidden is not None
        assert hidden.shape[1] == (8 if name == "rank" else models.SIZES["hidden_size"])
        return {"coordinates" if name == "rank" else "hidden": hidden.float().numpy()}
    found = teacher.codec.decode([row.arrays], [len(row.positions)], models.VOCAB)
    if isinstance(found, torch.Tensor):
        return {"log_probs": found.numpy()}
    columns = {export.NAMES[k]: x.numpy() for k, x in named_columns(found)}
    return {k: x for k, x in columns.items() if x.size or not k.startswith("top")}


@pytest.mark.parametrize("name", CODECS)
def test_values_are_those_of_a_reader(folder: Path, tmp_path: Path, name: str) -> None:
    to = tmp_path / "out.parquet"
    assert exports(folder, name, to, *with_rows(folder)) == 0
    table = pq.read_table(to)
    about = json.loads(table.schema.metadata[b"hf_distill"])
    assert about["codec"] == CachedTeacher(folder / name).manifest.config["codec"]
    made = {"row", "row_hash", "input_ids", "labels", "positions", "temperature"}
    made |= set() if name in ("full", *HIDDEN) else {"entropy"}
    assert set(table.column_names) == made | set(values_of(folder, name, 0))
    assert [x["row"] for x in table.to_pylist()] == list(range(len(ROWS)))
    for i, row in enumerate(table.to_pylist()):
        stored = CachedTeacher(folder / name).reader.row(i)
        assert row["row_hash"] == stored.row_hash
        assert row["positions"] == stored.positions.tolist()
        assert row["input_ids"] == ROWS[i]["input_ids"]
        scored = [-100, *ROWS[i]["labels"][1:]]
        assert row["labels"] == scored
        if "entropy" in row:
            np.testing.assert_array_equal(np.float16(row["entropy"]), stored.arrays["entropy"])
        for column, wanted in values_of(folder, name, i).items():
            np.testing.assert_array_equal(np.array(row[column], wanted.dtype), wanted)


@pytest.mark.parametrize("name", ["topk", "topp", "head_samples"])
def test_an_export_is_imported_as_the_same_teacher(folder: Path, tmp_path: Path, name: str) -> None:
    to, top_k = tmp_path / "out.parquet", 4
    assert exports(folder, name, to, *with_rows(folder)) == 0
    given = ["--out", str(tmp_path / "back"), "--top_k", str(top_k), "--vocab_size", "61"]
    assert main(["cache", "import", "arrays", str(to), *given]) == 0
    one, other = (
        CachedTeacher(x).columns(TokenCollator()(ROWS)) for x in (folder / name, tmp_path / "back")
    )
    assert torch.equal(one["ids"][..., :top_k], other["ids"])
    known = other["ids"] >= 0
    counts = torch.arange(known.shape[1]) < other["counts"][:, None]
    assert bool(known[counts].all()) == (name != "topp")
    apart = (one["log_probs"][..., :top_k] - other["log_probs"])[known]
    assert float(apart.abs().max()) < 6e-3  # 16 bits, and sums that are 1 again
    for columns in (one, other):
        width = columns["log_probs"].shape[-1]
        rest = columns["log_probs"][..., top_k:].exp().sum(-1) if width > top_k else 0
        columns["rest"] = columns["log_tail"].exp() + rest
    torch.testing.assert_close(one["rest"], other["rest"], atol=3e-3, rtol=0)


def test_without_the_data_there_are_no_ids(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to = tmp_path / "out.parquet"
    with caplog.at_level("INFO", "hf_distill"):
        assert exports(folder, "topk", to) == 0
    assert "input_ids are left out: a cache holds hashes of rows only" in caplog.text
    table = pq.read_table(to)
    assert {"input_ids", "labels"}.isdisjoint(table.column_names)
    assert table["top_ids"].to_pylist()[2] == values_of(folder, "topk", 2)["top_ids"].tolist()


def test_an_export_that_is_interrupted_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, to = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert exports(folder, "topk", whole) == 0

    def interrupted(self: Any, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return row(self, number)

    row = export.Exporter._row
    with monkeypatch.context() as patch:
        patch.setattr(export.Exporter, "_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exports(folder, "topk", to)
    assert not to.exists()
    parts = tmp_path / "out.parquet.parts"
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert [path.name for path in kept] == ["00000.parquet"]
    made: list[int] = []
    monkeypatch.setattr(export.Exporter, "_row", lambda self, i: made.append(i) or row(self, i))
    assert exports(folder, "topk", to) == 0
    assert made == [3, 4, 5, 6]
    assert to.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_parts_of_another_cache_are_written_again(folder: Path, tmp_path: Path) -> None:
    to, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    parts.mkdir()
    other = tmp_path / "other.parquet"
    assert exports(folder, "topp", other) == 0
    (parts / "00000.parquet").write_bytes(other.read_bytes())
    (parts / "00001.parquet").write_bytes(b"torn")
    assert exports(folder, "topk", to) == 0
    assert pq.read_table(to)["row"].to_pylist() == list(range(len(ROWS)))


def test_text_is_read_as_at_the_writing(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    rows = models.problems(3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")]
    assert main(["cache", "write", *write, "--codec", "topk"]) == 0
    data = ["--dataset", str(tmp_path / "rows.jsonl")]
    assert exports(tmp_path, "cache", tmp_path / "out.parquet", *data) == 0
    wanted = caches.side(caches.collator(), rows[:1]).inputs["input_ids"][0].tolist()
    assert pq.read_table(tmp_path / "out.parquet")["input_ids"].to_pylist()[0] == wanted


def test_what_cannot_be_exported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, rows = tmp_path / "out.parquet", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    assert exports(folder, "topk", to, "--dataset", str(rows)) == 1
    assert "row 0 of the data (" in capsys.readouterr().err
    rows.write_text(json.dumps(ROWS[0]) + "\n")
    assert exports(folder, "topk", to, "--dataset", str(rows)) == 1
    assert "holds 7 rows, the data have 1" in capsys.readouterr().err
    assert not to.exists()
    assert exports(folder, "topk", to) == 0
    assert exports(folder, "topk", to) == 1
    assert "is there already: name another, or pass --overwrite" in capsys.readouterr().err
    assert exports(folder, "topp", to, "--overwrite") == 0
    assert exports(folder, "topk", to, "--hint", "x", "--overwrite") == 1
    assert "--hint is of the data that --dataset names" in capsys.readouterr().err
    shard = folder / "full/shards/shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"\xff")
    assert exports(folder, "full", tmp_path / "full.parquet") == 1
    shard.write_bytes(whole)
    assert "CacheCorrupt: " in capsys.readouterr().err
