"""Answers of vLLM and of other OpenAI-compatible servers, in the forms in which they are kept.

An answer is a whole response (with `choices`), a line of a batch's output (`response.body`), or
one choice. The fields that are read, of a choice or beside the choices:

- `input_ids`: the ids of the row. Or `prompt_token_ids` (or `prompt`, as ids), and for what was
  sampled `token_ids` (vLLM's `return_token_ids`) or tokens that are ids.
- `prompt_logprobs`, as vLLM writes them: a list with null, then for each next token of the prompt a
  map from id to `{"logprob": ...}`. It has the k most probable tokens and the prompt's own one.
- `logprobs` of a completion: its `top_logprobs` are maps from "token_id:<id>" to the number (vLLM's
  `return_tokens_as_token_ids`), null where nothing is known. With `echo` they begin with null and
  the prompt's, else they are those of the completion.
- `logprobs` of a chat completion: its `content` has a token and its `top_logprobs` each.

Tokens as text are refused: those that are parts of one UTF-8 character have the same text, and of
20 entries 8 were left so (vLLM 0.32).

Shapes: L ids of a row, P of the prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.teachers import vllm_client
from hf_distill.teachers.vllm_client import TopK

TOKEN_ID = "token_id:"  # vLLM's tokens as ids, where a protocol wants text
IDS = ("input_ids", "prompt_token_ids")
SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class Answer:
    """Holds what a server said of a row.

    Attributes:
        ids: of the row and what was generated behind it.
        lengths: how many of them are the row; others may follow, of rows that it answers too.
        prompt_log_probs: raw entries at positions 0, 1, ..., or None.
        sampled: raw entries from the position `start` on, or None. Those behind ids are of
            generated tokens whose ids are not known.
        start: see `sampled`.
    """

    ids: list[int]
    lengths: tuple[int, ...]
    prompt_log_probs: Sequence[Any] | None
    sampled: Sequence[Any] | None
    start: int

    @property
    def row(self) -> list[int]:
        """Return the ids of the row."""
        return self.ids[: self.lengths[0]]

    def entries(self) -> list[TopK | None]:
        """Return the entries at positions 1 to len(ids) - 1, None where nothing is known.

        Raises:
            ValueError: an entry is of no form that is read here; naming its position.
        """
        found: list[TopK | None] = [None] * len(self.ids)
        parts = ((0, self.prompt_log_probs, _of_vllm), (self.start, self.sampled, _sample))
        for first, values, read in parts:
            for at, value in enumerate((values or ())[: len(found) - first], first):
                if value is not None:
                    found[at] = _entry(value, at, read)
        return found[1:]


def read_answers(content: Any) -> list[Answer]:
    """Return the answers of a line, one for each choice of a response.

    Raises:
        ValueError: it is of no form that is read here.
    """
    if isinstance(content, list) and content and content[0] is None:
        raise ValueError(
            "the ids of a row must stand beside its log-probabilities, which do not name the first "
            'token: {"input_ids": [...], "prompt_logprobs": [...]}'
        )
    body = _body(_object("a line", content))
    choices = body.get("choices")
    if choices is None:
        return [_answer(body)]
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"choices must be a list with at least one choice, got {_short(choices)}")
    shared = {key: value for key, value in body.items() if key != "choices"}
    given = [{k: v for k, v in _object("a choice", x).items() if v is not None} for x in choices]
    return [_answer(shared | choice) for choice in given]


def _body(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the response itself: of a batch's output it is one of the fields."""
    response = content.get("response")
    if isinstance(response, Mapping) and "body" in response:
        status = response.get("status_code")
        if status != 200:
            raise ValueError(f"the status of a response must be 200, got {status}")
        content = {**content, **_object("body", response["body"])}
    error = content.get("error")
    if error is not None:
        raise ValueError(f"there must be an answer, got the error {_short(error)}")
    return content


def _answer(content: Mapping[str, Any]) -> Answer:
    given, prompt, completion = (_ids(content, x) for x in (*IDS, "token_ids"))
    if prompt is None and isinstance(content.get("prompt"), list):
        prompt = _ids(content, "prompt")
    scored = content.get("prompt_logprobs")
    if scored is not None and not isinstance(scored, list):
        raise ValueError(f"prompt_logprobs must be a list, got {_short(scored)}")
    sampled, tokens = _sampled(content.get("logprobs"))
    if given is None and prompt is None:
        raise ValueError(
            f"there must be {' or '.join(IDS)} (a server sends them with return_token_ids), got "
            f"{_fields(content)}"
        )
    if scored is None and sampled is None:
        raise ValueError(
            "there must be prompt_logprobs, or logprobs with top_logprobs or content, got "
            f"{_fields(content)}: ask the server with logprobs or prompt_logprobs of at least 1"
        )
    if given is not None:
        return _of_row(given, prompt, completion or tokens, scored, sampled)
    assert prompt is not None
    return _of_prompt(prompt, completion, tokens, scored, sampled)


def _of_row(
    ids: list[int],
    prompt: list[int] | None,
    completion: list[int] | None,
    scored: list[Any] | None,
    sampled: list[Any] | None,
) -> Answer:
    """Return the answer for a row that is known: only where it was scored is to be found out."""
    length, num_scored, num_sampled = len(ids), len(scored or ()), len(sampled or ())
    whole, start = num_scored == length, 0
    if sampled is None:
        start = length
    elif _echoes(sampled):
        if num_sampled not in (length, length + 1):
            raise ValueError(
                f"there must be {length} positions, as ids, or one more for the token behind them, "
                f"got {num_sampled}"
            )
        whole = True
    elif whole:
        start = length  # what was generated is not the row's
    elif 0 < num_sampled < length:
        start = length - num_sampled
        ends = completion is not None and ids[start:] == completion[-num_sampled:]
        whole = ends or start in (num_scored, len(prompt or ()))
    if not whole:
        raise ValueError(
            f"there must be {length} positions, as ids, got {num_scored} of the prompt and "
            f"{num_sampled} of a completion that must be the end of the row (a list that has the "
            "prompt too begins with null, as nothing predicts the first token)"
        )
    return Answer(ids, (length,), scored, sampled, start)


def _of_prompt(
    prompt: list[int],
    completion: list[int] | None,
    tokens: list[int] | None,
    scored: list[Any] | None,
    sampled: list[Any] | None,
) -> Answer:
    """Return the answer for a prompt and what was sampled behind it, if its ids are known."""
    count, echoes = len(prompt), sampled is not None and _echoes(sampled)
    if tokens is not None and echoes:
        if tokens[:count] != prompt:
            raise ValueError("an answer with echo must begin with the tokens of prompt_token_ids")
        tokens = tokens[count:]
    ids = prompt + (completion or tokens or [])
    whole = len(ids)
    start = 0 if echoes else count
    is_scored = scored is not None or echoes
    if echoes:
        wanted = {count, whole, count + 1} if whole == count else {count, whole}
    else:
        wanted = {whole - count}
    leaves_it = is_scored and not echoes and whole == count  # nothing says what was sampled
    wrong = scored is not None and len(scored) != count
    if wrong or (sampled is not None and not leaves_it and len(sampled) not in wanted):
        got = len(scored or ()) if wrong else len(sampled or ())
        raise ValueError(
            f"there must be {count if wrong else max(wanted)} positions, as ids, got {got} (the "
            "ids of what was sampled come with return_token_ids)"
        )
    if not is_scored:
        return Answer(ids, (whole,), scored, sampled, start)
    # one token is what a server generates because it must
    lengths = (count, whole) if whole <= count + 1 or sampled is None else (whole, count)
    return Answer(ids, tuple(dict.fromkeys(lengths)), scored, sampled, start)


def _echoes(sampled: Sequence[Any]) -> bool:
    """Say whether entries begin with the prompt's first token, which nothing predicts."""
    return len(sampled) > 0 and sampled[0] is None


def _sampled(logprobs: Any) -> tuple[list[Any] | None, list[int] | None]:
    """Return the raw entries of `logprobs` and, if they say them, the ids of the tokens."""
    if logprobs is None:
        return None, None
    logprobs = _object("logprobs", logprobs)
    content = logprobs.get("content")
    if content is not None:
        tokens = [_object("a token", each).get("token") for each in content]
        return list(content), _token_ids(tokens)
    top = logprobs.get("top_logprobs")
    if top is None:
        return None, None
    if not isinstance(top, list):
        raise ValueError(f"top_logprobs must be a list, got {_short(top)}")
    return top, _token_ids(logprobs.get("tokens"))


def _token_ids(tokens: Any) -> list[int] | None:
    if not isinstance(tokens, list) or not tokens:
        return None
    if not all(isinstance(x, str) and x.startswith(TOKEN_ID) for x in tokens):
        return None
    return [_token_id(x) for x in tokens]


def _token_id(token: Any) -> int:
    """Return the id of a token that is written as one.

    Raises:
        ValueError: it is text.
    """
    number = token.removeprefix(TOKEN_ID) if isinstance(token, str) else ""
    if number == token or not number.isdecimal():
        raise ValueError(
            f"tokens must be ids ('{TOKEN_ID}5'), got the text {_short(token)}: tokens that are "
            "parts of one UTF-8 character have the same text, and are lost (8 of 20 were left); "
            "ask the server with return_tokens_as_token_ids"
        )
    return int(number)


def _entry(value: Any, at: int, read: Callable[[Mapping[str, Any]], TopK]) -> TopK:
    """Read a position's entries; errors name the position."""
    try:
        return read(_object("a position", value))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        rule = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"position {at}: {rule}") from error


def _of_vllm(content: Mapping[str, Any]) -> TopK:
    """Read a position of `prompt_logprobs`.

    The prompt's own token is among them whatever its rank: where entries between it and the others
    are missing, it is left out.
    """
    entries = vllm_client.read(content)
    ranks = {int(key): value.get("rank") for key, value in content.items()}
    return {k: v for k, v in entries.items() if (ranks[k] or 0) <= len(entries)}


def _sample(content: Mapping[str, Any]) -> TopK:
    """Read a position of a completion or of a chat completion."""
    if "top_logprobs" in content:
        return _of_chat(content)
    return vllm_client.read_values({_token_id(k): v for k, v in content.items()})


def _of_chat(content: Mapping[str, Any]) -> TopK:
    """Read a position of a chat completion.

    vLLM cuts its list to as many as were asked for, with the sampled token first: if that is the
    least probable one, a token between it and the others may have fallen out. It is left out then,
    unless no token beside the list can have more.
    """
    listed = [_object("an entry", x) for x in content["top_logprobs"]]
    entries = vllm_client.read_values({_token_id(x["token"]): x["logprob"] for x in listed})
    if not entries:
        return entries
    sampled = next(iter(entries))
    rest = 1 - math.fsum(map(math.exp, entries.values()))
    if entries[sampled] <= min(entries.values()) and math.exp(entries[sampled]) < rest:
        del entries[sampled]
    return entries


def _ids(content: Mapping[str, Any], name: str) -> list[int] | None:
    ids = content.get(name)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(x) is int for x in ids):
        raise ValueError(f"{name} must be a list of ids, got {_short(ids)}")
    return ids


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {_short(value)}")
    return value


def _fields(content: Mapping[str, Any]) -> list[str]:
    return sorted(key for key, value in content.items() if value is not None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
