"""What a real vLLM server answers, in a file: `python -m tests.hf_distill.servers.recorded`.

A case is a request that depends on the limits of the server that it is sent to, so that the
stand-in of `make test`, with its small model, is asked the same. Two answers are compared by their
form: the names and types of fields, the order of entries, status and text of refusals but for the
numbers in them.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from convert_gguf import resolve_model

from tests.hf_distill.servers import starting, venvs

FILE = Path(__file__).with_name("recorded.json")
K = 3
PROMPT = [5, 29, 28, 30, 33]
Json = Any


class Limits(NamedTuple):
    """What a server takes."""

    model: str
    vocab_size: int
    max_model_len: int
    max_logprobs: int


class Answer(NamedTuple):
    """What a server answers."""

    status: int
    content: Json


Case = Callable[[Limits], dict[str, Any]]
REAL = Limits(starting.NAME, 49152, 256, 20)
CASES: dict[str, Case] = {
    "scored": lambda _: {"prompt": PROMPT, "prompt_logprobs": K},
    "own tokens only": lambda _: {"prompt": PROMPT, "prompt_logprobs": 0},
    "one token": lambda _: {"prompt": PROMPT[:1], "prompt_logprobs": K},
    "nothing scored": lambda _: {"prompt": PROMPT},
    "generated": lambda _: {"prompt": PROMPT[:2], "logprobs": K, "prompt_logprobs": K,
                            "return_tokens_as_token_ids": True},
    "longest": lambda it: {"prompt": [5] * (it.max_model_len - 1)},
    "no room": lambda it: {"prompt": [5] * it.max_model_len, "prompt_logprobs": K},
    "too long": lambda it: {"prompt": [5] * (it.max_model_len + 3), "prompt_logprobs": K},
    "out of vocabulary": lambda it: {"prompt": [5, it.vocab_size, 6], "prompt_logprobs": K},
    "too many entries": lambda it: {"prompt": PROMPT, "prompt_logprobs": it.max_logprobs + 1},
    "too many generated": lambda it: {"prompt": PROMPT, "logprobs": it.max_logprobs + 1},
    "another model": lambda _: {"prompt": PROMPT, "prompt_logprobs": K, "model": "other"},
    "no prompt": lambda _: {"prompt": [], "prompt_logprobs": K},
}  # fmt: skip
PATHS = ("models",)  # that are read
VOLATILE = ("id", "created", "root", "text", "system_fingerprint", "rank")


def ask(url: str, limits: Limits, name: str) -> Answer:
    """Send a case to a server, or read one of its paths."""
    with httpx2.Client(trust_env=False, verify=False, timeout=120) as client:
        if name in PATHS:
            response = client.get(f"{url}/{name}")
        else:
            body = {"model": limits.model, "max_tokens": 1, "temperature": 1.0, "seed": 0}
            response = client.post(f"{url}/completions", json=body | CASES[name](limits))
    return Answer(response.status_code, response.json())


def read() -> tuple[dict[str, Any], dict[str, Answer]]:
    """What is known of the recording, and its answers by case."""
    content = json.loads(FILE.read_text())
    return content, {name: Answer(*answer) for name, answer in content.pop("answers").items()}


def form(value: Json) -> Json:
    """Names and types: what two answers of one server to one request have in common.

    Maps from tokens have one form for all their entries, and lists one for each of theirs.
    """
    if isinstance(value, Mapping):
        if value and all(re.fullmatch(r"(token_id:)?\d+|<\d+>", key) for key in value):
            return {"token": form(next(iter(value.values())))}
        return {key: form(each) for key, each in value.items()}
    if isinstance(value, list):
        return [form(each) for each in value]
    return None if value is None else type(value).__name__


def text(answer: Answer) -> tuple[int, str]:
    """Status and text of a refusal, without its numbers and the names of models."""
    said = answer.content["error"]
    words = re.sub(r"\d+", "N", said["message"])
    words = re.sub(r"Valid aliases: \S+", "Valid aliases: NAME.", words)
    return answer.status, f"{said['type']}, {said['param']}, {said['code']}: {words}"


def faults(request: Mapping[str, Any], content: Json) -> list[str]:
    """What in an answer of status 200 is against the rules that the client relies on."""
    (choice,) = content["choices"]
    k, positions = request.get("prompt_logprobs"), choice["prompt_logprobs"]
    if k is None:
        return [] if positions is None else ["prompt_logprobs must be null if none are asked for"]
    found = []
    if len(positions) != len(request["prompt"]) or positions[0] is not None:
        found.append(f"one position a token and null first, got {len(positions)}")
    for own, entries in zip(request["prompt"][1:], positions[1:], strict=True):
        ranks = [entry["rank"] for entry in entries.values()]
        values = [entry["logprob"] for entry in entries.values()]
        if next(iter(entries)) != str(own):
            found.append(f"the prompt's own token {own} first, got {next(iter(entries))}")
        if len(entries) != k + (ranks[0] > k) and k:
            found.append(f"{k} entries and the token of rank {ranks[0]}, got {len(entries)}")
        if ranks[1:] != [rank for rank in range(1, k + 1) if rank != ranks[0]]:
            found.append(f"ranks from 1 to {k} behind the own token's, got {ranks}")
        if values[1:] != sorted(values[1:], reverse=True) or max(values) > 0:
            found.append(f"negative log-probabilities that descend, got {values}")
    return found


def same(one: Json, other: Json, apart: float) -> bool:
    """Whether two answers of equal servers are equal, with numbers up to a difference."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(
            key in VOLATILE or same(one[key], other[key], apart) for key in one
        )
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same(x, y, apart) for x, y in pairs)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= apart
    return bool(one == other)


def main() -> None:
    """Ask a server of its own, and write the file."""
    package, version = venvs.ENGINES["vllm"].name_and_version
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_model_len": REAL.max_model_len, "max_logprobs": REAL.max_logprobs}
        model = Path(resolve_model("smollm2-135m"))
        with starting.vllm_server(model, Path(folder), **options) as url:
            answers = {name: ask(url, REAL, name) for name in (*CASES, *PATHS)}
    for card in answers["models"].content["data"]:
        card["root"] = starting.NAME  # a folder of this machine
    about = {"server": f"{package} {version}", "date": date.today().isoformat()}
    about |= {"model": "SmolLM2-135M-Instruct (Q4_1 in float32)", "limits": REAL._asdict()}
    lines = ",\n".join(f'"{name}": {json.dumps(answer)}' for name, answer in answers.items())
    FILE.write_text(json.dumps(about)[:-1] + f',\n"answers": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
