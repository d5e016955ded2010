"""A server with a tiny model, and teachers that ask it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hf_distill import RemoteTeacher
from tests.hf_distill.teachers.serving import Server, serving
from tests.hf_distill.trainers import models

Ask = Callable[..., RemoteTeacher]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(models.llama(1)) as state:
        yield state


@pytest.fixture
def remote(server: Server) -> Iterator[Ask]:
    """Makes teachers of the server."""
    made = []

    def make(top_k: int, **changes: Any) -> RemoteTeacher:
        changes = {"timeout": 20.0, "backoff": 0.01, "max_wait": 20.0} | changes
        made.append(RemoteTeacher(server.url, "tiny", top_k, **changes))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()
