"""What `cache inspect` says: it is small for the teacher that was cached, and not for another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import HintCollator
from hf_distill.__main__ import main
from hf_distill.cache import (
    CachedTeacher,
    CacheReader,
    Codec,
    Full,
    HeadSamples,
    RowMismatch,
    TopK,
    cache_teacher,
)
from hf_distill.cache.inspect import describe, measure
from tests.hf_distill.trainers import models

ROUNDED = 4e-3  # log-probabilities of about -4 in 16 bits
CODECS = {
    "topk": (TopK(top_k=8, num_exact=8, temperature_range=(1.0, 2.0)), ROUNDED, 1e-3),
    "head_samples": (HeadSamples(top_k=8), ROUNDED, 1e-3),
    "full": (Full("fp16"), ROUNDED, 1e-4),
}


def cached(path: Path, codec: Codec, **changes: Any) -> CachedTeacher:
    given = {"data_collator": models.Pad(), "shard_rows": 4} | changes
    cache_teacher(models.llama(1), models.rows(), path, codec=codec, **given)
    return CachedTeacher(path)


@pytest.mark.parametrize("name", CODECS)
def test_the_teacher_itself_is_close(tmp_path: Path, name: str) -> None:
    codec, rounding, floor = CODECS[name]
    teacher = cached(tmp_path, codec)
    found = measure(teacher, models.llama(1), models.rows(), models.Pad(), 5)
    other = measure(teacher, models.llama(2), models.rows(), models.Pad(), 5)
    chosen = [models.rows()[i * 16 // 5] for i in range(5)]
    assert found["tokens"] == sum(sum(x >= 0 for x in row["labels"][1:]) for row in chosen)
    assert found["log_prob_error"] < rounding < 0.1 < other["log_prob_error"]
    losses = [key for key in found if key.startswith("forward_kl")]
    ends = {1.0} if name == "full" else set(codec.temperature_range)
    assert losses == [f"forward_kl_{x:g}" for x in sorted(ends)]
    for key in losses:
        assert abs(found[key]) < floor < 0.01 < other[key]
    assert ("log_tail_error" in found) == (name != "full")
    assert found.get("log_tail_error", 0.0) < 5e-3


def test_errors_are_the_largest_and_losses_the_mean_of_evenly_spread_rows(tmp_path: Path) -> None:
    teacher, count = cached(tmp_path, TopK(top_k=models.VOCAB, num_exact=models.VOCAB)), 6
    found = measure(teacher, models.llama(2), models.rows(), models.Pad(), count)
    apart, losses = [], []
    for row in (models.rows()[i * 16 // count] for i in range(count)):
        with torch.no_grad():
            ids = torch.tensor([row["input_ids"]])
            scored = torch.tensor(row["labels"][1:]) >= 0
            one, other = (
                models.llama(seed)(input_ids=ids).logits[0, :-1][scored].log_softmax(-1)
                for seed in (1, 2)
            )
        apart.append(float((one - other).abs().max()))
        losses.append((one.exp() * (one - other)).sum(-1))
    assert found["tokens"] == len(torch.cat(losses))
    assert found["log_prob_error"] == pytest.approx(max(apart), abs=0.01)
    assert found["forward_kl_1"] == pytest.approx(float(torch.cat(losses).mean()), rel=5e-3)


def test_the_padding_of_a_vocabulary_is_no_error(tmp_path: Path) -> None:
    collator, rows = HintCollator(models.tokenizer()), models.problems()
    for codec in (Full("fp16"), HeadSamples(top_k=8)):
        path = tmp_path / codec.name
        cache_teacher(models.llama(1), rows, path, codec=codec, data_collator=collator)
        found = measure(CachedTeacher(path), models.llama(1), rows, collator, 4)
        assert found["log_prob_error"] < ROUNDED
        assert abs(found["forward_kl_1"]) < 1e-3


def test_other_rows_are_not_measured(tmp_path: Path) -> None:
    teacher = cached(tmp_path, TopK(top_k=8))
    with pytest.raises(RowMismatch):
        measure(teacher, models.llama(1), models.rows(seed=5), models.Pad(), 2)
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        measure(teacher, models.llama(1), models.rows(), models.Pad(), 0)


def test_what_is_in_it(tmp_path: Path) -> None:
    cached(tmp_path, HeadSamples(top_k=8, num_samples=4))
    lines = dict(line.split(maxsplit=1) for line in describe(CacheReader(tmp_path)))
    assert lines["codec"].startswith("head_samples {")
    assert "'top_k': 8" in lines["codec"]
    assert lines["data"].startswith("16 rows")
    assert lines["shards"] == "4 of up to 4 rows"
    assert lines["vocabulary"] == "61 of 61 logits"
    assert 0 < float(lines["bytes/token"]) < 400


def test_the_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.llama().save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in models.problems(10)))
    where = [str(tmp_path / "model"), str(rows), str(tmp_path / "cache")]
    assert main(["cache", "write", *where, "--codec", "topk", "--hint", "Hint : {hint}"]) == 0
    more = ["--dataset", str(rows), "--sample", "3", "--hint", "Hint : {hint}"]
    capsys.readouterr()
    assert main(["cache", "inspect", str(tmp_path / "cache"), *more]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {line[0]: line[1] for line in lines if len(line) == 2}
    assert float(printed["log_prob_error"]) < 0.05  # the coarse part of 50 entries
    assert abs(float(printed["forward_kl_1"])) < 5e-3
    assert main(["cache", "inspect", str(tmp_path / "cache"), *more[:-2]]) == 1  # no hint
