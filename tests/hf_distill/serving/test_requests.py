"""Requests that are none: each gets a 4xx with the rule, none ends the server, none is answered."""

import http.client
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from hf_distill import HiddenStateTeacher, RemoteTeacher, RemoteTeacherError
from hf_distill.serving import HiddenStateServer, server
from hf_distill.serving.hidden_model import HiddenModel
from hf_distill.teachers import hidden_protocol as protocol
from hf_distill.teachers.hidden_protocol import Limits, ProtocolError, Row
from tests.hf_distill.serving.conftest import Ask, serving
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

ROWS = [Row([5, 6, 7, 8], [0, 2]), Row([9, 10], [1])]
TYPE = {"Content-Type": protocol.CONTENT_TYPE}
LIMITS = {"max_rows": 4, "max_tokens": 40, "max_length": 20}
BODY = protocol.encode_rows(ROWS)


@pytest.fixture(scope="module")
def shared() -> Iterator[HiddenStateServer]:
    with serving(**LIMITS) as made:
        yield made


def send(
    made: HiddenStateServer, body: bytes | None, method: str = "POST", path: str = protocol.ASK,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", made.server_port, timeout=20)
    try:
        connection.request(method, path, body, TYPE if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def rule(answer: tuple[int, bytes]) -> str:
    return json.loads(answer[1])["error"]["message"]


def works(made: HiddenStateServer) -> None:
    status, body = send(made, BODY)
    assert status == 200
    found = protocol.decode_answer(body, made.about, protocol.sha256_of(BODY), 3)
    assert found.shape == (3, 32)


def numbers(**changes: Any) -> bytes:
    """The body of ROWS with other tensors; None leaves one out."""
    made: dict[str, Any] = {"ids": [5, 6, 7, 8, 9, 10], "lengths": [4, 2], "outputs": [0, 2, 1]}
    made |= {"counts": [2, 1]} | changes
    given = {k: v for k, v in made.items() if v is not None}
    return save({k: v if isinstance(v, Tensor) else i32(v) for k, v in given.items()})


def i32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "must be a safetensors file"),
    "text": (b'{"ids": [1, 2]}', "must be a safetensors file"),
    "a pickle": (b"\x80\x04]\x94K\x01a.", "must be a safetensors file"),
    "a header of 2^63": (b"\xff" * 7 + b"\x7f" + BODY[8:], "must be a safetensors file"),
    "cut": (BODY[:-1], "must be a safetensors file"),
    "more": (BODY + b"\0\0\0\0", "must be a safetensors file"),
    "no ids": (numbers(ids=None), "the body must hold .*'ids'"),
    "another tensor": (numbers(more=[1]), "the body must hold .*got .*'more'"),
    "other dtype": (numbers(ids=torch.ones(6)), r"ids must be int32 \[n\], got torch.float32"),
    "other shape": (numbers(ids=i32([1] * 6).view(2, 3)), r"ids must be int32 \[n\], got .*\[2, 3"),
    "no rows": (numbers(ids=[], lengths=[], outputs=[], counts=[]), "rows must be 1 to 4, got 0"),
    "many rows": (
        numbers(ids=[1] * 5, lengths=[1] * 5, outputs=[], counts=[0] * 5),
        "rows must be 1 to 4, got 5",
    ),
    "an empty row": (numbers(lengths=[6, 0]), "a row must have 1 to 20 tokens, got 0"),
    "a negative row": (numbers(lengths=[8, -2]), "a row must have 1 to 20 tokens, got -2"),
    "a long row": (numbers(lengths=[21, 1]), "a row must have 1 to 20 tokens, got 21"),
    "a huge row": (numbers(lengths=[2**31 - 1, 2**31 - 1]), "a row must have 1 to 20 tokens"),
    "many tokens": (
        numbers(ids=[1] * 42, lengths=[20, 20, 2], outputs=[], counts=[0] * 3),
        "tokens must be at most 40, got 42",
    ),
    "fewer ids": (numbers(ids=[5, 6]), "ids must be the 6 of lengths, got 2"),
    "other counts": (numbers(counts=[3]), "counts must be of 2 rows, got 1"),
    "a negative count": (numbers(counts=[4, -1]), "counts must be at least 0, got -1"),
    "fewer outputs": (numbers(outputs=[1]), "outputs must be the 3 of counts, got 1"),
    "an id too large": (numbers(ids=[5, 6, 61, 8, 9, 10]), r"ids must be in \[0, 61\), got 61"),
    "a negative id": (numbers(ids=[5, 6, -1, 8, 9, 10]), r"ids must be in \[0, 61\), got -1"),
    "an output behind": (numbers(outputs=[0, 4, 1]), "outputs of row 0 must ascend .* below 4"),
    "an output twice": (numbers(outputs=[2, 2, 1]), "outputs of row 0 must ascend"),
    "an output before": (numbers(outputs=[0, 2, -1]), "outputs of row 1 must ascend"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_body_that_breaks_a_rule(shared: HiddenStateServer, name: str) -> None:
    body, words = BAD[name]
    answer = send(shared, body)
    assert answer[0] == 400
    with pytest.raises(ProtocolError, match=words):
        raise ProtocolError(rule(answer))


def raw(made: HiddenStateServer, text: bytes) -> bytes:
    """What a server answers to some bytes, until it closes."""
    found = b""
    with socket.create_connection(("127.0.0.1", made.server_port), timeout=20) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            found += part
    return found


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {protocol.ASK} HTTP/1.1", *lines, "", ""]).encode()


KIND = f"Content-Type: {protocol.CONTENT_TYPE}"


def test_a_request_that_breaks_a_rule(shared: HiddenStateServer) -> None:
    asked = [
        (send(shared, BODY, path="/v1/completions"), 404, "a HiddenStateTeacher asks for"),
        (send(shared, None, "GET", "/"), 404, "the path must be /v1/hidden_states or /v1/head"),
        (send(shared, BODY, headers={}), 415, "the content type must be"),
        (send(shared, BODY, headers={"Content-Type": "text/plain"}), 415, "the content type"),
        (send(shared, BODY, "PUT"), 405, "Unsupported method"),
        (send(shared, b"x" * 9000), 413, "Content-Length must be a number up to|at most"),
    ]
    for answer, status, words in asked:
        assert answer[0] == status
        assert words.split("|")[-1] in rule(answer)
    for text, status in (
        (head(KIND), 411),
        (head(KIND, "Transfer-Encoding: chunked", "Content-Length: 4"), 411),
        (head(KIND, "Content-Length: 4", "Content-Length: 5"), 411),
        (head(KIND, "Content-Length: 4").replace(b"POST", b"GET") + b"more", 400),
        (head(KIND, "Transfer-Encoding: chunked").replace(b"POST", b"GET"), 400),
        (head(KIND, "Content-Length: -1"), 413),
        (head(KIND, "Content-Length: 1e3"), 413),
        (head(KIND, f"Content-Length: {'9' * 5000}"), 413),
        (head(*(f"X-{i}: y" for i in range(200))), 431),
        (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/9.9\r\n\r\n", 400),
    ):
        assert f"HTTP/1.1 {status} ".encode() in raw(shared, text)
    assert raw(shared, head(KIND, "Content-Length: 100") + b"half of it") == b""
    works(shared)


def spoiled(rng: random.Random) -> bytes:
    """A body of ROWS that is cut, has other bytes in its header, or other bytes behind it."""
    body, kind = bytearray(BODY), rng.randrange(4)
    if kind == 0:
        return bytes(body[: rng.randrange(len(body))])
    if kind == 1:
        return bytes(body) + rng.randbytes(rng.randrange(1, 50))
    if kind == 2:
        return rng.randbytes(rng.randrange(1, 400))
    size = 8 + int.from_bytes(body[:8], "little")
    for _ in range(rng.randrange(1, 6)):
        body[rng.randrange(size)] = rng.randrange(128, 256)  # no byte of such a header
    return bytes(body)


def test_two_hundred_spoiled_requests(shared: HiddenStateServer) -> None:
    rng = random.Random(7)
    for _ in range(200):
        with pytest.raises(ProtocolError):
            protocol.decode_rows(spoiled(rng), shared.about.limits, 61)
    for _ in range(10):
        assert send(shared, spoiled(rng))[0] == 400
    works(shared)


@pytest.mark.slow
def test_a_thousand_spoiled_requests_over_the_network(shared: HiddenStateServer) -> None:
    rng = random.Random(11)
    bad = [body for body, _ in BAD.values()]
    for number in range(1000):
        body = bad[number] if number < len(bad) else spoiled(rng)
        assert 400 <= send(shared, body)[0] < 500
        if number % 100 == 0:
            works(shared)
    works(shared)


def test_a_token_is_asked_for(asking: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(token="secret words") as made:
        for headers in (
            None,
            {},
            {"Authorization": "Bearer secret"},
            {"Authorization": "secret words"},
        ):
            given = TYPE | (headers or {})
            for method, path in (
                ("POST", protocol.ASK),
                ("GET", protocol.ASK),
                ("GET", "/v1/head"),
            ):
                answer = send(made, BODY if method == "POST" else None, method, path, given)
                assert answer[0] == 401
                assert rule(answer) == "the token must be the server's"
        assert send(made, BODY, headers=TYPE | {"Authorization": "Bearer secret words"})[0] == 200
        with pytest.raises(RemoteTeacherError, match="status 401: the token must be the server's"):
            _ = asking(made).about
        monkeypatch.setenv("TEACHER_TOKEN", "secret words")
        assert asking(made, api_key_env="TEACHER_TOKEN").vocab_size == 61


def test_what_may_not_be_served() -> None:
    with pytest.raises(ValueError, match=r"needs a token, got host '0\.0\.0\.0' without one"):
        HiddenStateServer(models.llama(), host="0.0.0.0")
    with pytest.raises(ValueError, match="the token must be printable ASCII"):
        HiddenStateServer(models.llama(), token="a\nb")
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        HiddenStateServer(models.llama(), max_rows=0)
    adapted = models.lora(models.llama(), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="this one is read by its logits: the head is a peft"):
        HiddenStateServer(adapted)
    assert [server.is_loopback(x) for x in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "")] == [
        *(True, True, True, False, False)
    ]


def test_a_full_queue_says_when_to_come_back(asking: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Semaphore(0), threading.Event()
    answer = HiddenModel.answer

    def held(self: Any, rows: Any) -> Tensor:
        begun.release()
        assert go.wait(20)
        return answer(self, rows)

    with serving(max_waiting=1) as made:
        teacher = asking(made, max_wait=20.0)
        _ = teacher.about
        monkeypatch.setattr(HiddenModel, "answer", held)
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(teacher.ask(ROWS))) for _ in range(3)
        ]
        threads[0].start()
        assert begun.acquire(timeout=20)
        threads[1].start()
        while not made.answers._waiting.full():
            threads[1].join(0.01)
        connection = http.client.HTTPConnection("127.0.0.1", made.server_port, timeout=20)
        connection.request("POST", protocol.ASK, BODY, TYPE)
        refused = connection.getresponse()
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert rule((503, refused.read())) == "at most 1 requests may wait: come back"
        connection.close()
        threads[2].start()  # is told to come back, and does
        go.set()
        for thread in threads:
            thread.join(20)
    assert len(found) == 3
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_model_that_fails_is_a_500_and_the_next_request_has_its_turn(
    shared: HiddenStateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, rows: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HiddenModel, "answer", fails)
    answer = send(shared, BODY)
    assert (answer[0], rule(answer)) == (500, "the model failed: RuntimeError")
    monkeypatch.undo()
    works(shared)


Change = Callable[[dict[str, Tensor], dict[str, str]], Any]


def answered(change: Change | None, made: HiddenStateServer) -> bytes:
    """The answer to BODY with another content."""
    tensors, metadata = (
        {"hidden": torch.zeros(3, 32)},
        {"teacher": made.about.digest, "request": protocol.sha256_of(BODY)},
    )
    if change is not None:
        change(tensors, metadata)
    return save(tensors, metadata)


WRONG: dict[str, tuple[Change, str]] = {
    "fewer tokens": (lambda x, _: x.update(hidden=torch.zeros(2, 32)), r"hidden must be .*\[2, 32"),
    "other units": (lambda x, _: x.update(hidden=torch.zeros(3, 31)), r"hidden must be .*\[3, 31"),
    "other dtype": (lambda x, _: x.update(hidden=torch.zeros(3, 32).half()), "hidden must be"),
    "NaN": (lambda x, _: x["hidden"].fill_(torch.nan), "hidden states must be finite"),
    "another name": (lambda x, _: x.update(more=torch.ones(1)), "the body must hold"),
    "another request": (lambda _, y: y.update(request="00"), "the answer must be of the request"),
    "another teacher": (lambda _, y: y.update(teacher="00"), "another teacher than before"),
    "nobody's": (lambda _, y: y.clear(), "the answer must be of the request"),
}


def test_a_wrong_answer_is_never_taken(asking: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its shape and words; or by a byte that has changed on its way."""
    with serving() as made:
        teacher: HiddenStateTeacher = asking(made)
        own, about = teacher.ask(ROWS), teacher.about
        assert torch.equal(protocol.decode_answer(
            answered(None, made), about, protocol.sha256_of(BODY), 3), torch.zeros(3, 32)
        )  # fmt: skip
        encode, send_it = protocol.encode_answer, server.Handler._send
        for change, words in WRONG.values():
            body = answered(change, made)
            monkeypatch.setattr(protocol, "encode_answer", lambda *_, body=body: body)
            with pytest.raises(RemoteTeacherError, match=words):
                teacher.ask(ROWS)
        monkeypatch.setattr(protocol, "encode_answer", encode)
        rng = random.Random(3)

        def damaged(self: Any, status: int, body: bytes, kind: str, headers: Any) -> None:
            changed = bytearray(body)
            changed[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            send_it(self, status, bytes(changed), kind, headers)

        monkeypatch.setattr(server.Handler, "_send", damaged)
        for _ in range(40):
            with pytest.raises(RemoteTeacherError, match="the answer's sha256 must be"):
                teacher.ask(ROWS)
        monkeypatch.undo()
        assert torch.equal(teacher.ask(ROWS), own)


def test_a_server_of_another_kind_or_version_is_named(
    shared: HiddenStateServer, asking: Ask
) -> None:
    said = json.loads(send(shared, None, "GET")[1])
    assert protocol.read_about(said) == shared.about
    for changes, words in (
        ({"version": "2.0"}, r"the server's version must be 1\.\*, got '2\.0'"),
        ({"protocol": "x"}, "there must be a hidden-state server"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"shape": [61, 0]}, "shape must be positive numbers"),
        ({"limits": {"rows": 1}}, "limits must be positive numbers"),
        ({"logit_scale": float("nan")}, "scale and softcap must be finite"),
        ({"head_sha256": None}, "head_sha256 must be of"),
        ({"end_ids": ["x"]}, "end_ids must be ids"),
    ):
        with pytest.raises(ProtocolError, match=words):
            protocol.read_about(said | changes)
    for other in ([], None, "x", 3):
        with pytest.raises(ProtocolError, match="there must be a hidden-state server"):
            protocol.read_about(other)
    with pytest.raises(ProtocolError, match="the head's sha256 must be"):
        protocol.decode_head(b"", shared.about)
    limits = Limits(rows=2, tokens=9, length=9, outputs=2, requests=1)
    with pytest.raises(ProtocolError, match="outputs must be at most 2, got 3"):
        protocol.decode_rows(BODY, limits, 61)
    assert len(BODY) < limits.bytes
    remote = RemoteTeacher(f"{shared.url}/v1", "tiny", 3, retries=0)
    with pytest.raises(RemoteTeacherError, match="which a HiddenStateTeacher asks for"):
        remote.start(61)
    remote.close()
