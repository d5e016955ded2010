"""Blocks of text between two markers, such as <think> and </think>, in rows of token ids.

Markers are looked for in the text that the ids spell, as bytes, so that it does not matter how it
was cut into tokens: a marker may be one special token, several tokens, or share a token with its
neighbours.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.data.token_classes import UNDECODED, token_texts

_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = sorted(set(range(256)) - set(_PLAIN))
# how byte-level vocabularies spell bytes: as themselves if printable, else from 256 on
BYTE_SPELLING = {chr(x): x for x in _PLAIN} | {chr(256 + i): x for i, x in enumerate(_OTHERS)}
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells one


def _anchor(vocab: dict[str, int], special: set[int]) -> int | None:
    """Find an ordinary token, as short as can be: a letter or digit if the vocabulary has one."""
    ordinary = [(token, i) for token, i in vocab.items() if i not in special]
    if not ordinary:
        return None
    plain = [x for x in ordinary if x[0].isascii() and x[0].isalnum()]
    return min(plain or ordinary, key=lambda x: (len(x[0]), x[1]))[1]


def _spelt(token: str, text: str) -> bytes:
    """Return the bytes of a token whose text is not whole characters."""
    if found := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(found[1], 16)])
    if all(character in BYTE_SPELLING for character in token):
        return bytes(BYTE_SPELLING[character] for character in token)
    if len(token) == 1 and ord(token) < 256:  # ByT5 has all bytes as they are
        return bytes([ord(token)])
    return text.encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return what each id adds to a text that it does not begin, in UTF-8.

    Each id is decoded behind an ordinary token, for decoders drop or add spaces at the start. Parts
    of a character, which decoding cannot show, are read from the vocabulary's spelling of bytes.

    Returns:
        One entry for each id up to the tokenizer's largest; empty where it has no token.
    """
    vocab = tokenizer.get_vocab()
    added = set(cast("dict[int, Any]", tokenizer.added_tokens_decoder))
    anchor = _anchor(vocab, {*tokenizer.all_special_ids, *added})
    before = [] if anchor is None else [anchor]
    (start,) = token_texts(tokenizer, [before])
    ids = sorted(set(vocab.values()))
    tokens = cast("list[str]", tokenizer.convert_ids_to_tokens(ids))
    pieces = [b""] * (max(ids, default=-1) + 1)
    behind = token_texts(tokenizer, [[*before, i] for i in ids])
    for i, token, text in zip(ids, tokens, behind, strict=True):
        text = text.removeprefix(start)
        # a byte of a character is shown as a stand-in or, by ByT5, not at all
        is_part = UNDECODED in text or (not text and len(token) == 1)
        pieces[i] = _spelt(token, text) if is_part else text.encode()
    return pieces


class ReasoningSpans:
    """Finds the tokens between an opening and a closing marker.

    The rules, for a row read from left to right:

    - a token is inside if all of its text stands between the markers, so neither a marker's own
      tokens are nor one that a marker shares with its neighbours;
    - a block that is not closed reaches to the row's end;
    - an opening marker inside a block is text of the block, which ends at the first closing marker;
    - a closing marker outside a block is text.

    Args:
        tokenizer: of the ids. Its tokens' texts are read once, here.
        opening: text of one marker, not empty.
        closing: text of the other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, opening: str, closing: str) -> None:
        # the last entry is for all ids that the tokenizer does not have
        self._pieces = [*token_bytes(tokenizer), b""]
        self._lengths = torch.tensor([len(piece) for piece in self._pieces])
        self._opening, self._closing = opening.encode(), closing.encode()
        # where one marker begins with the other, the longer is meant
        longest_first = sorted((self._opening, self._closing), key=len, reverse=True)
        self._markers = re.compile(b"|".join(map(re.escape, longest_first)))

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return which tokens are inside.

        Args:
            ids: [B, T] int64.
            mask: [B, T], zero at padding, which is no text; or None.

        Returns:
            [B, T] bool on the device of ids.
        """
        known = torch.where((ids < 0) | (ids >= len(self._pieces)), len(self._pieces) - 1, ids)
        if mask is not None:
            known = known.masked_fill(mask == 0, len(self._pieces) - 1)
        known = known.cpu()
        ends = self._lengths[known].cumsum(1)
        starts = ends - self._lengths[known]
        inside = torch.zeros_like(known, dtype=torch.bool)
        for row, start, end, found in zip(known.tolist(), starts, ends, inside, strict=True):
            for first, last in self.find(b"".join(self._pieces[i] for i in row)):
                found |= (start >= first) & (end <= last)
        return inside.to(ids.device)

    def find(self, text: bytes) -> Sequence[tuple[int, int]]:
        """Return (first byte, byte behind the last) of the text of each block."""
        blocks: list[tuple[int, int]] = []
        first: int | None = None
        for marker in self._markers.finditer(text):
            if marker[0] == self._opening and first is None:
                first = marker.end()
            elif marker[0] == self._closing and first is not None:
                blocks.append((first, marker.start()))
                first = None
        return blocks if first is None else [*blocks, (first, len(text))]
