"""A server of a teacher's hidden states: HTTP around a queue, with limits on everything.

`teachers.hidden_protocol` describes what is said. There is no encryption: on a machine that others
reach, put it behind something that has (a tunnel, a proxy).
"""

import hmac
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_distill.cache.fingerprints import plain, teacher_identity
from hf_distill.models.structure import causal_lm, generation_end_ids
from hf_distill.models.tokenizers import ids_digest
from hf_distill.serving.hidden_model import Busy, HiddenModel, ModelQueue
from hf_distill.teachers import hidden_protocol as protocol
from hf_distill.teachers.hidden_protocol import About, Limits, ProtocolError

logger = logging.getLogger(__name__)

IDLE = 60.0  # seconds that a connection may be silent, and that the headers of a request may take
SLOWEST = 2**16  # bytes of a body that must come in a second
CONNECTIONS = 64  # at a time
SENT_BYTES = 2**20  # at a time
ANSWER_BYTES = 2**28  # of hidden states in an answer, at most
RETRY_AFTER = 1  # seconds
LENGTH = 8192  # tokens of a row, where a model names no limit


class Refused(Exception):
    """A request is answered with a status of 4xx or 5xx, and a text."""

    def __init__(self, status: int, rule: str, **headers: str) -> None:
        super().__init__(rule)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HiddenStateServer(ThreadingHTTPServer):
    """Answers token ids with a model's last hidden states, see `HiddenStateTeacher`.

    Args:
        model: a causal LM on its device; it is run in eval mode.
        host: the address that it listens at. Only this machine reaches the default.
        port: the port. 0 takes a free one.
        token: what requests must bear. None lets every request in, which only an address of this
            machine allows.
        tokenizer: of the model, for comparisons with the students'; or None.
        max_rows: the largest number of rows in a request.
        max_tokens: the largest number of tokens in a request.
        max_length: the largest number of tokens in a row. None takes the model's.
        max_waiting: the number of requests that may wait for the model. More get status 503.
        batch_tokens: the number of tokens in a forward, padding included. One row may have more.
        revision: of the model's repository, which is told.

    Attributes:
        about: what the server says of itself.
        url: where it is.

    Raises:
        ValueError: an argument is out of range, or the model cannot be read by its hidden states.
        OSError: the address is taken.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        model: nn.Module,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_rows: int = 256,
        max_tokens: int = 65536,
        max_length: int | None = None,
        max_waiting: int = 16,
        batch_tokens: int = 16384,
        revision: str | None = None,
    ) -> None:
        given = {"max_rows": max_rows, "max_tokens": max_tokens, "max_waiting": max_waiting}
        given |= {"batch_tokens": batch_tokens}
        given |= {} if max_length is None else {"max_length": max_length}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise ValueError("the token must be printable ASCII, and not empty")
        if token is None and not is_loopback(host):
            raise ValueError(
                f"a server that other machines reach needs a token, got host {host!r} without one"
            )
        self._token = None if token is None else token.encode()
        hidden = HiddenModel(model, batch_tokens)
        length = max_length or _length(model)
        outputs = ANSWER_BYTES // (hidden.head.weight.shape[1] * hidden.head.weight.itemsize)
        limits = Limits(max_rows, max_tokens, min(length, max_tokens), outputs, max_waiting)
        self.head = protocol.encode_head(hidden.head)
        digest = protocol.sha256_of(self.head)
        self.about = _about(model, tokenizer, hidden, limits, digest, revision)
        self.answers = ModelQueue(hidden, max_waiting)
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._ends: dict[socket.socket, float] = {}  # when what is awaited must have come
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_port}"

    def allows(self, header: str | None) -> bool:
        """Return whether a request bears the token; how long it takes does not tell how near."""
        if self._token is None:
            return True
        wanted = b"Bearer " + self._token
        return hmac.compare_digest((header or "").encode("latin-1", "replace"), wanted)

    def knows(self, header: str | None) -> bool:
        """Return whether a request's Host may be this server's.

        Without a token a page in this machine's browser could ask under a name of its own, which
        the browser says.
        """
        if self._token is not None or header is None:
            return True
        try:
            return is_loopback(urlsplit(f"//{header}").hostname or "")
        except ValueError:
            return False

    def expect(self, connection: socket.socket, seconds: float | None) -> None:
        """Give a connection so much time until it is told otherwise; None is no limit."""
        if seconds is None:
            self._ends.pop(connection, None)
        else:
            self._ends[connection] = time.monotonic() + seconds

    def service_actions(self) -> None:
        """End the connections that send too slowly, which would keep others out."""
        now = time.monotonic()
        for connection, end in list(self._ends.items()):
            if end < now:
                logger.info("a connection ends: a request was sent too slowly")
                self.expect(connection, None)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Do as the class does, for so many connections at a time."""
        if self._slots.acquire(blocking=False):
            self._open.add(request)
            try:
                super().process_request(request, client_address)
            except BaseException:  # no thread could be started
                self._let_go(request)
                raise
            return
        text = f"HTTP/1.1 503 Busy\r\nRetry-After: {RETRY_AFTER}\r\nContent-Length: 0\r\n"
        with suppress(OSError):  # who asked may have gone
            request.settimeout(1.0)
            request.sendall(text.encode() + b"Connection: close\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Do as the class does, and let another connection in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._let_go(request)

    def _let_go(self, request: Any) -> None:
        self._open.discard(request)
        self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection ended with; others go on."""
        logger.debug("a connection of %s ended", client_address, exc_info=True)

    def close(self) -> None:
        """Free the port and end the connections; the requests that wait are answered first."""
        self.server_close()
        self.answers.close()
        for connection in list(self._open):  # no more is read from them
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)


def _length(model: nn.Module) -> int:
    config: Any = getattr(causal_lm(model), "config", None)
    found = None if config is None else config.get_text_config()
    return getattr(found, "max_position_embeddings", None) or LENGTH


def _about(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    hidden: HiddenModel,
    limits: Limits,
    head_sha256: str,
    revision: str | None,
) -> About:
    head, identity = hidden.head, plain(teacher_identity(model, revision))
    return About(
        name=identity["name_or_path"],
        teacher=identity,
        dtype=str(head.weight.dtype).removeprefix("torch."),
        shape=(head.weight.shape[0], head.weight.shape[1]),
        has_bias=head.bias is not None,
        logit_scale=float(head.logit_scale),
        softcap=None if head.softcap is None else float(head.softcap),
        head_sha256=head_sha256,
        tokenizer_sha256=None if tokenizer is None else ids_digest(tokenizer),
        end_ids=generation_end_ids(causal_lm(model)),
        limits=limits,
    )


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hf_distill", ""
    timeout = IDLE
    server: HiddenStateServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle_one_request(self) -> None:
        """Do as the class does, in so much time until the headers are there."""
        self.server.expect(self.connection, IDLE)
        try:
            super().handle_one_request()
        finally:
            self.server.expect(self.connection, None)

    def do_GET(self) -> None:
        """Say what the server is, or send the head."""
        self._respond(self._get)

    def do_POST(self) -> None:
        """Send hidden states."""
        self._respond(self._post)

    def _get(self) -> tuple[bytes, str]:
        if self._sizes() not in ([], ["0"]):
            raise Refused(400, "a GET must have no body: it would be read as the next request")
        if self.path == protocol.ASK:
            return json.dumps(self.server.about.to_json()).encode(), "application/json"
        if self.path == protocol.HEAD:
            return self.server.head, protocol.CONTENT_TYPE
        raise Refused(404, f"the path must be {protocol.ASK} or {protocol.HEAD}")

    def _post(self) -> tuple[bytes, str]:
        if self.path != protocol.ASK:
            raise Refused(
                404,
                f"the path must be {protocol.ASK}: this server sends hidden states, which a "
                "HiddenStateTeacher asks for",
            )
        if self.headers.get_content_type() != protocol.CONTENT_TYPE:
            raise Refused(415, f"the content type must be {protocol.CONTENT_TYPE}")
        body, about = self._body(), self.server.about
        rows = protocol.decode_rows(body, about.limits, about.shape[0])
        try:
            waiting = self.server.answers.submit(rows)
        except Busy:
            rule = f"at most {about.limits.requests} requests may wait: come back"
            raise Refused(503, rule, Retry_After=str(RETRY_AFTER)) from None
        hidden = waiting.result()
        return protocol.encode_answer(hidden, about, protocol.sha256_of(body)), (
            protocol.CONTENT_TYPE
        )

    def _sizes(self) -> list[str]:
        """Return what the headers say of the body's size: one Content-Length, or something else."""
        return [
            *(self.headers.get_all("Content-Length") or []),
            *(self.headers.get_all("Transfer-Encoding") or []),
        ]

    def _body(self) -> bytes:
        sizes, most = self._sizes(), self.server.about.limits.bytes
        if len(sizes) != 1 or self.headers.get("Transfer-Encoding") is not None:
            raise Refused(411, "a request must have one Content-Length, and no Transfer-Encoding")
        (length,) = sizes
        if not (length.isascii() and length.isdigit()) or len(length) > len(str(most)):
            raise Refused(413, f"Content-Length must be a number up to {most}")
        if int(length) > most:
            raise Refused(413, f"a body must have at most {most} bytes, got {length}")
        self.server.expect(self.connection, IDLE + int(length) / SLOWEST)
        body = self.rfile.read(int(length))
        self.server.expect(self.connection, None)
        if len(body) != int(length):
            raise ConnectionError("the body ended before its length")
        return body

    def _respond(self, make: Callable[[], tuple[bytes, str]]) -> None:
        """Send what is made, or why it is not."""
        self.server.expect(self.connection, None)
        try:
            if not self.server.knows(self.headers.get("Host")):
                raise Refused(
                    403, "the Host must be this machine's own name, or the server have a token"
                )
            if not self.server.allows(self.headers.get("Authorization")):
                raise Refused(401, "the token must be the server's", WWW_Authenticate="Bearer")
            body, kind = make()
        except Refused as refused:
            self._refuse(refused)
        except ProtocolError as error:
            self._refuse(Refused(400, str(error)))
        except OSError:
            self.close_connection = True  # who asked has gone, or is silent
        except Exception as error:
            self._refuse(Refused(500, f"the model failed: {type(error).__name__}"))
        else:
            self._send(200, body, kind, {protocol.DIGEST: protocol.sha256_of(body)})

    def _refuse(self, refused: Refused) -> None:
        logger.info("status %d: %s", refused.status, refused)
        self.close_connection = True  # the body may not have been read
        body = json.dumps({"error": {"message": str(refused), "code": refused.status}}).encode()
        headers = refused.headers | {"Connection": "close"}
        self._send(refused.status, body, "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            sizes = {"Content-Type": kind, "Content-Length": str(len(body))}
            for name, value in (sizes | headers).items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(body), SENT_BYTES):  # each has the time of IDLE
                self.wfile.write(memoryview(body)[start : start + SENT_BYTES])
        except OSError:
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no request that the class reads: the fault is that of who asks."""
        self.request_version = self.protocol_version  # what cannot be read counts as HTTP/0.9
        status = {501: 405, 505: 400}.get(code, code)
        self._refuse(Refused(status, message or explain or "the request must be HTTP/1.1"))

    def log_message(self, format: str, *args: Any) -> None:
        """Log at the level of debugging."""
        logger.debug(format, *args)


def describe(server: HiddenStateServer) -> str:
    """Return a line about a server, for the log."""
    about = server.about
    return (
        f"{about.name} at {server.url}: {about.shape[1]} hidden units in {about.dtype}, "
        f"{about.shape[0]} logits, limits {asdict(about.limits)}"
    )
