"""A client of vLLM's completions endpoint: the log-probabilities of given tokens.

The request is `POST {url}/completions` with the prompt as token ids and `prompt_logprobs` k. The
answer holds, for each choice, `prompt_logprobs`: a list as long as the prompt, null for the first
token, else a map from token id (as text) to `{"logprob": ...}` of the k most probable tokens and of
the prompt's own token if it is not one of them. -inf is written as -9999. A server's
`--max-logprobs` limits k, 20 unless set.

A server generates one token at least, so that a prompt is shorter than its `max_model_len`. A row
of just that length is sent without its last token, and the distribution that the server draws the
generated token from is the last position's. Read in vLLM 0.26 and seen in 0.32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from hf_distill.teachers.server_requests import RemoteTeacherError, Retries, ServerRequests
from hf_distill.teachers.vllm_refusals import read_refusal, shown

WRITTEN_AS_MINUS_INF = -9999.0
MASS_TOLERANCE = 1e-2  # of probabilities from 16-bit logits
TOKEN_ID = "token_id:"  # before ids that stand for tokens, by return_tokens_as_token_ids
# A sampler that draws from the model's distribution: nothing of a server's defaults
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

TopK = dict[int, float]  # log-probability by token id


class Refused(RemoteTeacherError):
    """The server's status is not 200; `cause` is a key of `vllm_refusals.CAUSES` or None."""

    def __init__(self, message: str, cause: str | None) -> None:
        super().__init__(message)
        self.cause = cause


class Completions:
    """Asks the endpoint for completions; several threads may use it.

    Args:
        url: up to the version, such as "http://localhost:8000/v1".
        model: the name that the server knows it by.
        top_k: how many entries to ask for, >= 1.
        timeout: seconds without an answer after which a request has failed.
        retries: when a failed request is sent again; or how often at most, in ten minutes.
        backoff: seconds before the first of them, where `retries` is a number.
        api_key: sent as a bearer token, or None.
        max_requests: how many are under way at a time.

    Attributes:
        max_model_len: tokens that the server takes with the generated one, or None: not known.
        requests: sends them.
    """

    def __init__(
        self,
        url: str,
        model: str,
        top_k: int,
        timeout: float,
        retries: Retries | int,
        backoff: float,
        api_key: str | None,
        max_requests: int = 8,
    ) -> None:
        self.base = url.rstrip("/")
        self.url = self.base + "/completions"
        self.model = model
        self.top_k = top_k
        self.max_model_len: int | None = None
        if isinstance(retries, int):
            retries = Retries(backoff, 600.0, retries)
        self.requests = ServerRequests(timeout, retries, api_key, max_requests)

    def close(self) -> None:
        """Close the connections."""
        self.requests.close()

    def top_log_probs(self, ids: Sequence[int]) -> list[TopK]:
        """Return the most probable tokens at positions 1 to len(ids) - 1, each given those before.

        Every position has `top_k` of them, or the whole vocabulary of the server if it is smaller.

        Raises:
            RemoteTeacherError: naming the url, and the status and the body if there are.
        """
        longest = self.max_model_len
        if longest is not None and len(ids) > longest:
            raise Refused(
                f"{self.url}: a row must have at most the server's max_model_len of {longest} "
                f"tokens, got {len(ids)}: cut rows, or start it with a larger --max-model-len",
                "too_long",
            )
        if len(ids) != longest:
            try:
                return self._of_prompt(ids)
            except Refused as refused:
                # the limit may be unknown, or lower since the server was started again
                if refused.cause != "too_long" or len(ids) < 2:
                    raise
        return self._of_prompt(ids[:-1], and_next=True)

    def _of_prompt(self, ids: Sequence[int], *, and_next: bool = False) -> list[TopK]:
        """Return what the server says of a prompt, and of the token behind it."""
        options: dict[str, Any] = {"prompt_logprobs": self.top_k}
        if and_next:
            options |= {"logprobs": self.top_k, "return_tokens_as_token_ids": True} | PLAIN
        response = self.complete(ids, options, len(ids) + and_next)
        try:
            (choice,) = response.json()["choices"]
            answered = choice["prompt_logprobs"]
            positions = None if answered is None else [read(entry) for entry in answered[1:]]
            behind = [_of_generated(choice)] if and_next else []
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise self.error(
                response, f"the answer must be JSON with prompt_logprobs, got {error!r}"
            ) from error
        if positions is None or len(positions) != len(ids) - 1:
            got = "none" if positions is None else f"{len(positions) + 1}"
            raise self.error(
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
                raise self.error(response, f"position {at}: {fault}")
        for entries in behind:
            fault = mass_fault(entries)
            if fault is not None:
                raise self.error(response, f"the generated token: {fault}")
        return [largest(entries, self.top_k) for entries in (*positions, *behind)]

    def complete(
        self, ids: Sequence[int], options: Mapping[str, Any], num_tokens: int | None = None
    ) -> httpx2.Response:
        """Ask for one token behind a prompt; return the answer of status 200.

        Args:
            ids: the prompt.
            options: of the request, beside these.
            num_tokens: of the row that the prompt is from, for an error; None: it is the prompt.

        Raises:
            Refused: it is of another status.
            RemoteTeacherError: there was none.
        """
        asked = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0}
        response = self.requests.send("POST", self.url, asked | dict(options))
        if response.status_code == 200:
            return response
        refusal = read_refusal(response)
        words = refusal.words(tokens=num_tokens or len(ids), largest=max(ids), top_k=self.top_k)
        rule = f"{words or ''}; the status must be 200".removeprefix("; ")
        raise Refused(str(self.error(response, rule)), refusal.cause)

    def error(self, response: httpx2.Response, rule: str) -> RemoteTeacherError:
        """Return the error that names a rule, and what was answered."""
        return RemoteTeacherError(
            f"{self.url}: {rule}; status {response.status_code}, body {shown(response.text)!r}"
        )


def _of_generated(choice: Mapping[str, Any]) -> TopK:
    """Read the distribution that the only generated token was drawn from."""
    (entries,) = choice["logprobs"]["top_logprobs"]
    return read_values({int(key.removeprefix(TOKEN_ID)): x for key, x in entries.items()})


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
