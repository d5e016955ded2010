"""What kind of text each token of a vocabulary is."""

import unicodedata
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CLASSES = ("special", "number", "punctuation", "space", "word")
"""The classes; a table holds their indices."""

SPECIAL, NUMBER, PUNCTUATION, SPACE, WORD = range(len(CLASSES))
UNDECODED = "\ufffd"  # stands for bytes that are no whole character

_Key = tuple[int, tuple[int, ...]]
_tables: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[_Key, Tensor]] = WeakKeyDictionary()


def _is_letter(character: str) -> bool:
    """Return whether it is a letter, a mark that is written on letters, or part of a character."""
    if character.isalpha() or character == UNDECODED:
        return True
    return not character.isascii() and unicodedata.category(character)[0] == "M"


def class_of(text: str) -> int:
    """Return the class of a token's text: an index into CLASSES, never that of "special"."""
    if not text or text.isspace():  # a lone word boundary of SentencePiece decodes to nothing
        return SPACE
    if any(map(_is_letter, text)):
        return WORD
    return NUMBER if any(character.isalnum() for character in text) else PUNCTUATION


def token_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each row of ids, special tokens included.

    Decoding, not the vocabulary's own strings, turns byte-level and SentencePiece spellings
    into text.
    """
    rows = [list(row) for row in rows]
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # ten times as fast as one call an id
        return backend.decode_batch(rows, skip_special_tokens=False)
    return cast(
        "list[str]",
        tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )


def _table(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> Tensor:
    """Return the classes [largest id + 1] int64; ids that the tokenizer leaves out are special."""
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    table = torch.full((max([*ids, *special], default=-1) + 1,), SPECIAL)
    alone = token_texts(tokenizer, [[i] for i in ids])
    table[ids] = torch.tensor([class_of(text) for text in alone], dtype=torch.long)
    return table


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> Tensor:
    """Return the class of every token id, as an index into `CLASSES`.

    - special: special tokens, added ones included, and ids for which the tokenizer has no token;
    - number: digits and other numerals without a letter, such as "12", " 3." or "½";
    - punctuation: no letter and no digit;
    - space: only whitespace;
    - word: the rest, also a part of a character that several byte tokens make up.

    Args:
        tokenizer: fast or slow. Its table is computed once, and again after it got more tokens.
        vocab_size: V, the entries of the model's logits, which may be more or fewer than the
            tokenizer's ids; None stops at its largest id.

    Returns:
        [V] int64 on the CPU.
    """
    added = cast("dict[int, Any]", tokenizer.added_tokens_decoder)
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    key = (len(tokenizer), tuple(sorted(special)))
    kept = _tables.get(tokenizer)
    if kept is None or kept[0] != key:
        kept = _tables[tokenizer] = (key, _table(tokenizer, special))
    table = kept[1]
    if vocab_size is None:
        return table.clone()
    beyond = torch.full((max(0, vocab_size - len(table)),), SPECIAL)
    return torch.cat([table[:vocab_size], beyond])
