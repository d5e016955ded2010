"""Requests of strangers: under another name of the machine, and slower than others can wait for."""

import socket

import pytest

from hf_distill.serving import server
from tests.hf_distill.serving.conftest import serving
from tests.hf_distill.serving.test_requests import BODY, KIND, TYPE, head, rule, send, works


def test_without_a_token_the_host_is_this_machine() -> None:
    hosts = {"127.0.0.1:8077": 200, "localhost": 200, "[::1]:8077": 200, "models.test:8077": 403}
    with serving() as made:
        for host, status in hosts.items():
            answer = send(made, BODY, headers=TYPE | {"Host": host})
            assert answer[0] == status, host
            if status == 403:
                assert "the Host must be this machine's own name, or the server" in rule(answer)
    with serving(token="words") as made:
        bearing = TYPE | {"Authorization": "Bearer words", "Host": "models.test"}
        assert send(made, BODY, headers=bearing)[0] == 200


@pytest.mark.parametrize(
    "begin", [b"", head(KIND, "Content-Length: 1000")], ids=["headers", "body"]
)
def test_a_request_that_comes_too_slowly_ends(
    begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is never silent for long."""
    monkeypatch.setattr(server, "IDLE", 0.3)
    with serving() as made:
        address = ("127.0.0.1", made.server_port)
        with socket.create_connection(address, timeout=0.05) as connection:
            connection.sendall(begin)
            for _ in range(200):
                try:
                    if not connection.recv(1):
                        break
                    connection.sendall(b"x")
                except TimeoutError:
                    connection.sendall(b"x")
                except OSError:
                    break
            else:
                raise AssertionError("the connection is still there")
        works(made)
