"""Whether a server's model has the vocabulary and the tokenizer that it must have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_distill.models.tokenizers import describe, num_ids
from hf_distill.teachers.server_requests import RemoteTeacherError
from hf_distill.teachers.vllm_client import Completions, Refused

MOST_IDS = 2**24  # more than any vocabulary has
COMPARED = 64  # tokens of the vocabulary, evenly spread, and as many that were added
SHOWN = 3  # tokens in an error
UNKNOWN = "\ufffd"  # stands for a part of a character, which a server may complete


def count_ids(knows: Callable[[int], bool], expected: int) -> int | None:
    """Return how many ids a server knows, or None if there is no end to them.

    Args:
        knows: asks for an id; it is called twice if the number is the expected one.
        expected: the number, >= 1.
    """
    if knows(expected - 1):
        if not knows(expected):
            return expected
        known, unknown = expected, 2 * expected
        while knows(unknown):
            known, unknown = unknown, 2 * unknown
            if known > MOST_IDS:
                return None
    else:
        known, unknown = -1, expected - 1
    while unknown - known > 1:
        middle = (known + unknown) // 2
        known, unknown = (middle, unknown) if knows(middle) else (known, middle)
    return unknown


def ask_num_ids(client: Completions, expected: int) -> int | None:
    """Ask a vLLM server how many ids its model knows: it refuses others by name.

    Raises:
        RemoteTeacherError: it does not answer, or refuses for another reason.
    """

    def knows(token: int) -> bool:
        try:
            client.complete([token], {})
        except Refused as refused:
            if refused.cause != "out_of_vocabulary":
                raise
            return False
        return True

    return count_ids(knows, expected)


def compared_ids(tokenizer: PreTrainedTokenizerBase, vocab: int, most: int) -> list[int]:
    """Return ids to compare: some of the vocabulary, and some of the tokens that were added.

    Args:
        tokenizer: the student's.
        vocab: ids that the server knows.
        most: how many there may be.
    """
    size = min(num_ids(tokenizer), vocab)
    count = min(COMPARED, size)
    spread = [size * i // count for i in range(count)]
    added = [i for i in sorted(tokenizer.added_tokens_decoder) if i < size][-COMPARED:]
    return list(dict.fromkeys([*added, *spread]))[:most]


def compare_tokens(
    client: Completions, tokenizer: PreTrainedTokenizerBase, vocab: int, longest: int | None
) -> int:
    """Compare the student's tokens with those that a server says it decodes ids to.

    White space is not compared, which versions of tokenizers treat differently, nor are parts of
    characters.

    Returns:
        How many were compared: 0 where the server does not say.

    Raises:
        RemoteTeacherError: tokens differ.
    """
    ids = compared_ids(tokenizer, vocab, (longest or 2 * COMPARED + 2) - 2)
    response = client.complete([ids[0], *ids], {"prompt_logprobs": 1})
    try:
        (choice,) = response.json()["choices"]
        theirs = _decoded(choice["prompt_logprobs"][1:], ids)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        rule = f"the answer must be JSON with prompt_logprobs, got {error!r}"
        raise client.error(response, rule) from error
    mine = {i: str(tokenizer.decode([i])) for i in theirs}
    known = [i for i in theirs if UNKNOWN not in mine[i] + theirs[i]]
    wrong = [i for i in known if "".join(mine[i].split()) != "".join(theirs[i].split())]
    if wrong:
        examples = ", ".join(f"{i} is {theirs[i]!r} there, {mine[i]!r} here" for i in wrong[:SHOWN])
        raise RemoteTeacherError(
            f"{client.url}: the server's tokenizer must be the student's {describe(tokenizer)}, "
            f"{len(wrong)} of {len(known)} tokens that were compared differ: {examples}"
        )
    return len(known)


def _decoded(positions: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> dict[int, str]:
    """Return the text of each prompt token that the server says."""
    said = {i: each[str(i)].get("decoded_token") for i, each in zip(ids, positions, strict=True)}
    return {i: text for i, text in said.items() if isinstance(text, str) and text}
