"""A server that ends and is started again: what waits for it goes on, and nothing is lost."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_distill import RemoteTeacher, RemoteTeacherError
from hf_distill.cache import CachedTeacher, cache_log_probs
from tests.hf_distill.teachers.asking import IDS, SIDE, prepared
from tests.hf_distill.teachers.conftest import Ask
from tests.hf_distill.teachers.serving import Server, listening
from tests.hf_distill.trainers import models

AWAY = 0.3  # seconds


class Mortal:
    """A server that ends in the middle of its nth request from now, and may be started again."""

    def __init__(self, model: Any) -> None:
        self.state = Server(model)
        self._stack = ExitStack()
        self._stack.enter_context(listening(self.state))
        self.port = int(self.state.url.split(":")[2].split("/")[0])
        self._answer = self.state.respond
        self.deaths = 0

    def end(self) -> None:
        self._stack.close()

    def start(self, model: Any = None) -> None:
        if model is not None:
            self.state.model = model
        self._stack.enter_context(listening(self.state, self.port))

    def die_in(self, count: int, *, model: Any = None) -> threading.Thread:
        """End in the middle of a request, and start again after a while."""
        asked = threading.Event()
        left = [count]

        def respond(request: dict[str, Any]) -> tuple[int, str]:
            left[0] -= 1
            if left[0] == 0:
                asked.set()
                gone.wait(10)
            return self._answer(request)

        def run() -> None:
            assert asked.wait(30)
            self.end()
            gone.set()
            self.deaths += 1
            self.state.respond = self._answer  # type: ignore[method-assign]
            time.sleep(AWAY)
            self.start(model)

        gone = threading.Event()
        self.state.respond = respond  # type: ignore[method-assign]
        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mortal]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Mortal(models.llama(1))
    yield made
    made.end()


@contextmanager
def asking(url: str, top_k: int = 4, **changes: Any) -> Iterator[RemoteTeacher]:
    with closing(RemoteTeacher(url, "tiny", top_k, **{"backoff": 0.05} | changes)) as teacher:
        yield teacher


def test_a_server_that_is_started_again(mortal: Mortal, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with asking(mortal.state.url) as teacher:
        want = prepared(teacher, models.llama()).signal(models.llama(), SIDE)
        thread = mortal.die_in(2)
        got = teacher.signal(models.llama(), SIDE)
        thread.join()
        assert mortal.deaths == 1
        assert torch.equal(got.sparse.log_probs, want.sparse.log_probs)
        assert teacher._server.requests.interruptions > 0
    waits = [x.message for x in caplog.records if "trying again in" in x.message]
    assert any("no connection" in line and "for 600 s at most" in line for line in waits)
    assert "it answers again, after" in caplog.text


def test_a_cache_is_written_over_deaths(mortal: Mortal, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data_collator": models.Pad(), "shard_rows": 4, "vocab_size": 61}
    with asking(mortal.state.url) as teacher:
        cache_log_probs(teacher, models.rows(), tmp_path / "whole", **given)
        threads = []
        original: Callable[..., Any] = teacher.top_log_probs
        count = [0]

        def top_log_probs(ids: Any) -> Any:
            count[0] += 1
            if count[0] in (5, 9):
                threads.append(mortal.die_in(1))
            return original(ids)

        teacher.top_log_probs = top_log_probs  # type: ignore[method-assign]
        cache_log_probs(teacher, models.rows(), tmp_path / "survivor", num_threads=1, **given)
        for thread in threads:
            thread.join()
    assert mortal.deaths == 2
    batch = models.Pad()(models.rows())
    one, two = (CachedTeacher(tmp_path / x).columns(batch) for x in ("whole", "survivor"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rows_that_wait_give_up_with_a_row_that_is_refused(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4, backoff=100.0, num_threads=2), models.llama())
    refused = (400, '{"error": {"message": "never"}}')
    answers = iter([503, refused])
    both = threading.Barrier(2)
    lock = threading.Lock()

    def respond(_: dict[str, Any]) -> tuple[int, str]:
        with lock:
            answer = next(answers)
        both.wait(10)
        if answer == 503:
            return 503, "{}"
        time.sleep(0.2)  # the other waits by then
        return refused

    server.respond = respond  # type: ignore[method-assign]
    with pytest.raises(RemoteTeacherError):  # and not after 100 s
        teacher.signal(models.llama(), SIDE)


def test_requests_under_way_are_bounded(server: Server, remote: Ask) -> None:
    teacher = prepared(remote(4, num_threads=2), models.llama())
    server.barrier = threading.Barrier(2)  # each waits for another one
    rows = IDS.repeat(6, 1).tolist()
    threads = [threading.Thread(target=teacher.top_log_probs, args=(row,)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most_under_way == 2


def test_the_wait_has_an_end(mortal: Mortal) -> None:
    with asking(mortal.state.url, max_wait=0.3) as teacher:
        prepared(teacher, models.llama())
        mortal.end()
        message = r"no connection: .*refus.* \([4-9] tries in 0 s\)"
        with pytest.raises(RemoteTeacherError, match=message):
            teacher.top_log_probs(IDS[0].tolist())
        mortal.start()
        assert len(teacher.top_log_probs(IDS[0].tolist())) == 5
