"""A thousand damaged caches: each is refused with a `CacheError`, or reads as if it were whole."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hf_distill.cache import (
    CacheCorrupt,
    CachedTeacher,
    CacheError,
    Full,
    HeadSamples,
    HiddenStates,
    cache_teacher,
)
from hf_distill.cache.files import canonical
from hf_distill.cache.launches import LOCK
from hf_distill.cache.shard import Shard
from hf_distill.data.sides import Side, predicts_from_labels
from metal_ops import DivergenceSpec, SparseTeacher
from tests.hf_distill.trainers import models

ROUNDS, EACH = 10, 100
CODECS = (
    *(HeadSamples(top_k=8, top_p=0.9, num_samples=4), Full("int8")),
    *(HiddenStates("int8"), HiddenStates(rank=9)),
)
SIZE = len(models.WORDS)  # of the tokenizer
DATA = [
    row | {"input_ids": [x % SIZE for x in row["input_ids"]]} for row in models.rows(10, ignored=1)
]

Mutation = Callable[[Path, random.Random], None]


def side() -> Side:
    batch = models.Pad()(DATA)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return Side(inputs, predicts_from_labels(batch["labels"]))


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [x for part in value for x in flat(part)]
    return [value]


def reading(path: Path, verify: str = "lazy") -> list[Any]:
    """Everything that a run would get of every row."""
    teacher = CachedTeacher(path, verify=verify)
    teacher.check_spec(DivergenceSpec("jsd", temperature=2.0), models.tokenizer())
    teacher.prepare(cast(Any, None), models.llama(), None)
    signal = teacher.signal(cast(Any, None), side())
    if signal.head is not None:
        head = signal.head
        return [signal.hidden, head.weight, head.bias, head.logit_scale, head.softcap]
    return [signal.logits] if signal.sparse is None else flat(signal.sparse)


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """A cache of each codec, and what it says."""
    made = {}
    for number, codec in enumerate(CODECS):
        name = f"{codec.name} {number}"
        path = tmp_path_factory.mktemp("whole") / name
        given = {"data_collator": models.Pad(), "processing_class": models.tokenizer()}
        cache_teacher(models.llama(1), DATA, path, codec=codec, shard_rows=4, **given)
        made[name] = path, reading(path)
    return made


def some_file(cache: Path, rng: random.Random) -> Path:
    files = (x for x in cache.rglob("*") if x.is_file())
    return rng.choice(sorted(x for x in files if x.name != LOCK))  # which is empty


def flipped_bits(cache: Path, rng: random.Random) -> None:
    path = some_file(cache, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flipped_in_a_header(cache: Path, rng: random.Random) -> None:
    """Lengths and offsets are at the start."""
    path = rng.choice(sorted(cache.rglob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[rng.randrange(200)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncated(cache: Path, rng: random.Random) -> None:
    path = some_file(cache, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def longer(cache: Path, rng: random.Random) -> None:
    path = some_file(cache, rng)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 64)))


def zeroed_block(cache: Path, rng: random.Random) -> None:
    """A page that was never written."""
    path = some_file(cache, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    stop = min(len(content), start + 64)
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def removed(cache: Path, rng: random.Random) -> None:
    some_file(cache, rng).unlink()


def swapped(cache: Path, rng: random.Random) -> None:
    """Two shards change places, with or without their sidecars."""
    for suffix in rng.choice(((".safetensors",), (".json",), (".safetensors", ".json"))):
        one, other = rng.sample(sorted((cache / "shards").glob(f"*{suffix}")), 2)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)


def edited(value: Any, rng: random.Random) -> Any:
    """Another value, at a random place of a JSON tree."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return value | {key: edited(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], edited(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bool) or value is None:
        return rng.choice((1, "text", []))
    if isinstance(value, int | float):
        return rng.choice((value + 1, -value - 1, value * 2 + 3, "7", None, 10**30))
    return rng.choice((f"{value}x", "", 3, None))


def edited_json(cache: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(cache.rglob("*.json")))
    path.write_text(json.dumps(edited(json.loads(path.read_bytes()), rng)))


def forged_manifest(cache: Path, rng: random.Random) -> None:
    """Edited, with checksums that are right again."""
    path = cache / "manifest.json"
    content = json.loads(path.read_bytes())
    section = rng.choice(("config", "shards", "rows_digest", "stats"))
    content[section] = edited(content[section], rng)
    content["config_hash"] = hashlib.sha256(canonical(content["config"])).hexdigest()
    del content["sha256"]
    content["sha256"] = hashlib.sha256(canonical(content)).hexdigest()
    path.write_text(json.dumps(content))


MUTATIONS: tuple[Mutation, ...] = (
    flipped_bits, flipped_bits, flipped_in_a_header, truncated, longer, zeroed_block, removed,
    swapped, edited_json, forged_manifest,
)  # fmt: skip


@pytest.mark.parametrize("number", range(ROUNDS))
def test_damage_is_refused_or_harmless(
    tmp_path: Path, whole: dict[str, tuple[Path, list[Any]]], number: int
) -> None:
    rng, outcomes = random.Random(number), {"refused": 0, "harmless": 0}
    for trial in range(EACH):
        path, wanted = whole[rng.choice(sorted(whole))]
        cache = tmp_path / str(trial)
        shutil.copytree(path, cache)
        mutation = MUTATIONS[trial % len(MUTATIONS)]
        mutation(cache, rng)
        try:
            found = reading(cache, rng.choice(("lazy", "full")))
        except CacheError:
            outcomes["refused"] += 1
        else:
            assert same(found, wanted), (mutation.__name__, trial)
            outcomes["harmless"] += 1
        shutil.rmtree(cache)
    assert outcomes["refused"] > 0.7 * EACH
    # config.json is for writing, and stats are for people
    assert outcomes["harmless"] > 0


@pytest.mark.parametrize("number", range(3))
def test_without_checksums_damage_does_no_harm_to_the_process(
    tmp_path: Path, whole: dict[str, tuple[Path, list[Any]]], number: int
) -> None:
    """With verify="size" a flipped bit may change a number; it is still one that can be used."""
    rng, unnoticed = random.Random(100 + number), 0
    for trial in range(EACH):
        name = rng.choice(sorted(whole))
        path, wanted = whole[name]
        cache = tmp_path / str(trial)
        shutil.copytree(path, cache)
        (flipped_bits if trial % 2 else flipped_in_a_header)(cache, rng)
        try:
            found = reading(cache, "size")
        except CacheError:
            continue
        finally:
            shutil.rmtree(cache)
        unnoticed += not same(found, wanted)
        assert_usable(CachedTeacher(path).codec.name, found)
    assert unnoticed > 0


def assert_usable(codec: str, found: list[Any]) -> None:
    assert not any(x.isnan().any() for x in found if isinstance(x, Tensor))
    if codec in ("full", "hidden_states"):
        return
    ids, log_probs, log_tail = found[:3]
    assert len(found) > len(SparseTeacher._fields)
    assert -1 <= int(ids.min()) <= int(ids.max()) < models.VOCAB
    assert float(log_probs.max()) <= 0
    assert float(log_tail.max()) <= 0


def test_without_checksums_a_row_is_still_known_by_its_hash(
    tmp_path: Path, whole: dict[str, tuple[Path, list[Any]]]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(whole["full 1"][0], cache)
    path = cache / "shards/shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    for row_hash in Shard(path, path.name).row_hashes():
        at = content.index(row_hash.tobytes())
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorrupt, match="row 0 has changed since its hash was read"):
        reading(cache, "size")
