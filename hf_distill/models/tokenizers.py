"""Which ids a tokenizer has, and whether two tokenizers have the same."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the tokenizer's largest id: its length, if it leaves no id out."""
    return max(tokenizer.get_vocab().values()) + 1


def ids_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of the id that each token has."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe a tokenizer in words: where it is from, its class and its number of ids."""
    kind = type(tokenizer).__name__
    return f"{str(tokenizer.name_or_path)!r} ({kind}, {num_ids(tokenizer)} ids)"


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Describe the first token, by ids, that two tokenizers do not give one id; or return None."""
    if one is other:
        return None
    mine, theirs = one.get_vocab(), other.get_vocab()
    if mine == theirs:
        return None
    token = min(
        (token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)),
        key=lambda token: (min(x[token] for x in (mine, theirs) if token in x), token),
    )
    ids = ("no token" if x.get(token) is None else f"id {x[token]}" for x in (mine, theirs))
    first, second = ids
    return f"{token!r} is {first} of the one, {second} of the other"


def check_same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, rule: str) -> None:
    """Check that two tokenizers give every token one id.

    Args:
        one: a tokenizer.
        other: another.
        rule: what asks for it, a clause that begins the error.

    Raises:
        ValueError: naming both tokenizers and the first token in which they differ.
    """
    found = first_difference(one, other)
    if found is not None:
        raise ValueError(f"{rule}, got {describe(one)} and {describe(other)}: {found}")
