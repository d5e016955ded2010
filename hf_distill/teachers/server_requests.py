"""Requests to a server that may be restarted while others wait for it."""

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from hf_distill.teachers.vllm_refusals import shown

logger = logging.getLogger(__name__)

RETRIED = (429, 500, 502, 503, 504)
AWAY = (502, 503, 504)  # what stands before a server says so while it restarts
LONGEST_PAUSE = 15.0  # seconds between two tries
LOGGED_EVERY = 10.0  # seconds between two lines that say the same

Asked = TypeVar("Asked")
Said = TypeVar("Said")


class RemoteTeacherError(RuntimeError):
    """The server did not answer, or it sent something else than log-probabilities."""


@dataclass(frozen=True)
class Retries:
    """Says when a failed request is sent again.

    Attributes:
        backoff: seconds before the second try; doubled for each next one, up to `LONGEST_PAUSE`.
        max_wait: seconds from the first failure to the last try.
        limit: how often it is sent again at most, or None.
    """

    backoff: float
    max_wait: float
    limit: int | None = None

    def pause(self, failed: int, waited: float) -> float | None:
        """Return the seconds before the next try, or None if there is none.

        Args:
            failed: tries that have failed, >= 1.
            waited: seconds since the first of them.
        """
        if waited >= self.max_wait or (self.limit is not None and failed > self.limit):
            return None
        doubled = self.backoff * 2.0 ** min(failed - 1, 30)
        return min(doubled, max(LONGEST_PAUSE, self.backoff), self.max_wait - waited)


class ServerRequests:
    """Sends requests; several threads may use it.

    Args:
        timeout: seconds without an answer after which a request has failed.
        retries: when it is sent again.
        api_key: sent as a bearer token, or None.
        max_requests: requests that are under way at a time.
        retried: statuses after which a request is sent again.

    Attributes:
        interruptions: how often the server was away: no connection, no answer in time, or a status
            of `AWAY`. Who was asked before one may be another afterwards.
    """

    def __init__(
        self,
        timeout: float,
        retries: Retries,
        api_key: str | None,
        max_requests: int,
        retried: Collection[int] = RETRIED,
    ) -> None:
        self.timeout = timeout
        self._retried = retried
        self.retries = retries
        self.interruptions = 0
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx2.Limits(max_keepalive_connections=max_requests)
        self._client = httpx2.Client(timeout=timeout, headers=headers, limits=limits)
        self._slots = threading.BoundedSemaphore(max_requests)
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._logged: dict[str, float] = {}  # when a line was written last

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def begin(self) -> None:
        """Let requests wait for the server, after `give_up`."""
        self._given_up.clear()

    def give_up(self) -> None:
        """End the requests that wait for the server: they fail now."""
        self._given_up.set()

    def send(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | bytes | None = None,
        content_type: str = "application/json",
    ) -> httpx2.Response:
        """Return the server's answer, whose status is none of those that are retried.

        Args:
            method: of HTTP.
            url: of the request.
            body: for JSON, or bytes of another type.
            content_type: of the body.

        Raises:
            RemoteTeacherError: every try has failed.
        """
        content = json.dumps(body).encode() if isinstance(body, Mapping) else body
        began, failed = 0.0, 0
        while True:
            answer, failure = self._try(method, url, content, content_type)
            if answer is not None:
                if failed:
                    waited = time.monotonic() - began
                    self._log(logging.INFO, f"{url}: it answers again, after {waited:.0f} s")
                return answer
            began = began or time.monotonic()
            failed, waited = failed + 1, time.monotonic() - began
            pause = self.retries.pause(failed, waited)
            if pause is None or self._given_up.is_set():
                tries = f"{failed} {'try' if failed == 1 else 'tries'} in {waited:.0f} s"
                raise RemoteTeacherError(f"{url}: {failure} ({tries})")
            self._log(
                logging.WARNING,
                f"{url}: {failure}; trying again",
                f" in {pause:.1f} s, for {self.retries.max_wait - waited:.0f} s at most",
            )
            self._given_up.wait(pause)

    def _try(
        self, method: str, url: str, content: bytes | None, content_type: str
    ) -> tuple[httpx2.Response | None, str]:
        """Return an answer, or None and what has failed."""
        headers = {} if content is None else {"Content-Type": content_type}
        try:
            with self._slots:
                answer = self._client.request(method, url, content=content, headers=headers)
        except httpx2.TimeoutException:
            self._count_interruption()
            return None, f"no answer within {self.timeout:g} s"
        except httpx2.TransportError as error:
            self._count_interruption()
            return None, f"no connection: {error}"
        if answer.status_code in AWAY:
            self._count_interruption()
        if answer.status_code not in self._retried:
            return answer, ""
        return None, f"status {answer.status_code}, body {shown(answer.text)!r}"

    def _count_interruption(self) -> None:
        with self._lock:
            self.interruptions += 1

    def _log(self, level: int, line: str, more: str = "") -> None:
        """Log a line, but not each thread's, again and again."""
        with self._lock:
            now = time.monotonic()
            if now - self._logged.get(line, -LOGGED_EVERY) < LOGGED_EVERY:
                return
            self._logged[line] = now
        logger.log(level, "%s%s", line, more)


def ask_all(
    ask: Callable[[Asked], Said],
    asked: Sequence[Asked],
    num_threads: int,
    requests: ServerRequests | None = None,
) -> list[Said]:
    """Ask for several things at a time.

    Args:
        ask: what is called with each.
        asked: those.
        num_threads: how many calls are made at a time.
        requests: what the calls wait for: at an error of one of them, or an interruption, the
            others do not wait any longer.

    Returns:
        The answers, in order.

    Raises:
        Exception: the first one that a call raised.
    """
    if requests is not None:
        requests.begin()
    with ThreadPoolExecutor(num_threads) as pool:
        calls = [pool.submit(ask, each) for each in asked]
        try:
            for call in wait(calls, return_when=FIRST_EXCEPTION).done:
                call.result()
        except BaseException:
            if requests is not None:
                requests.give_up()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [call.result() for call in calls]
