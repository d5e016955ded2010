"""A client of a hidden-state server: it outlives restarts, and takes no answer that is not whole.

A request is sent again after a failed connection, an answer that has been cut off, a timeout and
the statuses of `RETRIED`, for `max_wait` seconds. An answer bears the sha256 of
its bytes and of the request's, and names the teacher: another one behind the same address is an
error, and never trained on.

Shapes: N asked outputs of all rows, H hidden.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx2
import torch
from torch import Tensor

from hf_distill.teachers import hidden_protocol as protocol
from hf_distill.teachers.hidden_protocol import About, ProtocolError, Row
from hf_distill.teachers.server_requests import RemoteTeacherError, Retries, ServerRequests
from hf_distill.teachers.vllm_refusals import SHOWN, reason_in
from metal_ops import Head

RETRIED = (429, 502, 503, 504)  # 500 is a model that fails, and would fail again
REQUESTS = 4  # under way at a time


class HiddenClient:
    """Asks a hidden-state server; several threads may use it.

    Args:
        url: of the server, such as "http://127.0.0.1:8077".
        timeout: seconds without an answer after which a request has failed.
        max_wait: seconds for which a request that has failed is sent again.
        backoff: seconds before it is sent again for the first time; doubled each time.
        api_key: sent as a bearer token, or None.
    """

    def __init__(
        self, url: str, timeout: float, max_wait: float, backoff: float, api_key: str | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the url must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        retries = Retries(backoff, max_wait)
        self._requests = ServerRequests(timeout, retries, api_key, REQUESTS, RETRIED)

    def close(self) -> None:
        """Close the connections."""
        self._requests.close()

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Inside the block requests that wait for the server fail."""
        self._requests.give_up()
        try:
            yield
        finally:
            self._requests.begin()

    def about(self) -> About:
        """Ask the server what it is.

        Raises:
            RemoteTeacherError: it does not answer, or is no hidden-state server of this version.
        """
        body = self._sent("GET", protocol.ASK)
        try:
            return protocol.read_about(json.loads(body))
        except (ProtocolError, ValueError, RecursionError) as error:
            raise self._error(protocol.ASK, str(error)) from error

    def head(self, about: About) -> Head:
        """Ask for the teacher's output head, on the CPU.

        Raises:
            RemoteTeacherError: the server fails, or sends another head.
        """
        body = self._sent("GET", protocol.HEAD)
        try:
            return protocol.decode_head(body, about)
        except ProtocolError as error:
            raise self._error(protocol.HEAD, str(error)) from error

    def hidden(self, rows: Sequence[Row], about: About) -> Tensor:
        """Ask for hidden states [N, H] at the asked outputs of rows, row by row.

        Rows that are more than the server takes at once are several requests.

        Raises:
            RemoteTeacherError: the server fails, is another teacher now, or a row is too large.
        """
        found = [self._asked(part, about) for part in _cut(rows, about)]
        empty = torch.empty(0, about.shape[1], dtype=protocol.DTYPES[about.dtype])
        return torch.cat([empty, *found])

    def _asked(self, rows: Sequence[Row], about: About) -> Tensor:
        body = protocol.encode_rows(rows)
        answer = self._sent("POST", protocol.ASK, body)
        wanted = sum(len(row.outputs) for row in rows)
        try:
            return protocol.decode_answer(answer, about, protocol.sha256_of(body), wanted)
        except ProtocolError as error:
            raise self._error(protocol.ASK, str(error)) from error

    def _sent(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Return the body of an answer of status 200."""
        response = self._requests.send(method, self.url + path, body, protocol.CONTENT_TYPE)
        return self._whole(response, path)

    def _whole(self, response: httpx2.Response, path: str) -> bytes:
        """Return the body of an answer that is what the server has sent."""
        if response.status_code != 200:
            reason = reason_in(response) or response.text[:SHOWN]
            raise self._error(path, f"status {response.status_code}: {reason}")
        wanted, found = response.headers.get(protocol.DIGEST), protocol.sha256_of(response.content)
        if wanted is None:
            raise self._error(path, f"an answer must have the header {protocol.DIGEST}")
        if wanted != found:
            raise self._error(path, f"the answer's sha256 must be {wanted[:64]!r}, got {found}")
        return response.content

    def _error(self, path: str, rule: str) -> RemoteTeacherError:
        return RemoteTeacherError(f"{self.url}{path}: {rule}")


def _cut(rows: Sequence[Row], about: About) -> Iterator[list[Row]]:
    """Yield rows, as many at a time as one request may ask for.

    Raises:
        RemoteTeacherError: a row alone is more than a request may ask for.
    """
    limits = about.limits
    part: list[Row] = []
    tokens = outputs = 0
    for row in rows:
        if len(row.ids) > min(limits.length, limits.tokens) or len(row.outputs) > limits.outputs:
            raise RemoteTeacherError(
                f"{about.name}: a row must have at most {min(limits.length, limits.tokens)} tokens "
                f"and {limits.outputs} scored ones, the server's limits, got {len(row.ids)} and "
                f"{len(row.outputs)}"
            )
        fits = (
            len(part) < limits.rows
            and tokens + len(row.ids) <= limits.tokens
            and outputs + len(row.outputs) <= limits.outputs
        )
        if part and not fits:
            yield part
            part, tokens, outputs = [], 0, 0
        part.append(row)
        tokens, outputs = tokens + len(row.ids), outputs + len(row.outputs)
    if part:
        yield part
