"""cache_teacher: what it stores is what a live teacher says; what it refuses; how it goes on."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill import DistillConfig, Hint, HintCollator, ModelTeacher, SelfTeacher
from hf_distill.cache import (
    CacheReader,
    Full,
    HeadSamples,
    TopK,
    cache_teacher,
    fingerprints,
    writer,
)
from hf_distill.cache.datasets import TokenCollator
from hf_distill.losses import chunks
from tests.hf_distill.cache import caches
from tests.hf_distill.cache.caches import ROWS, SHARD_ROWS, collator
from tests.hf_distill.trainers import models

VOCAB = len(models.WORDS)  # of the tokenizer; the models have some logits more
NEAR = {"rtol": 0, "atol": 1e-2}  # float16 down to -16; the rows' values differ by whole nats


def read(path: Path, asked: Any, codec: Any = caches.EXACT) -> Tensor:
    """What the cache says of a side's scored tokens."""
    found, rows = CacheReader(path), []
    for wanted in fingerprints.side_rows(asked):
        row, at = found.match(wanted)
        decoded = codec.decode([row.arrays], [len(row.positions)], models.VOCAB)
        rows.append(decoded[torch.from_numpy(at)])
    return torch.cat(rows)


def assert_is_live(path: Path, model: Any, collate: Any, data: Sequence[Any], real: int) -> None:
    asked = caches.side(collate, data)
    expected = caches.live(model, asked, real)
    assert len(expected) == int(asked.predicts.sum()) > 3
    torch.testing.assert_close(read(path, asked)[:, :real], expected[:, :real], **NEAR)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "phi"])
def test_the_cache_says_what_the_teacher_says(tmp_path: Path, family: str) -> None:
    """Scaled, capped and biased heads, learnt positions; padded on either side when it is read."""
    model, data = models.FAMILIES[family](), models.rows(9, ignored=1)
    caches.write(tmp_path, model, dataset=data, data_collator=models.Pad("left", 30))
    for collate in (models.Pad("right"), models.Pad("left"), models.Pad("left", 30)):
        assert_is_live(tmp_path, model, collate, data[::-1], models.VOCAB)


def test_a_hinted_teacher_is_cached(tmp_path: Path) -> None:
    model, data = models.llama(), models.problems(ROWS)
    hinted = collator(hint=[Hint("hint"), Hint("Hint : {hint}", where="system")])
    caches.write(tmp_path, model, data_collator=hinted)
    assert_is_live(tmp_path, model, hinted, data, VOCAB)
    said = read(tmp_path, caches.side(hinted, data))
    bare = caches.live(model, caches.side(collator(), data), VOCAB)
    assert (said[:, :VOCAB] - bare[:, :VOCAB]).abs().max() > 1  # the hints are heard


def test_padding_of_the_vocabulary_gets_nothing(tmp_path: Path) -> None:
    manifest = caches.write(tmp_path)
    assert manifest.config["logits"] == {"logit_dim": models.VOCAB, "real_vocab": VOCAB}
    said = read(tmp_path, caches.side(collator(), models.problems(ROWS)))
    assert said.shape[1] == models.VOCAB
    assert (said[:, VOCAB:] < -80).all()
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(len(said)), rtol=0, atol=5e-3)


@pytest.mark.parametrize("entries", [models.VOCAB, 4 * models.VOCAB, 10**6])
def test_chunks_do_not_change_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    """Of one row each, of some rows, of whole batches."""
    seen = []
    encode = Full.encode

    def watched(self: Full, logits: Tensor, *rest: Any) -> Any:
        seen.append(len(logits))
        return encode(self, logits, *rest)

    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(Full, "encode", watched)
    model = models.llama()
    caches.write(tmp_path, model)
    assert_is_live(tmp_path, model, collator(), models.problems(ROWS), VOCAB)
    longest = 6  # "The answer is 2 . <|im_end|>"
    assert max(seen) <= max(longest, entries // models.VOCAB)
    assert (max(seen) > longest) == (entries == 10**6)


def test_rows_without_scored_tokens(tmp_path: Path) -> None:
    data = models.rows(6)
    for i in (0, 3, 4):
        data[i]["labels"] = [-100] * len(data[i]["labels"])
    manifest = caches.write(tmp_path, dataset=data, data_collator=TokenCollator(), shard_rows=2)
    found = CacheReader(tmp_path)
    stored = [len(found.row(i).positions) for i in range(6)]
    assert [n == 0 for n in stored] == [i in (0, 3, 4) for i in range(6)]
    assert manifest.stats["tokens"] == sum(stored)
    asked = caches.side(TokenCollator(), data)
    assert len(read(tmp_path, asked)) == int(asked.predicts.sum())


def test_no_row_has_a_scored_token(tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6], "labels": [-100, -100]}] * 3
    manifest = caches.write(tmp_path, dataset=data, data_collator=TokenCollator(), shard_rows=2)
    assert manifest.stats["tokens"] == 0
    assert CacheReader(tmp_path, "full").row(2).arrays["full_fp16"].tolist() == []


def test_the_batch_size_does_not_change_draws(tmp_path: Path) -> None:
    """Only roundings of the teacher could; which entries are drawn is the row's own chance."""
    rows = []
    for size in (1, 5):
        path = tmp_path / str(size)
        caches.write(path, codec=HeadSamples(top_k=2, num_samples=3), batch_size=size)
        found = CacheReader(path)
        rows.append([found.row(i).arrays for i in range(ROWS)])
    names = [name for name in rows[0][0] if name.startswith("draw") and "low" in name]
    assert names
    for one, other in zip(*rows, strict=True):
        for name in names:
            assert (one[name] == other[name]).all()


def test_another_seed_draws_others(tmp_path: Path) -> None:
    written = []
    for seed in (0, 0, 1):
        path = tmp_path / str(len(written))
        caches.write(path, codec=HeadSamples(top_k=2, num_samples=3), seed=seed)
        written.append(caches.contents(path))
    assert written[0] == written[1]
    assert all(written[0][name] != written[2][name] for name in written[0])


def test_every_row_has_its_own_draws(tmp_path: Path) -> None:
    """Equal rows tell, at the same place of other shards too."""
    data = models.problems(1) * 6
    caches.write(tmp_path, dataset=data, codec=HeadSamples(top_k=2, num_samples=3), shard_rows=2)
    found = CacheReader(tmp_path)
    draws = [found.row(i).arrays["draw_low"].tolist() for i in range(6)]
    assert len(set(map(tuple, draws))) == 6


def test_the_model_is_afterwards_as_it_was(tmp_path: Path) -> None:
    model = models.llama(attention_dropout=0.5).train()
    caches.write(tmp_path, model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert_is_live(tmp_path, model.eval(), collator(), models.problems(ROWS), VOCAB)


def test_a_teacher_by_name_or_object(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its own tokenizer and a collator by the columns: the bytes of the model's cache."""
    models.llama().save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    data = models.problems(ROWS)
    for path, given in (("name", name), ("teacher", ModelTeacher(name))):
        tokenizer = None if path == "name" else models.tokenizer()
        with caplog.at_level(logging.INFO):
            made = cache_teacher(
                given,
                data,
                tmp_path / path,
                codec="full",
                processing_class=tokenizer,
                shard_rows=SHARD_ROWS,
                batch_size=3,
            )
        assert made.config["teacher"]["name_or_path"] == name
        assert made.config["tokenizer"] is not None
    assert f"codec full {{'format': 'fp16'}}, {VOCAB} of {models.VOCAB} logits" in caplog.text
    assert "21 rows in 6 shards of 4, 6 shards to write" in caplog.text
    caches.write(tmp_path / "model-cache")
    expected = [x[-500:] for x in caches.contents(tmp_path / "model-cache").values()]
    for path in ("name", "teacher"):  # the headers differ: they name the configuration
        assert [x[-500:] for x in caches.contents(tmp_path / path).values()] == expected


def test_the_default_codec_and_shards(tmp_path: Path) -> None:
    made = caches.write(tmp_path, codec=None, shard_rows=None)
    assert made.config["codec"]["name"] == "head_samples"
    assert made.config["shard_rows"] == 16  # 16 shards of few rows would be smaller
    assert made.stats["mean_entropy"] == pytest.approx(3.5, abs=0.3)
    assert 0 < made.stats["mean_tail_mass"] < 1
    assert made.stats["bytes_per_token"] * made.stats["tokens"] == made.stats["bytes"]


def test_rows_of_a_shard_are_chosen_by_their_size() -> None:
    data = [{"input_ids": list(range(3, 36))}] * 200_000  # 32 tokens
    for bytes_per_token, rows in ((200.0, 4096), (600.0, 2048), (300_000.0, 4), (1e9, 1)):
        assert writer._shard_rows(data, TokenCollator(), bytes_per_token) == rows
    assert writer._shard_rows(data[:1000], TokenCollator(), 1.0) == 32
    encoder: Any = SimpleNamespace(codec=Full(), width=1000, real_vocab=900)
    assert writer._nominal_bytes(encoder) == 1800


def broken_teacher() -> Any:
    model = models.llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, got 0"),
        ({"verify": "lazy"}, r"verify must be one of .* got 'lazy'"),
        ({"dataset": []}, "at least one row, got none"),
        ({"dataset": iter([])}, "must give rows by number, got a list_iterator"),
        ({"path": "s3://bucket/cache"}, "written to this machine .* got 's3://bucket/cache'"),
        ({"codec": "none"}, "codec must be one of .* got 'none'"),
        ({"model": SelfTeacher()}, "must be a model, a name or a ModelTeacher.* got a SelfTeacher"),
        ({"model": torch.nn.Linear(2, 2)}, "the number of logits of a Linear must be known"),
        ({"model": broken_teacher()}, r"rows \[.*\] of the data: "),
        (
            {"dataset": [{"input_ids": [5, VOCAB]}], "data_collator": None},
            f"row 0 of the data: ids must be below {VOCAB}, .* got {VOCAB}",
        ),
        ({"data_collator": None, "dataset": [{"text": "no"}]}, "rows must have columns"),
    ],
)
def test_what_cannot_be_cached(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = {"path": tmp_path / "cache", "processing_class": models.tokenizer()} | changes
    with pytest.raises(ValueError, match=message):
        caches.write(**given)
    assert not list(tmp_path.rglob("shard-*"))


def test_sidecars_say_who_wrote(tmp_path: Path) -> None:
    caches.write(tmp_path)
    content = json.loads((tmp_path / "shards/shard-00005.json").read_text())
    assert content["rows"] == [20, 21]
    written = content["written_by"]
    assert (written["rank"], written["world"], written["batch_size"]) == (0, 1, 3)
    assert written["torch"] == str(torch.__version__)


def test_stats_are_those_of_the_arrays(tmp_path: Path) -> None:
    made = caches.write(tmp_path, codec=TopK(top_k=3))
    found = CacheReader(tmp_path)
    rows = [found.row(i).arrays for i in range(ROWS)]
    entropy = np.concatenate([row["entropy"] for row in rows]).astype(np.float64)
    tail = np.exp(np.concatenate([row["log_tail"] for row in rows]).astype(np.float64))
    assert made.stats["mean_entropy"] == pytest.approx(entropy.mean(), rel=1e-9)
    assert made.stats["mean_tail_mass"] == pytest.approx(tail.mean(), rel=1e-9)
    assert len(tail) == made.stats["tokens"]


def test_the_tokenizer_of_a_collator_counts(tmp_path: Path) -> None:
    made = caches.write(tmp_path, data_collator=HintCollator(models.tokenizer(), "hint"))
    assert made.config["tokenizer"]["num_ids"] == VOCAB
    bare = caches.write(tmp_path / "x", dataset=models.rows(3), data_collator=TokenCollator())
    assert bare.config["tokenizer"] is None
    assert bare.config["logits"]["real_vocab"] == models.VOCAB


def test_a_config_of_the_trainer_can_follow(tmp_path: Path) -> None:
    """The state that the writer leaves behind does not stand in a Trainer's way."""
    caches.write(tmp_path)
    args = DistillConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    assert args.device.type == "cpu"
