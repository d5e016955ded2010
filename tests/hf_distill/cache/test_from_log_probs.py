"""Caches of a server's log-probabilities are those of the model behind it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.cache import (
    CacheConfigMismatch,
    CachedTeacher,
    CacheReader,
    RecordedLogProbs,
    TopK,
    cache_log_probs,
    cache_teacher,
)
from hf_distill.cache.fingerprints import SideRow
from tests.hf_distill.teachers.conftest import Ask, remote, server
from tests.hf_distill.trainers import models

__all__ = ["remote", "server"]  # fixtures

TOP_K = 6
GIVEN: dict[str, Any] = {"data_collator": models.Pad(), "shard_rows": 4}
Change = Callable[[dict[str, Any]], None]


@torch.no_grad()
def answer(ids: list[int]) -> list[dict[int, float] | None]:
    """What vLLM says of a row: the most probable tokens, and the row's own."""
    log_probs = models.llama(1)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found: list[dict[int, float] | None] = [None]
    for own, each in zip(ids[1:], log_probs, strict=False):
        values, best = each.topk(TOP_K)
        found.append(
            {own: each[own].item()} | dict(zip(best.tolist(), values.tolist(), strict=True))
        )
    return found


def vllm(ids: list[int]) -> dict[str, Any]:
    entries = [
        None if x is None else {str(k): {"logprob": v} for k, v in x.items()} for x in answer(ids)
    ]
    return {"prompt_token_ids": ids, "prompt_logprobs": entries}


def openai(ids: list[int]) -> dict[str, Any]:
    entries = [
        None if x is None else {f"token_id:{k}": v for k, v in x.items()} for x in answer(ids)
    ]
    return {"input_ids": ids, "logprobs": {"top_logprobs": entries}}


def recorded(path: Path, write: Any = vllm, change: Change | None = None) -> RecordedLogProbs:
    lines = [write(row["input_ids"]) for row in models.rows()]
    if change is not None:
        change(lines[3])
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return RecordedLogProbs(path, TOP_K, "a model")


def columns(path: Path) -> dict[str, torch.Tensor]:
    """All that a cache says of the rows."""
    return CachedTeacher(path).columns(models.Pad()(models.rows()))


@pytest.mark.parametrize("write", [vllm, openai])
def test_recorded_answers_are_the_models(tmp_path: Path, write: Any) -> None:
    cache_teacher(
        models.llama(1), models.rows(), tmp_path / "own", codec=TopK(top_k=TOP_K), **GIVEN
    )
    source = recorded(tmp_path / "answers.jsonl", write)
    manifest = cache_log_probs(source, models.rows(), tmp_path / "known", vocab_size=61, **GIVEN)
    assert manifest.config["teacher"]["name_or_path"] == "a model"
    own, known = (columns(tmp_path / x) for x in ("own", "known"))
    said = torch.cat([known["log_probs"], known["log_tail"][..., None]], -1)[0, 0]
    entropy = CacheReader(tmp_path / "known").row(0).arrays["entropy"][0]
    assert entropy == pytest.approx(-float((said.exp() * said).sum()), rel=5e-3)
    assert own.keys() - known.keys() <= {"powers.log_sums", "powers.num_tail"}
    assert torch.equal(own["ids"], known["ids"])
    torch.testing.assert_close(own["log_probs"], known["log_probs"], atol=2e-3, rtol=0)
    torch.testing.assert_close(own["log_tail"], known["log_tail"], atol=4e-3, rtol=0)


def test_a_server_is_cached_and_not_asked_again(tmp_path: Path, server: Any, remote: Ask) -> None:
    source = recorded(tmp_path / "answers.jsonl")
    cache_log_probs(source, models.rows(), tmp_path / "one", vocab_size=61, **GIVEN)
    teacher = remote(TOP_K)
    asked: list[Any] = []
    original = teacher.top_log_probs
    teacher.top_log_probs = lambda ids: asked.append(ids) or original(ids)  # type: ignore[method-assign]
    cache_log_probs(teacher, models.rows(), tmp_path / "two", vocab_size=61, **GIVEN)
    assert len(asked) == len(models.rows()) + 2  # and the check at the start
    one, two = (columns(tmp_path / x) for x in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=0)
    shard = sorted((tmp_path / "two" / "shards").glob("*.json"))[1]
    shard.unlink()
    asked.clear()
    cache_log_probs(teacher, models.rows(), tmp_path / "two", vocab_size=61, **GIVEN)
    assert len(asked) == 4 + 2


def test_a_run_from_it_is_the_run_with_the_server(tmp_path: Path, remote: Ask) -> None:
    cache_log_probs(remote(TOP_K), models.rows(), tmp_path / "cache", vocab_size=61, **GIVEN)
    found = []
    for teacher in (remote(TOP_K), CachedTeacher(tmp_path / "cache")):
        args = DistillConfig(**models.options(tmp_path, temperature=1.0, alpha=1.0))
        run = DistillTrainer(models.llama(), args, models.Pad(), models.rows(), teacher=teacher)
        run.train()
        found.append([x["loss"] for x in run.state.log_history if "loss" in x])
    assert found[0] == pytest.approx(found[1], rel=5e-3)


def test_impossible_tokens_are_not_entries(tmp_path: Path) -> None:
    """vLLM writes -9999 where it means minus infinity."""

    def few(line: dict[str, Any]) -> None:
        values = [-0.5, math.log(1 - math.exp(-0.5)), *[-9999.0] * (TOP_K - 2)]
        line["prompt_logprobs"][4] = {str(9 - i): {"logprob": x} for i, x in enumerate(values)}

    source, cache = recorded(tmp_path / "answers.jsonl", change=few), tmp_path / "cache"
    cache_log_probs(source, models.rows(), cache, vocab_size=61, **GIVEN)
    row = models.rows()[3]
    found = CachedTeacher(cache).columns(models.Pad()([row]))
    at = 4 - next(i for i, x in enumerate(row["labels"]) if i and x >= 0)
    assert found["ids"][0, at].tolist() == [9, 8, *[-1] * (TOP_K - 2)]
    total = found["log_probs"][0, at, :2].exp().sum() + found["log_tail"][0, at].exp()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_other_answers_are_another_cache(tmp_path: Path) -> None:
    def surer(line: dict[str, Any]) -> None:
        line["prompt_logprobs"][1] = {str(i): {"logprob": -3.0 - i} for i in range(TOP_K)}

    file, cache = tmp_path / "answers.jsonl", tmp_path / "cache"
    cache_log_probs(recorded(file), models.rows(), cache, vocab_size=61, **GIVEN)
    cache_log_probs(recorded(file), models.rows(), cache, vocab_size=61, **GIVEN)
    with pytest.raises(CacheConfigMismatch, match=r"teacher\.answers_sha256"):
        cache_log_probs(recorded(file, change=surer), models.rows(), cache, vocab_size=61, **GIVEN)


def without_a_position(line: dict[str, Any]) -> None:
    line["prompt_logprobs"].pop()


def too_few(line: dict[str, Any]) -> None:
    entries = line["prompt_logprobs"][2]
    line["prompt_logprobs"][2] = dict(list(entries.items())[: TOP_K - 1])


def too_little(line: dict[str, Any]) -> None:
    values = [-3.0, *[-30.0] * (TOP_K - 1)]  # and 55 more of at most -30
    line["prompt_logprobs"][1] = {str(i): {"logprob": x} for i, x in enumerate(values)}


def too_much(line: dict[str, Any]) -> None:
    line["prompt_logprobs"][1] = {str(i): {"logprob": -0.1} for i in range(TOP_K)}


def beyond(line: dict[str, Any]) -> None:
    line["prompt_logprobs"][1]["61"] = {"logprob": -9.0}


def other_ids(line: dict[str, Any]) -> None:
    line["prompt_token_ids"] = [1, 2, 3, 4]


def no_number(line: dict[str, Any]) -> None:
    line["prompt_logprobs"][1] = {"5": "much"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_position, "line 4: there must be 11 positions, as ids, got 10"),
        (too_few, "line 4, position 2: each token must have 6 entries, got 5"),
        (
            too_little,
            "entries and the rest, none of it more probable, must have the mass 1, got 0.0",
        ),
        (too_much, "position 1: the probabilities must not sum to more than 1"),
        (beyond, r"ids must be in \[0, 61\)"),
        (other_ids, "line 4: there must be 4 positions, as ids, got 11"),
        (no_number, "line 4, position 1: .*TypeError"),
    ],
)
def test_answers_that_are_wrong(tmp_path: Path, change: Change, words: str) -> None:
    def caches() -> None:
        source = recorded(tmp_path / "answers.jsonl", change=change)
        cache_log_probs(source, models.rows(), tmp_path / "cache", vocab_size=61, **GIVEN)

    with pytest.raises(ValueError, match=words):
        caches()


def test_what_cannot_be_known(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        RecordedLogProbs(path, 0, "a model")
    source = recorded(path)
    with pytest.raises(ValueError, match="give vocab_size or a tokenizer"):
        cache_log_probs(source, models.rows(), tmp_path / "cache", **GIVEN)
    with pytest.raises(ValueError, match="at most the vocabulary 5, got 6"):
        cache_log_probs(source, models.rows(), tmp_path / "cache", vocab_size=5, **GIVEN)


def test_rows_are_found_by_their_ids(tmp_path: Path) -> None:
    source = recorded(tmp_path / "answers.jsonl")
    source.start(61)
    row = SideRow(models.rows()[7]["input_ids"], torch.arange(0).numpy())
    found = source.top_log_probs(row.ids)
    assert [max(x, key=x.__getitem__) for x in found] == [
        max(x, key=x.__getitem__) for x in answer(row.ids) if x is not None
    ]
