"""A teacher on a server: its loss is the local one's, and what a server may get wrong is named."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    ModelTeacher,
    RoutedTeacher,
)
from hf_distill.data.sides import Side
from hf_distill.losses import DivergenceLoss, Tokens
from hf_distill.models.forward import Reader
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec
from tests.hf_distill.teachers.asking import IDS, PREDICTS, SIDE, prepared, scored_logits
from tests.hf_distill.teachers.conftest import Ask
from tests.hf_distill.teachers.serving import Server, each_entry
from tests.hf_distill.trainers import models

V = models.VOCAB
N = int(PREDICTS.sum())
TARGETS = IDS[:, 1:][PREDICTS[:, :-1]]
WEIGHTS = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])


def losses(signal: Any, spec: DivergenceSpec, alpha: float = 0.5) -> tuple[Any, Tensor]:
    """The terms of a student, and their gradient."""
    logits = scored_logits(models.llama()).requires_grad_()
    tokens = Tokens(TARGETS, WEIGHTS)
    terms = DivergenceLoss(spec, alpha)(Signal(logits=logits), signal, tokens)
    return terms, torch.autograd.grad(terms.loss, logits)[0]


MEASURED = {"soft", "hard", "student_entropy", "teacher_entropy", "top1_agreement"}
KINDS = ["forward_kl", "reverse_kl", "jsd", "tvd"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_whole_vocabulary_the_loss_is_the_local_teachers(remote: Ask, kind: str) -> None:
    student = models.llama()
    spec = DivergenceSpec(kind, 0.3)
    sparse = prepared(remote(V), student).signal(student, SIDE)
    dense = prepared(ModelTeacher(models.llama(1)), student).signal(student, SIDE)
    assert torch.equal(sparse.sparse.log_tail, torch.full((N,), -torch.inf))
    got, gradient = losses(sparse, spec)
    want, expected = losses(dense, spec)
    # roundings of log-probabilities of order 10
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    assert got.metrics.keys() == MEASURED
    for name, other in want.metrics.items():
        rtol, atol = {"soft": (1e-5, 0), "hard": (0, 0)}.get(name, (0, 1e-5))
        torch.testing.assert_close(got.metrics[name], other, rtol=rtol, atol=atol)
    assert expected.abs().max() > 1e-2


def with_tail(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log-probabilities at ids, and behind them the log of the sum of all others."""
    others = torch.ones_like(log_probs, dtype=torch.bool).scatter(-1, ids, False)
    tail = log_probs.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), tail], dim=-1)


@pytest.mark.parametrize("top_k", [1, 5, V - 1])
def test_with_a_few_entries_the_rest_is_one_category(remote: Ask, top_k: int) -> None:
    student = models.llama()
    signal = prepared(remote(top_k), student).signal(student, SIDE)
    log_q, log_p = (scored_logits(models.llama(seed)).double().log_softmax(-1) for seed in (0, 1))
    ids = log_p.topk(top_k).indices
    assert torch.equal(signal.sparse.ids, ids)
    q, p = with_tail(log_q, ids), with_tail(log_p, ids)
    assert bool((signal.sparse.log_tail <= 0).all())
    # the rest is 1 less what float32 logs below 8 say, the differences of two numbers below 4:
    # roundings of 2^-22 and twice 2^-23
    torch.testing.assert_close(
        signal.sparse.log_tail.exp().double(), p[:, -1].exp(), rtol=0, atol=5e-7
    )
    for kind, value in (("forward_kl", p.exp() * (p - q)), ("reverse_kl", q.exp() * (q - p))):
        terms, _ = losses(signal, DivergenceSpec(kind), alpha=1.0)
        atol = 1e-4 if kind == "reverse_kl" and top_k == V - 1 else 2e-6
        soft = terms.metrics["soft"].double()
        torch.testing.assert_close(soft, value.sum(-1), rtol=0, atol=atol)
        assert value.sum(-1).min() > 1e-3
    entropy = terms.metrics["teacher_entropy"].double()
    torch.testing.assert_close(entropy, -(p.exp() * p).sum(-1), rtol=0, atol=1e-5)


def test_the_prompts_own_token_is_left_out(server: Server, remote: Ask) -> None:
    sampled = server.answer({"prompt": IDS[0].tolist(), "prompt_logprobs": 3, "model": ""})
    sizes = [len(x) for x in sampled["choices"][0]["prompt_logprobs"][1:]]
    assert 4 in sizes  # else there is nothing to leave out
    signal = prepared(remote(3), models.llama()).signal(models.llama(), SIDE)
    want = scored_logits(models.llama(1)).topk(3).indices
    assert torch.equal(signal.sparse.ids, want)


def test_what_is_asked(server: Server, remote: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher = prepared(remote(4, api_key_env="TEACHER_KEY"), models.llama())
    server.requests.clear()
    teacher.signal(models.llama(), SIDE)
    prompts = sorted(request.pop("prompt") for request in server.requests)
    # behind the last scored token nothing is sent
    assert prompts == [IDS[0].tolist(), IDS[1, :4].tolist()]
    rest = {"model": "tiny", "prompt_logprobs": 4, "max_tokens": 1, "temperature": 1.0}
    assert server.requests == [rest, rest]
    assert set(server.paths) == {"/v1/completions"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_without_a_key_none_is_sent(server: Server, remote: Ask) -> None:
    prepared(remote(4), models.llama())
    assert not any("Authorization" in headers for headers in server.headers)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_not_sent(server: Server, remote: Ask, padding: str) -> None:
    rows = models.rows(6, ignored=1)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])  # no token of it is scored
    batch = models.Pad(padding)(rows)
    predicts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    predicts[:, :-1] = batch["labels"][:, 1:] != -100
    side = Side({k: batch[k] for k in ("input_ids", "attention_mask")}, predicts)
    teacher = prepared(remote(V), models.llama())
    server.requests.clear()
    sparse = teacher.signal(models.llama(), side).sparse
    sent = sorted(request["prompt"] for request in server.requests)
    assert sent == sorted(row["input_ids"] for i, row in enumerate(rows) if i != 2)
    dense = prepared(ModelTeacher(models.llama(1)), models.llama()).signal(models.llama(), side)
    want = dense.dense().log_softmax(-1).gather(-1, sparse.ids)
    torch.testing.assert_close(sparse.log_probs, want, rtol=0, atol=1e-5)


def test_rows_are_asked_at_the_same_time(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4, num_threads=2), models.llama())
    server.barrier = threading.Barrier(2)  # opens only for two at once
    assert teacher.signal(models.llama(), SIDE).sparse.ids.shape == (N, 4)
    assert server.barrier.broken is False


def test_nothing_scored_asks_nothing(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4), models.llama())
    server.requests.clear()
    sparse = teacher.signal(models.llama(), Side(SIDE.inputs, PREDICTS & False)).sparse
    assert (sparse.ids.shape, sparse.log_tail.shape) == ((0, 4), (0,))
    assert server.requests == []


def test_what_cannot_be_sent(remote: Ask) -> None:
    teacher = prepared(remote(4), models.llama())
    images = Side({**SIDE.inputs, "pixel_values": torch.zeros(2)}, PREDICTS)
    with pytest.raises(ValueError, match=r"takes input_ids and .* only, the batch has 'pixel_val"):
        teacher.signal(models.llama(), images)
    mask = torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="row 1: a remote teacher cannot score a row's first"):
        teacher.signal(models.llama(), Side({**SIDE.inputs, "attention_mask": mask}, PREDICTS))


def test_minus_infinity(server: Server, remote: Ask) -> None:
    """Entries that the server writes as -9999 have no mass, and the tail none either."""
    teacher = prepared(remote(V), models.llama())

    def forbid(entries: dict) -> dict:
        order = sorted(entries, key=lambda k: -entries[k]["logprob"])
        kept = torch.tensor([entries[k]["logprob"] for k in order[: V // 2]]).log_softmax(-1)
        values = [*kept.tolist(), *[-9999.0] * (V - V // 2)]
        return {k: {"logprob": x} for k, x in zip(order, values, strict=True)}

    server.change = each_entry(forbid)
    signal = teacher.signal(models.llama(), SIDE)
    assert bool((signal.sparse.log_probs[:, V // 2 :] == -torch.inf).all())
    terms, gradient = losses(signal, DivergenceSpec("forward_kl"))
    assert terms.loss.isfinite()
    assert bool(gradient.isfinite().all())


def test_a_tail_within_rounding(server: Server, remote: Ask) -> None:
    """A teacher that is sure: the rest is less than float32 tells from 0, but never nothing."""
    teacher = prepared(remote(4), models.llama())
    sure = [0.0, -18.0, -30.0, -40.0]

    def surely(entries: dict) -> dict:
        order = sorted(entries, key=lambda k: -entries[k]["logprob"])
        values = [*sure, -41.0][: len(order)]
        return {k: {"logprob": x} for k, x in zip(order, values, strict=True)}

    server.change = each_entry(surely)
    signal = teacher.signal(models.llama(), SIDE)
    # at most as much in each of the others as in the least entry
    expected = torch.full((N,), math.log(V - 4) - 40.0)
    torch.testing.assert_close(signal.sparse.log_tail, expected, rtol=1e-6, atol=0)
    sure[:] = [1e-3, -9.0, -9.0, -9.0]  # more than 1, by the server's rounding
    signal = teacher.signal(models.llama(), SIDE)
    torch.testing.assert_close(
        signal.sparse.log_tail, torch.full((N,), -23 * math.log(2)), rtol=1e-6, atol=0
    )
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        assert losses(signal, DivergenceSpec(kind))[0].loss.isfinite()


def test_clipped_tokens_are_counted(remote: Ask) -> None:
    student = models.llama()
    signal = prepared(remote(V), student).signal(student, SIDE)
    dense = prepared(ModelTeacher(models.llama(1)), student).signal(student, SIDE)
    whole, _ = losses(dense, DivergenceSpec("forward_kl"))
    bound = float(whole.metrics["soft"].median())
    for level, clip in (("token", bound), ("vocab_entry", bound / 4)):
        spec = DivergenceSpec("forward_kl", clip=clip, clip_level=level)
        got, want = (losses(each, spec)[0].metrics for each in (signal, dense))
        assert 0 < got["clipped"].sum() < N
        assert torch.equal(got["clipped"], want["clipped"])
        torch.testing.assert_close(got["soft"], want["soft"], rtol=1e-5, atol=0)


def test_padding_of_a_sparse_teacher_says_nothing(remote: Ask) -> None:
    sparse = prepared(remote(3), models.llama()).signal(models.llama(), SIDE).sparse
    padded = sparse._replace(
        ids=F.pad(sparse.ids, (1, 1), value=-1),
        log_probs=F.pad(sparse.log_probs, (1, 1), value=-0.5),
    )
    spec = DivergenceSpec("jsd")
    got, want = (losses(Signal(sparse=teacher), spec) for teacher in (padded, sparse))
    assert got[0].metrics.keys() == MEASURED
    torch.testing.assert_close(got[0].metrics, want[0].metrics)
    torch.testing.assert_close(got[1], want[1])


def test_the_temperature_is_one(remote: Ask, tmp_path: Path) -> None:
    student = models.llama()
    signal = prepared(remote(4), student).signal(student, SIDE)
    message = "log-probabilities are at temperature 1 and cannot be taken at another: .* got 2"
    with pytest.raises(ValueError, match=message):
        losses(signal, DivergenceSpec("forward_kl", temperature=2.0))
    with pytest.raises(ValueError, match=r"at temperature 1: set temperature=1.0, got 2.0"):
        train(tmp_path, remote(4), temperature=2.0)
    with pytest.raises(ValueError, match="a sparse signal has no logits: it knows 4 entries"):
        signal.dense()


def train(folder: Path, teacher: Any, **changes: Any) -> DistillTrainer:
    args = DistillConfig(**models.options(folder, **{"temperature": 1.0} | changes))
    rows = models.rows(ignored=1)
    trainer = DistillTrainer(models.llama(), args, models.Pad(), rows, rows[:4], teacher=teacher)
    trainer.train()
    return trainer


def test_training_is_that_with_the_local_teacher(remote: Ask, tmp_path: Path) -> None:
    got, want = train(tmp_path, remote(V)), train(tmp_path, models.llama(1))
    start = models.weights(models.llama())
    moved = models.difference(models.weights(want.model), start)
    assert models.difference(models.weights(got.model), models.weights(want.model)) < 1e-3 * moved
    keys = ("loss", "soft", "hard", "student_entropy", "teacher_entropy", "top1_agreement")
    for mine, other in zip(got.state.log_history[:-1], want.state.log_history[:-1], strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(other[key], abs=1e-4), key
    assert got.evaluate()["eval_loss"] == pytest.approx(want.evaluate()["eval_loss"], abs=1e-5)
    few = train(tmp_path, remote(2))
    assert models.difference(models.weights(few.model), models.weights(want.model)) > 0.01 * moved


def test_the_student_is_read_by_its_hidden_states(
    remote: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the logits of all tokens were asked for")

    monkeypatch.setattr(Reader, "logits", refuse)
    assert train(tmp_path, remote(4)).evaluate()["eval_loss"] > 0


def test_two_servers_by_route(server: Server, remote: Ask) -> None:
    teacher = RoutedTeacher({"narrow": remote(2), "wide": remote(5)}, "domain")
    prepared(teacher, models.llama())
    side = SIDE._replace(route=torch.tensor([1, 0]))
    sparse = teacher.signal(models.llama(), side).sparse
    assert (sparse.ids >= 0).sum(-1).tolist() == [5, 5, 5, 2, 2]
    padded, _ = losses(teacher.signal(models.llama(), side), DivergenceSpec("forward_kl"))
    alone = [
        losses(
            prepared(remote(k), models.llama()).signal(models.llama(), SIDE),
            DivergenceSpec("forward_kl"),
        )[0].metrics["soft"]
        for k in (5, 2)
    ]
    want = torch.cat([alone[0][:3], alone[1][3:]])
    torch.testing.assert_close(padded.metrics["soft"], want)
