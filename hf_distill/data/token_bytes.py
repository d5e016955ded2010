"""The bytes that each token of a tokenizer writes into a text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_distill.data.turn_ends import special_ids

KNOWN = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "WordPiece"}


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes are the character of their own number; the others are, in their order, the
    characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in set(printable)]
    found = {chr(x): x for x in printable}
    return found | {chr(256 + i): x for i, x in enumerate(others)}


BYTES = _byte_of_character()


def _parts(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


class TokenBytes:
    """Says what bytes the tokens of a fast tokenizer stand for, by the rules of its decoder.

    Byte-level BPE (each character of a token is a byte), SentencePiece BPE and Unigram (▁ is a
    space, <0x0A> a byte), WordPiece (## goes on with a word, other tokens begin one behind a
    space), and tokenizers without a decoder, whose tokens are words behind spaces.

    Args:
        tokenizer: a fast one.

    Raises:
        ValueError: it is a slow one, or its decoder has a part of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ValueError(f"spans of bytes need a fast tokenizer, got a {name}")
        self.tokenizer: Any = tokenizer
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        parts = _parts(state["decoder"])
        odd = sorted({x["type"] for x in parts} - KNOWN)
        if odd:
            raise ValueError(
                f"spans of bytes are known for decoders of {sorted(KNOWN)}, got a {name} with "
                f"{odd[0]}"
            )
        self._kinds = {x["type"]: x for x in parts}
        self._byte_level = "ByteLevel" in self._kinds
        self._prefix = self._kinds["WordPiece"]["prefix"] if "WordPiece" in self._kinds else None
        self._replaced = [
            (x.get("replacement") or x["pattern"].get("String", ""), x.get("content", " "))
            for x in parts
            if x["type"] in ("Metaspace", "Replace")
        ]
        self._joins_words = not parts or self._prefix is not None
        self._hidden = special_ids(tokenizer) | self._unknown(state["model"])
        added = self.tokenizer.added_tokens_decoder
        self._added = {i: str(x.content).encode() for i, x in added.items()}
        self._vocab: dict[int, bytes] | None = None
        self._known: dict[int, bytes | None] = {}

    def _unknown(self, model: Mapping[str, Any]) -> set[int]:
        """Return the id of the token for what is not in the vocabulary, which says no text."""
        if model.get("unk_id") is not None:
            return {model["unk_id"]}
        token = model.get("unk_token")
        vocab = {} if token is None else self.tokenizer.get_vocab()
        return {vocab[token]} if token in vocab else set()

    @property
    def _strips_first(self) -> bool:
        """Return whether the space in front of a text's first token is none of the text's."""
        strip, meta = self._kinds.get("Strip"), self._kinds.get("Metaspace")
        prepends = meta is not None and meta.get("prepend_scheme", "always") != "never"
        return self._joins_words or prepends or (strip is not None and strip["start"] > 0)

    def _bytes(self, token_id: int) -> bytes | None:
        if token_id in self._hidden:
            return None
        if token_id in self._added:
            return self._added[token_id]
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return None if token is None else self._of_token(token)

    def _of_token(self, token: str) -> bytes:
        if self._byte_level and all(x in BYTES for x in token):
            return bytes(BYTES[x] for x in token)
        if "ByteFallback" in self._kinds and _is_byte(token):
            return bytes([int(token[3:5], 16)])
        if self._prefix is not None and token.startswith(self._prefix):
            return token[len(self._prefix) :].encode()
        for old, new in self._replaced:
            token = token.replace(old, new)
        return (f" {token}" if self._joins_words else token).encode()

    def of(self, ids: Sequence[int], at_start: bool = False) -> list[bytes | None]:
        """Return what each token of a text writes into it.

        Args:
            ids: of the text.
            at_start: whether it begins there, where the space that many tokenizers put in front of
                a first word is none of the text's; else it goes on with another one.

        Returns:
            Bytes; None for special and unknown tokens, which stand for no text.
        """
        found: list[bytes | None] = []
        for token_id in ids:
            if token_id not in self._known:
                self._known[token_id] = self._bytes(token_id)
            found.append(self._known[token_id])
        if at_start and self._strips_first:
            found = without_first_space(found)
        return found

    @property
    def vocab(self) -> dict[int, bytes]:
        """Return the bytes of each id behind the beginning of a text, where it has bytes."""
        if self._vocab is None:
            ids = sorted(self.tokenizer.get_vocab().values())
            pairs = ((i, self._bytes(i)) for i in ids)
            self._vocab = {i: x for i, x in pairs if x is not None}
        return self._vocab

    def is_byte(self, token_id: int) -> bool:
        """Return whether a token is a single byte that other tokens may write as well."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return "ByteFallback" in self._kinds and _is_byte(token)


def without_first_space(pieces: Sequence[bytes | None]) -> list[bytes | None]:
    """Return what tokens write, less a space in front of all."""
    first, *others = pieces or [None]
    return [first.removeprefix(b" ") if first else first, *others][: len(pieces)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def common_ids(
    student: TokenBytes, teacher: TokenBytes, ends: Sequence[tuple[int | None, int | None]]
) -> dict[int, int]:
    """Return which ids of two tokenizers stand for the same, one to one.

    Args:
        student: the one whose ids are the keys.
        teacher: the other.
        ends: ids that mean the same by their part in a dialogue: what ends a turn.
    """
    found: dict[int, int] = {}
    taken: set[int] = set()

    def add(one: int | None, other: int | None) -> None:
        if one is not None and other is not None and one not in found and other not in taken:
            found[one] = other
            taken.add(other)

    for one, other in ends:
        add(one, other)
    theirs = _ids_of_bytes(teacher)
    for value, token_id in _ids_of_bytes(student).items():
        add(token_id, theirs.get(value))
    mine, others = (_special_tokens(x.tokenizer) for x in (student, teacher))
    for token, token_id in mine.items():
        add(token_id, others.get(token))
    return found


def _ids_of_bytes(known: TokenBytes) -> dict[bytes, int]:
    """Return the id of each value of bytes; where several have it, that of no single byte."""
    found: dict[bytes, int] = {}
    vocab = known.vocab
    for token_id in sorted(vocab, key=lambda i: (known.is_byte(i), i)):
        found.setdefault(vocab[token_id], token_id)
    return found


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    ids = sorted(special_ids(tokenizer))
    return {str(tokenizer.convert_ids_to_tokens(i)): i for i in ids}
