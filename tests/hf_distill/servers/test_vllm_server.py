"""A teacher on a real vLLM server says what Transformers says, live and from a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    RemoteTeacher,
    RemoteTeacherError,
    cache_teacher,
)
from hf_distill.cache import TopK, cache_log_probs
from hf_distill.data.sides import Side
from tests.hf_distill.servers import recorded, starting, texts, venvs
from tests.hf_distill.teachers.asking import prepared
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.real_engine("vllm")

MAX_MODEL_LEN = 256
MAX_LOGPROBS = 20
# The two run sums of up to 1536 products in float32 in orders of their own, in 30 layers: 1.05e-4
# over 941 tokens
APART = 2e-4
FAR = 0.5  # another position's log-probability, at least


@pytest.fixture(scope="module")
def url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = {"max_model_len": MAX_MODEL_LEN, "max_logprobs": MAX_LOGPROBS}
    with starting.vllm_server(smollm2, tmp_path_factory.mktemp("server"), **options) as url:
        yield url


@pytest.fixture
def remote(url: str) -> Iterator[RemoteTeacher]:
    teacher = RemoteTeacher(url, starting.NAME, MAX_LOGPROBS, num_threads=4)
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def local(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def student(local: Any) -> Any:
    """A small one with the vocabulary of the real model."""
    size = local.config.vocab_size
    return models.llama(vocab_size=size, max_position_embeddings=MAX_MODEL_LEN)


def batch(rows: list[dict[str, Any]]) -> Side:
    inputs = models.Pad()(rows)
    predicts = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    predicts[:, :-1] = inputs.pop("labels")[:, 1:] != -100
    return Side(inputs, predicts)


@torch.no_grad()
def log_probs(model: Any, side: Side) -> Tensor:
    """[scored tokens, vocab]"""
    return model(**side.inputs).logits[side.predicts].log_softmax(-1)


def test_log_probs_are_those_of_transformers(
    smollm2: Path, remote: RemoteTeacher, local: Any
) -> None:
    side = batch(texts.rows(smollm2))
    want = log_probs(local, side)
    got = prepared(remote, student(local)).signal(student(local), side).sparse
    assert got.ids.shape == (sum(texts.LENGTHS) - len(texts.LENGTHS), MAX_LOGPROBS)
    best = want.topk(MAX_LOGPROBS)
    torch.testing.assert_close(got.log_probs, best.values, rtol=0, atol=APART)
    torch.testing.assert_close(got.log_probs, want.gather(-1, got.ids), rtol=0, atol=APART)
    rest = want.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(got.log_tail.exp(), rest.exp(), rtol=0, atol=APART)
    elsewhere = want.roll(1, 0).gather(-1, got.ids)
    assert (got.log_probs - elsewhere).abs().mean() > FAR


def test_a_row_of_the_whole_length(smollm2: Path, remote: RemoteTeacher, local: Any) -> None:
    """Its last position comes from the token that the server generates."""
    remote.start(local.config.vocab_size)
    ids = texts.ids(smollm2)[:MAX_MODEL_LEN]
    got = remote.top_log_probs(ids)
    with torch.no_grad():
        want = local(input_ids=torch.tensor([ids])).logits[0, -2].log_softmax(-1)
    assert len(got) == MAX_MODEL_LEN - 1
    last = torch.tensor(list(got[-1].values()))
    torch.testing.assert_close(last, want.topk(MAX_LOGPROBS).values, rtol=0, atol=APART)


def test_equal_requests_get_equal_answers(smollm2: Path, remote: RemoteTeacher) -> None:
    remote.start(49152)
    ids = texts.rows(smollm2)[2]["input_ids"]
    assert remote.top_log_probs(ids) == remote.top_log_probs(ids)


def losses(teacher: Any, local: Any, rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """Of three steps of a small student, and of an evaluation after them."""
    options = models.options(folder, temperature=1.0, alpha=1.0)
    args = DistillConfig(**options)
    trainer = DistillTrainer(student(local), args, models.Pad(), rows, rows, teacher=teacher)
    trainer.train()
    steps = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return [*steps, trainer.evaluate()["eval_loss"]]


def test_training_through_it_is_that_from_caches(
    smollm2: Path, remote: RemoteTeacher, local: Any, tmp_path: Path
) -> None:
    """Of the server's log-probabilities, and of the model's own; and not that of another's."""
    rows = texts.rows(smollm2)
    given: dict[str, Any] = {"data_collator": models.Pad()}
    size = local.config.vocab_size
    cache_log_probs(remote, rows, tmp_path / "server", vocab_size=size, **given)
    cache_teacher(local, rows, tmp_path / "own", codec=TopK(top_k=MAX_LOGPROBS), **given)
    other = student(local)
    cache_teacher(other, rows, tmp_path / "other", codec=TopK(top_k=MAX_LOGPROBS), **given)
    live = losses(remote, local, rows, tmp_path)
    server = losses(CachedTeacher(tmp_path / "server"), local, rows, tmp_path)
    own = losses(CachedTeacher(tmp_path / "own"), local, rows, tmp_path)
    # both caches have rounded to 16 and 8 bits, hardly ever to another step
    assert server == pytest.approx(own, rel=1e-4)
    assert server == pytest.approx(live, rel=5e-3)
    another = losses(CachedTeacher(tmp_path / "other"), local, rows, tmp_path)
    assert min(abs(x - y) / y for x, y in zip(another, own, strict=True)) > 0.1


@pytest.mark.parametrize(
    ("row", "top_k", "words"),
    [
        ([5] * (MAX_MODEL_LEN + 1), 2, f"{MAX_MODEL_LEN + 1} tokens is longer than the server"),
        ([5, 49152, 6], 2, "Token id 49152 is out of vocabulary"),
        ([5, 6, 7], 21, "logprobs of 21, .* max allowed: 20 .*must allow --max-logprobs 21"),
    ],
    ids=["too long", "out of vocabulary", "too many entries"],
)
def test_what_the_server_refuses(url: str, row: list[int], top_k: int, words: str) -> None:
    teacher = RemoteTeacher(url, starting.NAME, top_k)
    with pytest.raises(RemoteTeacherError, match=words):
        teacher.top_log_probs(row)
    teacher.close()


def test_another_name_is_refused(url: str) -> None:
    teacher = RemoteTeacher(url, "other", 2)
    with pytest.raises(RemoteTeacherError, match="other"):
        teacher.start(49152)
    teacher.close()


def test_it_answers_as_was_recorded(url: str) -> None:
    """A new version of vLLM that answers otherwise is to be recorded, and the stand-in to follow.

    `python -m tests.hf_distill.servers.recorded` writes the file.
    """
    about, answers = recorded.read()
    package, version = venvs.ENGINES["vllm"].name_and_version
    assert about["server"] == f"{package} {version}"
    differ = []
    for name, want in answers.items():
        got = recorded.ask(url, recorded.REAL, name)
        if name == "generated":  # the token is drawn
            equal = recorded.form(got.content) == recorded.form(want.content)
        else:
            equal = recorded.same(got.content, want.content, APART)
        if got.status != want.status or not equal:
            differ.append(f"{name}: {got} for {want}")
        elif got.status == 200 and name in recorded.CASES:
            differ += recorded.faults(recorded.CASES[name](recorded.REAL), got.content)
    assert differ == []
