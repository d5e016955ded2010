"""A client of vLLM's completions endpoint: the log-probabilities of given tokens.

The request is `POST {url}/completions` with the prompt as token ids and `prompt_logprobs` k. The
answer holds, for each choice, `prompt_logprobs`: a list as long as the prompt, null for the first
token, else a map from token id (as text) to `{"logprob": ...}` of the k most probable tokens and of
the prompt's own token if it is not one of them. -inf is written as -9999. Read in vLLM 0.26's
`entrypoints/openai/completion` and `logprobs.py`; a server's `--max-logprobs` limits k, 20 unless
set.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

logger = logging.getLogger(__name__)

SHOWN = 300  # characters of an answer in an error
WRITTEN_AS_MINUS_INF = -9999.0
MASS_TOLERANCE = 1e-2  # of probabilities from 16-bit logits
RETRIED = (429, 500, 502, 503, 504)

TopK = dict[int, float]  # log-probability by token id


class RemoteTeacherError(RuntimeError):
    """The server did not answer, or it sent something else than log-probabilities."""


class Completions:
    """Asks the endpoint for completions; several threads may use it.

    Args:
        url: up to the version, such as "http://localhost:8000/v1".
        model: the name that the server knows it by.
        top_k: how many entries to ask for, >= 1.
        timeout: seconds without an answer after which a request has failed.
        retries: how often a request is sent again after a failed connection or a status of
            `RETRIED`.
        backoff: seconds before the first of them; doubled for each next one.
        api_key: sent as a bearer token, or None.
    """

    def __init__(
        self,
        url: str,
        model: str,
        top_k: int,
        timeout: float,
        retries: int,
        backoff: float,
        api_key: str | None,
    ) -> None:
        self.url = url.rstrip("/") + "/completions"
        self.model = model
        self.top_k = top_k
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx2.Client(timeout=timeout, headers=headers)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def top_log_probs(self, ids: Sequence[int]) -> list[TopK]:
        """Return the most probable tokens at positions 1 to len(ids) - 1, each given those before.

        Every position has `top_k` of them, or the whole vocabulary of the server if it is smaller.

        Raises:
            RemoteTeacherError: naming the url, and the status and the body if there are.
        """
        response = self._post({**self._options(), "prompt": list(ids)})
        try:
            (choice,) = response.json()["choices"]
            answered = choice["prompt_logprobs"]
            positions = None if answered is None else [read(entry) for entry in answered[1:]]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise self._error(
                response, f"the answer must be JSON with prompt_logprobs, got {error!r}"
            ) from error
        if positions is None or len(positions) != len(ids) - 1:
            got = "none" if positions is None else f"{len(positions) + 1}"
            raise self._error(
                response,
                f"prompt_logprobs must have {len(ids)} positions, as the prompt, got {got}",
            )
        for at, (own, entries) in enumerate(zip(ids[1:], positions, strict=True), start=1):
            fault = mass_fault(entries)
            if own not in entries:
                fault = (
                    f"the prompt's own token {own} must be among the entries, got {len(entries)}"
                )
            if fault is not None:
                raise self._error(response, f"position {at}: {fault}")
        return [largest(entries, self.top_k) for entries in positions]

    def _options(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt_logprobs": self.top_k,
            "max_tokens": 1,
            "temperature": 1.0,
        }

    def _post(self, body: dict[str, Any]) -> httpx2.Response:
        """Return the server's answer of status 200, after as many tries as are allowed."""
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        for trial in range(self.retries + 1):
            if trial:
                time.sleep(self.backoff * 2 ** (trial - 1))
            last = trial == self.retries
            try:
                response = self._client.post(self.url, content=content, headers=headers)
            except httpx2.TimeoutException as error:
                raise RemoteTeacherError(
                    f"{self.url}: no answer within {self.timeout:g} s"
                ) from error
            except httpx2.TransportError as error:
                if last:
                    raise RemoteTeacherError(
                        f"{self.url}: no connection in {trial + 1} tries: {error}"
                    ) from error
                logger.warning("%s: %s; trying again", self.url, error)
                continue
            if response.status_code == 200:
                return response
            if last or response.status_code not in RETRIED:
                raise self._error(response, self._refusal(response, trial + 1))
            logger.warning("%s: status %d; trying again", self.url, response.status_code)
        raise AssertionError("the last try returns or raises")

    def _refusal(self, response: httpx2.Response, tries: int) -> str:
        """Say what is wrong with an answer of another status: the server's own reason first."""
        reason, rule = reason_in(response), f"the status must be 200 (try {tries})"
        if reason is None:
            return rule
        hint = ""
        if "logprob" in reason.lower():
            hint = f"; the server must allow --max-logprobs {self.top_k}"
        return f"the server says {reason!r}{hint}; {rule}"

    def _error(self, response: httpx2.Response, rule: str) -> RemoteTeacherError:
        body = response.text
        shown = body[:SHOWN] + ("..." if len(body) > SHOWN else "")
        return RemoteTeacherError(
            f"{self.url}: {rule}; status {response.status_code}, body {shown!r}"
        )


def reason_in(response: httpx2.Response) -> str | None:
    """Return the message of an error as OpenAI's and vLLM's servers write it, or None."""
    try:
        said = response.json()
    except ValueError:
        return None
    inner = said.get("error", said) if isinstance(said, Mapping) else None
    message = inner.get("message") if isinstance(inner, Mapping) else inner
    return message if isinstance(message, str) and message else None


def read(entry: Mapping[str, Mapping[str, Any]]) -> TopK:
    """Read a position's entries as vLLM writes them."""
    return read_values({int(key): value["logprob"] for key, value in entry.items()})


def read_values(entries: Mapping[int, Any]) -> TopK:
    """Return log-probabilities by token id, with -inf where a server has written a number."""
    values = {key: float(value) for key, value in entries.items()}
    return {k: -math.inf if v <= WRITTEN_AS_MINUS_INF else v for k, v in values.items()}


def mass_fault(entries: TopK) -> str | None:
    """Return why these cannot be log-probabilities of one token, or None."""
    if not all(value <= MASS_TOLERANCE for value in entries.values()):
        worst = max(entries.values(), key=lambda x: math.inf if math.isnan(x) else x)
        return f"a log-probability must not be positive, got {worst:g}"
    mass = math.fsum(map(math.exp, entries.values()))
    if mass > 1 + MASS_TOLERANCE:
        return (
            f"the probabilities must not sum to more than 1, got {mass:g}: does the server "
            "return raw_logprobs?"
        )
    return None


def largest(entries: TopK, top_k: int) -> TopK:
    """Return the top_k most probable entries, in that order."""
    ordered = sorted(entries.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:top_k])
