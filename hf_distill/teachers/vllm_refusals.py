"""Why a vLLM server has refused a request: its words, and what can be done about them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2

# Each cause by words of vLLM's errors (versions 0.26 and 0.32), in lower case
TOO_LONG = ("max_tokens must be at least 1", "maximum context length", "maximum model length")
TOO_LONG += ("longer than the maximum", "max_model_len")
OUT_OF_VOCABULARY = ("out of vocabulary",)
TOO_MANY_ENTRIES = ("max allowed", "max_logprobs", "max-logprobs")

CAUSES = {
    "too_long": TOO_LONG,
    "out_of_vocabulary": OUT_OF_VOCABULARY,
    "too_many_entries": TOO_MANY_ENTRIES,
}
HINTS = {
    "too_long": "the row of {tokens} tokens is longer than the server takes: cut rows, or start it "
    "with a larger --max-model-len",
    "out_of_vocabulary": "the row has an id that the server's model does not know, its largest is "
    "{largest}: the tokenizer must be the server's",
    "too_many_entries": "the server must allow --max-logprobs {top_k}",
}
SHOWN = 300  # characters of an answer in an error


class Refusal(NamedTuple):
    """Holds why a request was refused.

    Attributes:
        reason: the server's own words, or None.
        cause: a key of `CAUSES`, or None where the words are of none of them.
    """

    reason: str | None
    cause: str | None

    def words(self, **values: Any) -> str | None:
        """Return the server's words and what to do; values fill the hint. None without words."""
        if self.reason is None:
            return None
        hint = "" if self.cause is None else "; " + HINTS[self.cause].format(**values)
        return f"the server says {self.reason!r}{hint}"


def read_refusal(response: httpx2.Response) -> Refusal:
    """Read an answer of a status that is not 200."""
    reason = reason_in(response)
    if reason is None or response.status_code != 400:
        return Refusal(reason, None)
    said = reason.lower()
    found = (cause for cause, words in CAUSES.items() if any(x in said for x in words))
    return Refusal(reason, next(found, None))


def reason_in(response: httpx2.Response) -> str | None:
    """Return the message of an error as OpenAI's and vLLM's servers write it, or None."""
    try:
        said = response.json()
    except ValueError:
        return None
    inner = said.get("error", said) if isinstance(said, Mapping) else None
    message = inner.get("message") if isinstance(inner, Mapping) else inner
    return message if isinstance(message, str) and message else None


def shown(text: str) -> str:
    """Return the beginning of a text."""
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "")
