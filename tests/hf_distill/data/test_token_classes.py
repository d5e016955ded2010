"""The class of each token is that of its text, however the tokenizer spells it."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_distill.data import token_classes as module
from hf_distill.data.token_classes import CLASSES, token_classes
from tests.hf_distill.trainers import models as tiny

BYTES = pre_tokenizers.ByteLevel


def byte_spelling(text: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return "".join(chr(b) if b in plain else chr(256 + others.index(b)) for b in text)


def fast(vocab: dict[str, int], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made)


def names(table: torch.Tensor) -> list[str]:
    return [CLASSES[i] for i in table.tolist()]


TEXTS = {
    "word": ["a", " the", "x1", "don't", "é", " 北", "naïve_2", "\u0e34", "\u0e012"],
    "number": ["7", " 12", "3.5", "-4", "½", "٣", "$5"],
    "punctuation": [".", " +", "...", "//", "_", "€", "—", " ("],
    "space": [" ", "\n\n", "\t ", "\xa0", "    "],
}
CASES = [(kind, text) for kind, texts in TEXTS.items() for text in texts]


def test_byte_level_spellings_are_read_as_text():
    vocab = {byte_spelling(text.encode()): i for i, (_, text) in enumerate(CASES)}
    assert len(vocab) == len(CASES)
    assert names(token_classes(fast(vocab, decoders.ByteLevel()))) == [kind for kind, _ in CASES]


def test_a_part_of_a_character_is_of_a_word():
    vocab = {byte_spelling(x): i for i, x in enumerate([b"\xe5", b"\x8c\x97", b" \xe2", b"\n"])}
    assert names(token_classes(fast(vocab, decoders.ByteLevel()))) == ["word"] * 3 + ["space"]


def test_sentencepiece_spellings_are_read_as_text():
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    expected = {
        "▁": "space",
        "▁▁▁": "space",
        "<0x0A>": "space",
        "<0xE5>": "word",
        "<0x37>": "number",
        "▁12": "number",
        "▁the": "word",
        "▁+": "punctuation",
    }
    vocab = {text: i for i, text in enumerate(expected)}
    assert names(token_classes(fast(vocab, decoder))) == list(expected.values())


def test_ids_without_a_token_are_special():
    tokenizer = fast({"a": 0, "7": 1, ".": 4}, decoders.ByteLevel())
    expected = ["word", "number", "special", "special", "punctuation"]
    assert names(token_classes(tokenizer)) == expected
    assert names(token_classes(tokenizer, 7)) == [*expected, "special", "special"]
    assert names(token_classes(tokenizer, 2)) == expected[:2]


def test_special_and_added_tokens():
    tokenizer = fast({"a": 0, "7": 1, ".": 2}, decoders.ByteLevel())
    assert names(token_classes(tokenizer)) == ["word", "number", "punctuation"]
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<1>", special=True)])
    added = ["word", "number", "punctuation", "word", "special"]
    assert names(token_classes(tokenizer)) == added
    tokenizer.add_special_tokens({"eos_token": "7"})  # the number of tokens stays
    assert names(token_classes(tokenizer)) == ["word", "special", *added[2:]]


def test_slow_tokenizers():
    tokenizer = ByT5Tokenizer()
    text = "a7. "
    ids = [tokenizer.convert_tokens_to_ids(c) for c in text]
    table = token_classes(tokenizer)
    assert names(table[ids]) == ["word", "number", "punctuation", "space"]
    assert CLASSES[table[tokenizer.eos_token_id]] == "special"


def test_a_table_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny.tokenizer()
    calls = []
    class_of = module.class_of
    monkeypatch.setattr(module, "class_of", lambda text: calls.append(text) or class_of(text))
    first = token_classes(tokenizer)
    kept = first.clone()
    assert len(calls) == len(tokenizer) - 3  # all but pad, end and unknown tokens
    first.fill_(-1)  # the caller's own
    assert torch.equal(token_classes(tokenizer), kept)
    assert len(token_classes(tokenizer, tiny.VOCAB)) == tiny.VOCAB
    assert len(calls) == len(tokenizer) - 3
    assert names(kept)[:5] == ["special", "word", "special", "word", "special"]
    assert token_classes(tiny.tokenizer()) is not first
    assert len(calls) == 2 * (len(tokenizer) - 3)
