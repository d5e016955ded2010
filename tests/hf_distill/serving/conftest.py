"""A server of a tiny model's hidden states in this process, and teachers that ask it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hf_distill import HiddenStateTeacher
from hf_distill.serving import HiddenStateServer
from tests.hf_distill.trainers import models

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
Ask = Callable[..., HiddenStateTeacher]


@contextmanager
def serving(model: Any = None, **changes: Any) -> Iterator[HiddenStateServer]:
    """The server, answering inside the block."""
    server = HiddenStateServer(models.llama(1) if model is None else model, **changes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.close()


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[HiddenStateServer]:
    with serving() as made:
        yield made


@pytest.fixture
def asking() -> Iterator[Ask]:
    """Makes teachers of a server."""
    made = []

    def make(server: HiddenStateServer, **changes: Any) -> HiddenStateTeacher:
        changes = {"timeout": 20.0, "max_wait": 0.0, "backoff": 0.01} | changes
        made.append(HiddenStateTeacher(server.url, **changes))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()
