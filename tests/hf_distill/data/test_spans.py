"""Spans of equal bytes: order, bytes and minimality for every family of tokenizers."""

import re
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_distill.data.spans import (
    Cut,
    Span,
    SpanAligner,
    common_spans,
    cut_text,
    cuts_by_offsets,
)
from hf_distill.data.token_bytes import TokenBytes, common_ids
from tests.hf_distill.data.families import FAMILIES, TEXTS, WHOLE
from tests.hf_distill.trainers.letters import letters

KNOWN = {name: TokenBytes(make()) for name, make in FAMILIES.items()}
PAIRS = list(product(FAMILIES, FAMILIES))
WORDS = sorted({x for text in TEXTS for x in re.split(r"(\W)", text) if x})
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.lists(st.one_of(st.sampled_from(WORDS), st.text(CHARACTERS, max_size=3))).map("".join)


def squeezed(text: bytes) -> bytes:
    return b"".join(text.split())


def slices(cuts: list[Cut], raw: bytes, at) -> bytes:
    return raw[cuts[at[0]].start : cuts[at[-1]].end]


@pytest.mark.parametrize(("one", "other"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(text=TEXT)
def test_spans_of_a_text(one: str, other: str, text: str) -> None:
    raw = text.encode()
    ids, cuts = zip(*(cut_text(KNOWN[x], text) for x in (one, other)), strict=True)
    spans = common_spans(*cuts)
    pieces = [KNOWN[x].of(y) for x, y in zip((one, other), ids, strict=True)]
    for side in (0, 1):
        at = [i for span in spans for i in span[side]]
        assert at == sorted(set(at))  # in order, and each token in one span
    for span in spans:
        parts = [slices(cuts[side], raw, span[side]) for side in (0, 1)]
        assert parts[0] == parts[1] != b""  # both sides cover one part of the text
        for side in (0, 1):
            written = b"".join(pieces[side][i] or b"" for i in span[side])
            assert squeezed(written) == squeezed(parts[side])  # whose bytes they write
        start = cuts[0][span.student[0]].start
        inner = [{cuts[side][i].end for i in span[side][:-1]} - {start} for side in (0, 1)]
        assert not inner[0] & inner[1]  # there is no finer common cut
    if one in WHOLE and other in WHOLE:
        covered = b"".join(slices(cuts[0], raw, span.student) for span in spans)
        assert covered == raw
    if one == other and one in WHOLE:
        assert all(span.student == span.teacher for span in spans)
        # a space of the tokenizer's own may be a token that writes nothing
        assert len(spans) == sum(cut.end > cut.start for cut in cuts[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(0, 12))
def test_every_common_cut_ends_a_span(data: st.DataObject, length: int) -> None:
    """Against a definition: the parts between cuts of both sides, from sets of ends."""
    ends = [data.draw(st.sets(st.integers(1, max(length, 1)))) | {length} for _ in range(2)]
    cuts = [[Cut(a, b) for a, b in pairwise([0, *sorted(x - {0})])] for x in ends]
    both = [0, *sorted((ends[0] & ends[1]) - {0})]
    want = [
        Span(*([i for i, c in enumerate(x) if a < c.end <= b] for x in cuts))
        for a, b in pairwise(both)
    ]
    assert common_spans(*cuts) == want


def test_a_token_without_its_text_spoils_its_span_only() -> None:
    mine = [Cut(0, 2), Cut(2, 4, says=False), Cut(4, 4, says=False), Cut(4, 5), Cut(5, 6)]
    theirs = [Cut(0, 1), Cut(1, 2), Cut(2, 4), Cut(4, 6)]
    assert common_spans(mine, theirs) == [Span([0], [0, 1]), Span([3, 4], [3])]
    inside = [Cut(0, 1), Cut(1, 1, says=False), Cut(1, 2)]  # a special token in a word
    assert common_spans(inside, theirs[:2]) == [Span([0], [0]), Span([2], [1])]
    assert common_spans(inside, [Cut(0, 2)]) == []


def test_bytes_of_characters_are_cut_where_the_bytes_are() -> None:
    """了 is three bytes, and here three tokens on both sides."""
    one, other = KNOWN["byte_level_small"], KNOWN["sentence_piece"]
    cuts = [cut_text(x, "\u4e86")[1] for x in (one, other)]
    ends = [[c.end for c in x if c.end > c.start] for x in cuts]  # ▁ may be a token of no bytes
    assert ends == [[1, 2, 3], [1, 2, 3]]


def test_cuts_that_the_tokenizer_says() -> None:
    own_space = cuts_by_offsets([b" ", b"T", b"he"], [(0, 1), (0, 1), (1, 3)], "The")
    assert own_space == [Cut(0, 0), Cut(0, 1), Cut(1, 3)]  # which leads to the next token
    assert common_spans([Cut(0, 3)], own_space) == [Span([0], [0, 1, 2])]
    overlap = cuts_by_offsets([b"Th", b"he"], [(0, 2), (1, 3)], "The")
    assert [cut.says for cut in overlap] == [True, False]
    dropped = cuts_by_offsets([b"a", b" b"], [(0, 1), (3, 4)], "a\u200b b")
    assert [cut.says for cut in dropped] == [True, False]
    spaces = cuts_by_offsets([b"a", b" b"], [(0, 1), (4, 5)], "a \n b")
    assert spaces == [Cut(0, 1), Cut(1, 5)]


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece"])
def test_names_of_special_tokens_in_a_text_are_text(name: str) -> None:
    """The teacher's row does not end where the student writes of its end token."""
    tokenizer = FAMILIES[name]()
    ids, cuts = cut_text(KNOWN[name], "the <end> of")
    assert tokenizer.eos_token_id not in ids
    assert all(cut.says for cut in cuts)
    assert tokenizer.eos_token_id in tokenizer("the <end> of")["input_ids"]  # as before


def test_what_a_normaliser_changes_is_left_out() -> None:
    word_piece = KNOWN["word_piece"]
    text = "the Answer is  42"
    cuts = [cut_text(x, text)[1] for x in (KNOWN["byte_level"], word_piece)]
    spans = common_spans(*cuts)
    covered = [slices(cuts[0], text.encode(), span.student) for span in spans]
    assert b"".join(covered) == b"the is  42"  # 'Answer' is written 'answer'
    assert covered[0] == b"the"
    ids, _ = cut_text(word_piece, "\u2603 the")
    assert word_piece.of(ids)[0] is None  # unknown


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_of_ids_are_the_decoders(name: str) -> None:
    known, tokenizer = KNOWN[name], FAMILIES[name]()
    for text in TEXTS[:5]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = b"".join(x or b"" for x in known.of(ids, at_start=True)).decode()
        want = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert squeezed(said.encode()) == squeezed(want.encode())
        if name != "word_piece":
            assert said == want


def aligner(one: str, other: str) -> SpanAligner:
    return SpanAligner(KNOWN[one], KNOWN[other], is_one=False)


@settings(max_examples=30, deadline=None)
@given(text=TEXT)
def test_the_students_ids_say_their_own_text(text: str) -> None:
    """Whatever the student has sampled: its bytes are the text that the teacher reads."""
    ids = FAMILIES["byte_level_small"]()(text)["input_ids"][::-1]  # in any order, invalid bytes too
    pair = aligner("byte_level_small", "sentence_piece")
    said, cuts = pair.text(ids, at_start=False)
    written = b"".join(x or b"" for x in KNOWN["byte_level_small"].of(ids))
    assert written.startswith(said.encode())
    assert cuts[-1].end == len(written) if cuts else not said
    if said.encode() == written:
        assert said == written.decode()
    reply = pair.reply(ids, [1], 1, {}, at_start=False)
    for span in reply.spans:
        parts = [b"".join(k.of(x)[i] or b"" for i in s) for k, x, s in (
            (pair.student, ids, span.student), (pair.teacher, reply.ids, span.teacher),
        )]  # fmt: skip
        # the teacher's own space in front of a text is no part of it
        assert parts[0] in (parts[1], parts[1][1:])


def test_replies_with_an_end_and_without() -> None:
    pair = aligner("byte_level", "sentence_piece")
    ids = FAMILIES["byte_level"]()("the answer")["input_ids"]
    ended = pair.reply([*ids, 1], [1], 7, {})
    assert ended.ids[-1] == 7
    assert ended.spans[-1] == Span([len(ids)], [len(ended.ids) - 1])
    assert pair.reply([*ids, 1], [1], None, {}).spans == ended.spans[:-1]
    cut = pair.reply(ids, [1], 7, {})
    assert cut.ids == ended.ids[:-1]
    assert cut.spans == ended.spans[:-2]  # the last word may go on
    mine, theirs = ended.spans[-2]
    if len(mine) == len(theirs) == 1:
        kept = pair.reply(ids, [1], 7, {ids[mine[0]]: ended.ids[theirs[0]]})
        assert kept.spans == ended.spans[:-1]


def test_half_a_character_ends_what_the_teacher_reads() -> None:
    pair = aligner("byte_level_small", "byte_level")
    ids = FAMILIES["byte_level_small"]()("is \u4e86")["input_ids"]
    reply = pair.reply([*ids[:-1], 1], [1], 1, {})
    assert pair.teacher.tokenizer.decode(reply.ids) == "is "
    covered = b"".join(pair.student.of(ids)[i] for span in reply.spans for i in span.student)
    assert covered == b"is "


def test_one_tokenizer_reads_the_students_ids() -> None:
    known = KNOWN["byte_level"]
    ids = [*known.tokenizer.convert_tokens_to_ids(["Ġ", "a", "n"]), 1]  # as no text is tokenised
    reply = SpanAligner(known, known, is_one=True).reply(ids, [1], 1, {})
    assert reply.ids == ids
    assert reply.spans == [Span([i], [i]) for i in range(4)]
    assert known.tokenizer(" an")["input_ids"] != ids[:-1]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_common_ids_are_the_same_bytes_one_to_one(one: str, other: str) -> None:
    found = common_ids(KNOWN[one], KNOWN[other], [(1, 1)])
    assert found[1] == 1  # the ends, by their part
    assert len(set(found.values())) == len(found) > 20
    for mine, theirs in found.items():
        assert KNOWN[one].vocab.get(mine) == KNOWN[other].vocab.get(theirs)
    if one == other:
        assert all(a == b for a, b in found.items() if not KNOWN[one].is_byte(a))


def test_ends_are_common_by_their_part_and_others_by_bytes() -> None:
    mine, theirs = KNOWN["byte_level"], KNOWN["sentence_piece"]
    found = common_ids(mine, theirs, [(1, 2), (1, 0), (None, 1)])
    assert found[1] == 2  # not <end>
    assert 2 not in found  # <role>, which is taken
    token = FAMILIES["byte_level"]().convert_tokens_to_ids("Ġthe")
    assert theirs.tokenizer.convert_ids_to_tokens(found[token]) == "▁the"
    letter = FAMILIES["byte_level"]().convert_tokens_to_ids("T")
    assert theirs.tokenizer.convert_ids_to_tokens(found[letter]) == "T"  # <0x54> writes it too
    newline = FAMILIES["byte_level"]().convert_tokens_to_ids("Ċ")
    assert theirs.vocab[found[newline]] == b"\n"


def test_tokenizers_that_are_not_known() -> None:
    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    made.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match=r"known for decoders of .* with BPEDecoder"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=made))

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="need a fast tokenizer, got a Slow"):
        TokenBytes(Slow())  # pyright: ignore[reportArgumentType]


def test_an_unknown_token_says_nothing_whether_or_not_it_is_special() -> None:
    for model in (
        models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"),
        models.Unigram([("<unk>", -1.0), ("a", -1.0)], 0),
    ):
        known = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)))
        assert known.of([1, 0], at_start=True) == [b"a", None]


def test_a_tokenizer_without_a_decoder_writes_words() -> None:
    known = TokenBytes(letters())
    ids = letters()("is 1")["input_ids"]
    assert known.of(ids, at_start=True) == [b"i", b" s", b"  ", b" 1"]
    cuts = cut_text(known, "is 1")[1]
    assert cuts == [Cut(0, 1), Cut(1, 2), Cut(2, 3), Cut(3, 4)]
