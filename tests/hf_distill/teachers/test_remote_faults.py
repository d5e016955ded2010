"""What a server may get wrong, and what is tried again."""

import json
import logging
import math
import socket
from typing import Any

import pytest
import torch

from hf_distill import RemoteTeacher, RemoteTeacherError
from hf_distill.teachers.server_requests import Retries
from tests.hf_distill.teachers.asking import IDS, SIDE, prepared
from tests.hf_distill.teachers.conftest import Ask
from tests.hf_distill.teachers.serving import DROP, Server, each_entry, edit
from tests.hf_distill.trainers import models

V = models.VOCAB


@pytest.mark.parametrize("faults", [[500, 503], [429], [DROP, 502]])
def test_failures_that_pass_are_tried_again(
    server: Server, remote: Ask, faults: list, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = prepared(remote(4, retries=2), models.llama())
    want = teacher.signal(models.llama(), SIDE)
    server.requests.clear()
    server.faults = list(faults)
    got = teacher.signal(models.llama(), SIDE)
    assert torch.equal(got.sparse.log_probs, want.sparse.log_probs)
    # a server that was away is asked for its fingerprint: once, or for each row that found it so
    away = [x for x in faults if x in (502, 503, DROP)]
    assert bool(away) <= len(server.requests) - 2 - len(faults) <= len(away)
    assert f"status {faults[-1]}, body " in caplog.text
    assert "; trying again in 0.0 s, for 20 s at most" in caplog.text
    assert ("disconnected without sending a response" in caplog.text) == (DROP in faults)


def test_the_waits_double(server: Server, remote: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = prepared(remote(4, backoff=4.0), models.llama())
    waits: list[float] = []
    monkeypatch.setattr(teacher._server.requests._given_up, "wait", waits.append)
    server.faults = [500, 502, 504]
    teacher.top_log_probs(IDS[0].tolist())
    assert waits == [4.0, 8.0, 15.0]


def test_retries_end_with_the_time_or_the_number() -> None:
    retries = Retries(backoff=2.0, max_wait=30.0, limit=3)
    assert retries.pause(1, 0.0) == 2.0
    assert retries.pause(3, 24.0) == 6.0  # what is left
    assert retries.pause(1, 30.0) is None
    assert retries.pause(4, 1.0) is None
    assert Retries(backoff=60.0, max_wait=900.0).pause(1, 0.0) == 60.0
    assert Retries(backoff=1.0, max_wait=1e9).pause(2000, 0.0) == 15.0


def test_failures_that_stay(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4, retries=1, num_threads=1), models.llama())
    url = r"http://127.0.0.1:\d+/v1/completions"
    server.faults = [500, 500]
    with pytest.raises(
        RemoteTeacherError, match=rf"{url}: status 500, body .*fault 500.* \(2 tries in 0 s\)"
    ):
        teacher.signal(models.llama(), SIDE)
    for status in (401, 404):
        server.requests.clear()
        server.faults = [status]
        with pytest.raises(RemoteTeacherError, match=rf"200; status {status}, body .*fault"):
            teacher.top_log_probs(IDS[0].tolist())
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "start", "hints"),
    [
        (
            {"error": {"message": "Requested prompt logprobs of 4, max allowed: 2", "code": 400}},
            "the server says 'Requested prompt logprobs of 4, max allowed: 2'; the server must al",
            True,
        ),
        (
            {"object": "error", "message": "logprobs is only supported with vllm >= 1"},
            "the server says 'logprobs is only supported with vllm >= 1'; the status must be 200",
            False,
        ),
        (
            {"error": "no such model"},
            "the server says 'no such model'; the status must be 200",
            False,
        ),
        ("nginx: bad request about logprobs", "the status must be 200; status 400", False),
    ],
)
def test_the_servers_own_reason_comes_first(
    server: Server, remote: Ask, body: Any, start: str, hints: bool
) -> None:
    teacher = prepared(remote(4), models.llama())
    server.faults = [(400, body if isinstance(body, str) else json.dumps(body))]
    with pytest.raises(RemoteTeacherError) as caught:
        teacher.top_log_probs(IDS[0].tolist())
    assert f"/v1/completions: {start}" in str(caught.value)
    assert ("--max-logprobs 4" in str(caught.value)) == hints


def test_a_server_that_is_silent(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4, timeout=5.0), models.llama())
    hasty = remote(4, timeout=0.2, retries=0)
    hasty._vocab = V
    server.faults = [1.0]
    with pytest.raises(RemoteTeacherError, match=r"/completions: no answer within 0.2 s \(1 try"):
        hasty.top_log_probs(IDS[0].tolist())
    assert len(teacher.top_log_probs(IDS[0].tolist())) == 5
    patient = remote(4, timeout=0.2)
    patient._vocab = V
    server.faults = [1.0]
    assert len(patient.top_log_probs(IDS[0].tolist())) == 5  # the second try


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    teacher = RemoteTeacher(url, "tiny", 4, retries=1, backoff=0.01)
    with pytest.raises(RemoteTeacherError, match=r"no connection: .*refus.* \(2 tries in"):
        prepared(teacher, models.llama())
    teacher.close()


def shifted(positions: list) -> list:
    return [None, *positions[2:], positions[1]]


CHANGES = {
    "none": (edit(prompt_logprobs=None), "must have 32 positions, as the prompt, got none"),
    "short": (edit(prompt_logprobs=lambda x: x[:-1]), "must have 32 positions.*got 31"),
    "long": (edit(prompt_logprobs=lambda x: [*x, x[-1]]), "must have 32 positions.*got 33"),
    "shifted": (edit(prompt_logprobs=shifted), "position 1: the prompt's own token .* must be"),
    "two choices": (lambda x: x["choices"].append({}), "must be JSON with prompt_logprobs, got"),
    "no choices": (lambda x: x.pop("choices"), r"must be JSON with prompt_.*KeyError\('choices'\)"),
    "null": (edit(prompt_logprobs=lambda x: [None] * 8), "must be JSON with prompt_logprobs, got"),
    "numbers": (
        each_entry(lambda x: {k: v["logprob"] for k, v in x.items()}),
        "must be JSON with prompt_logprobs, got TypeError",
    ),
    "logits": (
        each_entry(lambda x: {k: {"logprob": v["logprob"] + 20} for k, v in x.items()}),
        "position 1: a log-probability must not be positive, got",
    ),
    "nan": (
        each_entry(lambda x: {k: {"logprob": math.nan} for k in x}),
        "position 1: a log-probability must not be positive, got nan",
    ),
    "mass": (
        each_entry(lambda x: {k: {"logprob": -0.5} for k in x}),
        r"position 1: the probabilities must not sum to more than 1, got [23]\.\d+: does the",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_answers_that_are_no_answer(server: Server, remote: Ask, name: str) -> None:
    server.change, message = CHANGES[name]
    with pytest.raises(
        RemoteTeacherError, match=rf"/v1/completions: .*{message}.*status 200, body"
    ):
        prepared(remote(4), models.llama())


@pytest.mark.parametrize("text", ["", "<html>busy</html>", "[]", "{", '{"choices": "none"}'])
def test_text_that_is_no_answer(server: Server, remote: Ask, text: str) -> None:
    server.faults = [text]
    message = "completions: the answer must be JSON with prompt_logprobs, got .*; status 200, body"
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4), models.llama())


def test_a_long_body_is_cut(server: Server, remote: Ask) -> None:
    server.faults = ["x" * 10**5]
    with pytest.raises(RemoteTeacherError) as error:
        prepared(remote(4), models.llama())
    assert len(str(error.value)) < 1000


def test_a_server_with_fewer_entries(server: Server, remote: Ask) -> None:
    server.change = each_entry(lambda x: dict(list(x.items())[:3]))
    with pytest.raises(RemoteTeacherError, match="each token must have 4 entries, got 3"):
        prepared(remote(4), models.llama())


def test_answers_that_change(server: Server, remote: Ask) -> None:
    prepared(remote(4), models.llama())

    def unsteady(answer: dict) -> None:
        server.model = models.llama(len(server.requests))

    server.change = unsteady
    message = r"two equal requests must get equal .* they are [\d.]+ nats apart \(limit 0.25\)"
    with pytest.raises(RemoteTeacherError, match=message):
        prepared(remote(4), models.llama())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"timeout": 0.0}, "timeout must be positive, .* got 0.0, 600.0, None and 0.5"),
        (
            {"retries": -1},
            "retries and backoff not negative, got 60.0, 600.0, -1 and 0.5",
        ),
        ({"max_wait": -1.0}, "and backoff not negative, got 60.0, -1.0, None and 0.5"),
        (
            {"backoff": -1.0},
            "retries and backoff not negative, got 60.0, 600.0, None and -1.0",
        ),
        ({"api_key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY must hold the server's key"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteTeacher("http://127.0.0.1:9/v1", "tiny", **{"top_k": 4} | changes)


def test_the_key_is_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher = RemoteTeacher(server.url + "/", "tiny", 4, api_key_env="TEACHER_KEY", retries=0)
    prepared(teacher, models.llama())
    server.faults = [500]
    with pytest.raises(RemoteTeacherError) as error:
        teacher.signal(models.llama(), SIDE)
    assert "secret" not in str(error.value) + caplog.text + repr(teacher)
    teacher.close()
