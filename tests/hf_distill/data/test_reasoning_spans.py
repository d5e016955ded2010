"""Blocks between markers are found in the text that ids spell, however it was cut into tokens."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_distill.data.reasoning_spans import BYTE_SPELLING, ReasoningSpans, token_bytes
from tests.hf_distill.trainers import models as tiny

SPELLING = {byte: character for character, byte in BYTE_SPELLING.items()}
THINK = ("<think>", "</think>")
SENTENCEPIECE = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def spelt(piece: bytes) -> str:
    return "".join(SPELLING[byte] for byte in piece)


def with_vocab(tokens: Sequence[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_level(pieces: Sequence[bytes]) -> PreTrainedTokenizerFast:
    return with_vocab(["a", *map(spelt, pieces)], decoders.ByteLevel())


def inside(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], markers: tuple[str, str] = THINK
) -> list[str]:
    """The tokens of a row that are inside."""
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(tokens))])
    found = ReasoningSpans(tokenizer, *markers)(ids)
    assert found.shape == ids.shape
    assert found.dtype == torch.bool
    return [token for token, yes in zip(tokens, found[0].tolist(), strict=True) if yes]


def by_hand(text: bytes, opening: bytes, closing: bytes) -> list[bool]:
    """Of each byte, by a walk from left to right."""
    result, open_, at = [], False, 0
    while at < len(text):
        here = text[at:]
        if here.startswith(opening) or here.startswith(closing):
            found = max((x for x in (opening, closing) if here.startswith(x)), key=len)
            changes = open_ == (found == closing)
            result += [open_ and not changes] * len(found)
            open_, at = (not open_ if changes else open_), at + len(found)
        else:
            result.append(open_)
            at += 1
    return result


TEXTS = [
    "before <think>\nfour\n\n</think> behind",
    "<think>one</think><think>two</think>",
    "opens <think> and is never closed",
    "a</think> stray <think>b<think>c</think>d</think>e",
    "<think></think>x<think> </think>",
    "<<think>><//think></think>>",
    "no block at all </think>",
]
OTHERS = [("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"), ("<<", "<<<"), ("think", "/think")]


@pytest.mark.parametrize("markers", [THINK, *OTHERS], ids=lambda x: x[0])
@pytest.mark.parametrize("text", TEXTS)
def test_any_cut_gives_what_the_text_says(text: str, markers: tuple[str, str]) -> None:
    """Also through the middle of a character."""
    raw = text.replace("</think>", "\0").replace("<think>", markers[0]).replace("\0", markers[1])
    data = raw.encode()
    expected = by_hand(data, *(x.encode() for x in markers))
    draw = random.Random(text)
    for size in (1, 2, 3, 5, 9):
        places = range(1, len(data))
        cuts = [0, *sorted(draw.sample(places, len(data) // size)), len(data)] if size > 1 else None
        cuts = cuts or range(len(data) + 1)
        spans = list(itertools.pairwise(cuts))
        tokenizer = byte_level([data[a:b] for a, b in spans])
        ids = tokenizer.convert_tokens_to_ids([spelt(data[a:b]) for a, b in spans])
        found = ReasoningSpans(tokenizer, *markers)(torch.tensor([ids]))[0].tolist()
        assert found == [all(expected[a:b]) for a, b in spans]


def test_a_token_that_shares_a_marker_is_not_inside() -> None:
    pieces = ["<th", "ink>\n", "two", " lines", "\n\n</", "think", ">", "12"]
    tokenizer = byte_level([x.encode() for x in pieces])
    tokens = [spelt(x.encode()) for x in pieces]
    assert inside(tokenizer, tokens) == [spelt(b"two"), spelt(b" lines")]


def test_markers_that_are_special_tokens() -> None:
    tokenizer = with_vocab(["a", "b", "c", "<end>"], decoders.ByteLevel())
    tokenizer.add_special_tokens({"additional_special_tokens": list(THINK), "eos_token": "<end>"})
    assert inside(tokenizer, ["<think>", "a", "</think>", "b", "<end>"]) == ["a"]
    assert inside(tokenizer, ["c", "<think>", "a", "b", "<end>"]) == ["a", "b", "<end>"]
    tokenizer.add_tokens([AddedToken("◁think▷", special=False)])
    assert inside(tokenizer, ["◁think▷", "a", "b"], ("◁think▷", "b")) == ["a"]


def test_sentencepiece_keeps_the_spaces_of_words() -> None:
    bytes_ = [f"<0x{byte:02X}>" for byte in "◁".encode()]
    words = ["a", "▁let", "▁me", "▁think", "so", "▁it", "▁is", "<0x0A>", *bytes_]
    tokenizer = with_vocab(words, SENTENCEPIECE)
    row = ["▁let", "▁me", "▁think", "▁it", "<0x0A>", "▁is", "so", "a", "▁is"]
    assert inside(tokenizer, row, ("me think", "\n")) == ["▁it"]
    assert inside(tokenizer, row, ("me think", "isso")) == ["▁it", "<0x0A>"]
    assert inside(tokenizer, row, ("methink", "isso")) == []
    row = ["so", *bytes_, "▁it", "▁is", *bytes_, "a"]
    assert inside(tokenizer, row, ("◁", "s◁")) == ["▁it"]


def test_words_are_apart_where_decoding_puts_spaces() -> None:
    tokenizer = tiny.tokenizer()
    row = ["What", "think", "first", "1", "+", "2", "so", "then", "3"]
    assert inside(tokenizer, row, ("think first", "so then")) == ["1", "+", "2"]
    assert inside(tokenizer, row, ("thinkfirst", "so")) == []


def test_a_tokenizer_of_bytes() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    text = "ä◁think▷é\t1◁/think▷ü"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = ReasoningSpans(tokenizer, "◁think▷", "◁/think▷")(ids)[0]
    assert tokenizer.decode(ids[0][found]) == "é\t1"


def test_padding_is_no_text() -> None:
    """Its token could be the marker, and stands between the rows' own tokens and the margin."""
    tokenizer = with_vocab(["a", "<think>", "</think>", "b"], decoders.ByteLevel())
    ids = torch.tensor([[2, 2, 1, 0, 3], [1, 3, 2, 0, 1]])
    blocks = ReasoningSpans(tokenizer, *THINK)
    assert blocks(ids)[1].tolist() == [False, True, False, False, False]
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert blocks(ids, mask)[:, 1:-1].tolist() == [[False, False, True], [False] * 3]
    assert blocks(ids.masked_fill(ids == 3, 1000))[1].tolist() == [False, True, False, False, False]
    assert blocks(ids.masked_fill(ids == 3, -1))[1].tolist() == [False, True, False, False, False]


def test_ids_without_a_token_and_vocabularies_without_letters() -> None:
    tokenizer = with_vocab(["Ġ-", "+"], decoders.ByteLevel())
    assert token_bytes(tokenizer) == [b" -", b"+"]
    vocab = {"a": 0, "c": 3}
    made = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    assert token_bytes(fast) == [b"a", b"", b"", b"c"]
