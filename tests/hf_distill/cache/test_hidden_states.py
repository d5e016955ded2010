"""Caches of hidden states: training from them is training from the teacher, at every loss."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.__main__ import main
from hf_distill.cache import (
    CacheCorrupt,
    CachedTeacher,
    CacheIncomplete,
    HiddenStates,
    cache_teacher,
)
from hf_distill.cache.inspect import describe, measure
from hf_distill.cache.reader import CacheReader
from hf_distill.data.sides import Side, predicts_from_labels
from hf_distill.models.signals import Signal
from tests import processes
from tests.hf_distill.cache import caches
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

FAST = ("gemma2", "phi")  # softcap, bias
FAMILIES = [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in models.FAMILIES]

FILES = ("head.safetensors", "row_hashes.bin", "config.json")


def cached(folder: Path, model: nn.Module, codec: HiddenStates, **changes: Any) -> CachedTeacher:
    given: dict[str, Any] = {"data_collator": models.Pad(), "batch_size": 3, "shard_rows": 4}
    cache_teacher(model, models.rows(), folder, codec=codec, **given | changes)
    return CachedTeacher(folder)


def a_side() -> Side:
    batch = models.Pad()([models.rows()[i] for i in (9, 2, 2, 13)])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return Side(inputs, predicts_from_labels(batch["labels"]))


@torch.no_grad()
def live(model: nn.Module, side: Side) -> Tensor:
    return model(**side.inputs).logits[side.predicts].log_softmax(-1)


def apart(signal: Signal, model: nn.Module) -> float:
    wanted = live(model, a_side())
    return float((signal.dense().log_softmax(-1) - wanted).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_the_teacher_says(tmp_path: Path, family: str) -> None:
    """Scales, softcaps and biases behind the head are in it."""
    model, other = models.FAMILIES[family](1), models.FAMILIES[family](2)
    for codec, most in ((HiddenStates(), 0.02), (HiddenStates("int8"), 0.05)):
        teacher = cached(tmp_path / codec.format, model, codec)
        signal = teacher.signal(model, a_side())
        assert teacher.dense
        assert signal.logits is None  # no [tokens, vocab]: the fused path
        assert apart(signal, model) < most < 0.2 < apart(signal, other)


def test_a_teacher_in_bfloat16_loses_nothing(tmp_path: Path) -> None:
    """Against the hidden states that the writer's own forward gives, a row at a time."""
    model = models.llama(1).bfloat16()
    teacher = cached(tmp_path, model, HiddenStates(), batch_size=1)
    for row in models.rows()[:4]:
        batch = models.Pad()([row])
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        side = Side(inputs, predicts_from_labels(batch["labels"]))
        said = teacher.signal(model, side)
        ids = batch["input_ids"][:, :-1]  # the last token predicts nothing
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[side.predicts[:, :-1]]
        assert torch.equal(said.hidden, hidden)
        assert torch.equal(said.head.weight, model.lm_head.weight)


def run(folder: Path, taught_by: Any, **changes: Any) -> list[float]:
    config = DistillConfig(**models.options(folder, **changes))
    trainer = DistillTrainer(models.llama(), config, models.Pad(), models.rows(), teacher=taught_by)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> CachedTeacher:
    return cached(tmp_path_factory.mktemp("cache"), models.llama(1), HiddenStates("int8"))


LOSSES: dict[str, dict[str, Any]] = {
    "reverse kl": {"divergence": "reverse_kl", "temperature": 3.0},
    "the student's top k": {"divergence": "reverse_kl", "support": "student_topk", "top_k": 5},
    "uld": {"divergence": "uld", "temperature": 1.0},
    "taid": {"divergence": "forward_kl", "taid": {"t_start": 0.4}},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_from_hidden_states_is_the_run_with_the_teacher(
    tmp_path: Path, teacher: CachedTeacher, name: str
) -> None:
    found = run(tmp_path, teacher, **LOSSES[name])
    assert found == pytest.approx(run(tmp_path, models.llama(1), **LOSSES[name]), rel=5e-3)


def test_no_logits_of_the_teacher_are_formed(
    tmp_path: Path, teacher: CachedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError("logits of the whole vocabulary")

    monkeypatch.setattr(Signal, "dense", refuse)
    run(tmp_path, teacher, divergence="jsd", max_steps=1)


def test_workers_carry_hidden_states_and_no_head(tmp_path: Path, teacher: CachedTeacher) -> None:
    side = a_side()
    read = teacher.signal(models.llama(), side)
    again = pickle.loads(pickle.dumps(teacher))
    assert len(pickle.dumps(teacher)) < 8000 < read.head.weight.nbytes + 4000
    rows = [models.rows()[i] for i in (9, 2, 2, 13)]
    columns = again.columns(models.Pad()(rows))
    assert columns["hidden"].shape[:1] == (4,)
    carried = again.signal(models.llama(), side._replace(stored=columns))
    assert torch.equal(carried.hidden, read.hidden)
    alone = run(tmp_path, teacher, train_sampling_strategy="random")
    assert run(tmp_path, again, train_sampling_strategy="random") == alone


def test_eight_bits_serve_units_of_all_sizes(tmp_path: Path) -> None:
    """Some units are a hundred times as large as the others, and the head's weights as small."""
    model = models.llama(1)
    plain = apart(
        cached(tmp_path / "a", model, HiddenStates("int8")).signal(model, a_side()), model
    )
    with torch.no_grad():
        for unit in (3, 17):
            model.model.norm.weight[unit] *= 100
            model.lm_head.weight[:, unit] /= 100
    other = apart(
        cached(tmp_path / "b", model, HiddenStates("int8")).signal(model, a_side()), model
    )
    assert other < 4 * plain < 0.3


def low_rank(model: nn.Module, rank: int) -> nn.Module:
    """A head whose rows differ in some directions only, about a row that all have in common."""
    with torch.no_grad():
        weight: Tensor = model.lm_head.weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank] + 3 * v[-1])
    return model


def test_the_leading_directions_of_the_head_suffice_where_it_has_no_others(tmp_path: Path) -> None:
    model = low_rank(models.llama(1), 9)
    exact = cached(tmp_path / "9", model, HiddenStates(rank=9))
    signal = exact.signal(model, a_side())
    assert signal.hidden.shape[1] == 9
    assert apart(signal, model) < 0.03
    fewer = cached(tmp_path / "8", model, HiddenStates(rank=8))
    assert apart(fewer.signal(model, a_side()), model) > 0.1
    full = cached(tmp_path / "32", model, HiddenStates())
    sizes = [x.manifest.stats["bytes"] for x in (exact, full)]
    assert sizes[0] < 0.55 * sizes[1]


@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.slow), 12])
def test_what_is_interrupted_goes_on_with_the_same_bytes(tmp_path: Path, rank: int | None) -> None:
    model, codec = models.llama(1), HiddenStates("int8", rank)
    cached(tmp_path / "straight", model, codec)
    cache = tmp_path / "cache"
    shutil.copytree(tmp_path / "straight", cache)
    for name in ("manifest.json", "shards/shard-00001.json", "shards/shard-00003.safetensors"):
        (cache / name).unlink()
    kept = (cache / "head.safetensors").stat().st_mtime_ns
    cached(cache, model, codec)
    assert (cache / "head.safetensors").stat().st_mtime_ns == kept
    assert caches.contents(cache) == caches.contents(tmp_path / "straight")
    for name in FILES:
        assert (cache / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def _write_as_a_rank(cache: Path) -> None:
    cached(cache, models.llama(1), HiddenStates("int8", 12))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_use_one_basis(tmp_path: Path) -> None:
    processes.run(2, tmp_path / "ranks", _write_as_a_rank, tmp_path / "two")
    cached(tmp_path / "one", models.llama(1), HiddenStates("int8", 12))
    assert caches.contents(tmp_path / "two") == caches.contents(tmp_path / "one")
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    sidecars = (tmp_path / "two").glob("shards/*.json")
    assert {json.loads(x.read_bytes())["written_by"]["rank"] for x in sidecars} == {0, 1}


def test_a_lost_head_is_written_again_but_not_a_lost_basis(tmp_path: Path) -> None:
    model = models.llama(1)
    cached(tmp_path / "a", model, HiddenStates())
    before = (tmp_path / "a/head.safetensors").read_bytes()
    (tmp_path / "a/head.safetensors").unlink()
    with pytest.raises((CacheCorrupt, CacheIncomplete), match=r"head\.safetensors"):
        CachedTeacher(tmp_path / "a", verify="full")
    cached(tmp_path / "a", model, HiddenStates())
    assert (tmp_path / "a/head.safetensors").read_bytes() == before
    for name, codec in (("basis", HiddenStates(rank=7)), ("sizes", HiddenStates("int8"))):
        cached(tmp_path / name, model, codec)
        (tmp_path / name / "head.json").unlink()
        with pytest.raises(CacheCorrupt, match=f"its shards are of the {name} that was in it"):
            cached(tmp_path / name, model, codec)
        found = cached(tmp_path / name, model, codec, overwrite=True)
        assert found.signal(model, a_side()).hidden.shape[1] == (codec.rank or 32)


def test_a_damaged_head_is_found_where_it_is_read(tmp_path: Path) -> None:
    model = models.llama(1)
    cached(tmp_path, model, HiddenStates())
    path = tmp_path / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CacheCorrupt, match=r"head\.safetensors: sha256 must be"):
        CacheReader(tmp_path, "full")
    teacher = CachedTeacher(tmp_path)
    with pytest.raises(CacheCorrupt, match=r"head\.safetensors: sha256 must be"):
        teacher.signal(model, a_side())
    path.write_bytes(content[:200])
    with pytest.raises(CacheCorrupt, match=r"head\.safetensors"):
        CachedTeacher(tmp_path, verify="size").signal(model, a_side())


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank must be less than the teacher's 32 hidden"):
        cached(tmp_path, models.llama(1), HiddenStates(rank=32))
    by_logits = models.lora(models.llama(1), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"is read by its logits: the head is a peft .*full"):
        cached(tmp_path, by_logits, HiddenStates())
    assert not list(tmp_path.glob("shards/*"))


def test_it_is_measured_and_described(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    models.llama(1).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) + "\n" for row in models.problems(6)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    where = [str(tmp_path / name) for name in ("model", "rows.jsonl", "cache")]
    more = ["--codec", "hidden_states", "--codec_settings", '{"format": "int8"}']
    with caplog.at_level(logging.INFO, "hf_distill"):
        assert main(["cache", "write", *where, *more]) == 0
    assert "the teacher's head in head.safetensors" in caplog.text
    assert main(["cache", "inspect", where[2], "--dataset", where[1], "--sample", "3"]) == 0
    printed = dict(x.split(maxsplit=1) for x in capsys.readouterr().out.splitlines() if " " in x)
    assert printed["head"].startswith("32 of 32 hidden units, float32, ")
    assert float(printed["log_prob_error"]) < 0.05
    assert abs(float(printed["forward_kl_1"])) < 1e-3
    assert 36 < float(printed["bytes/token"]) < 80
    found = measure(
        CachedTeacher(tmp_path / "cache"), models.llama(2), models.problems(6), caches.collator(), 3
    )
    assert found["log_prob_error"] > 0.2
    assert any(line.startswith("codec") for line in describe(CacheReader(tmp_path / "cache")))
