"""Spans: the smallest runs of two tokenizers' tokens that write the same bytes of a text.

Both tokenizations cut a text at the ends of their tokens. Where both cut, a span ends and the next
begins: the spans are the finest parts that each side writes in whole tokens. With one tokenizer
each span is one token.

Whitespace that a tokenizer leaves out, as WordPiece does, is part of the next token. Tokens that
say something else than the text (unknown ones, or what a normaliser has changed) make the span that
holds them one that is left out, as do special tokens inside of a span.

Source:
    The rule for a cut is that of TRL's GOLD trainer, which walks both lists of byte ends and closes
    a group where they meet (it reads byte-level tokenizers only). "Breaking the Tokenizer Barrier",
    arXiv:2606.09456, has the same idea; its release grows a chunk on both sides until the decoded
    texts are equal in Unicode's normal form C, so that its chunks end at whole characters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple, cast

from hf_distill.data.token_bytes import TokenBytes, common_ids, without_first_space
from hf_distill.data.turn_ends import TurnEnds


class Cut(NamedTuple):
    """Holds where in a text a token begins and ends, in bytes, and whether it says that text."""

    start: int
    end: int
    says: bool = True


class Span(NamedTuple):
    """Holds the places of a span's tokens among those of each side, ascending, at least one."""

    student: Sequence[int]
    teacher: Sequence[int]


class TeacherReply(NamedTuple):
    """Holds a reply in the teacher's ids, and its spans with the student's, in their order."""

    ids: list[int]
    spans: list[Span]


def cuts_of(pieces: Sequence[bytes | None]) -> list[Cut]:
    """Return the cuts of tokens that write these bytes one after another."""
    found, at = list[Cut](), 0
    for piece in pieces:
        stop = at + len(piece or b"")
        found.append(Cut(at, stop, piece is not None))
        at = stop
    return found


def cut_text(known: TokenBytes, text: str) -> tuple[list[int], list[Cut]]:
    """Return a text's ids by a tokenizer, and their cuts.

    Where the tokens' bytes are the text's, the cuts are exact, also inside of a character. Where
    they are not, the cuts are those that the tokenizer says.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True}  # their names are text
    encoded = known.tokenizer(text, return_offsets_mapping=True, **options)
    ids, raw = cast(list[int], encoded["input_ids"]), text.encode()
    pieces = known.of(ids)
    written = b"".join(x or b"" for x in pieces)
    if written == raw:
        return ids, cuts_of(pieces)
    if written == b" " + raw and pieces[0]:  # the tokenizer's own space in front of a text
        return ids, cuts_of(without_first_space(pieces))
    return ids, cuts_by_offsets(pieces, encoded["offset_mapping"], text)


def cuts_by_offsets(
    pieces: Sequence[bytes | None], offsets: Sequence[tuple[int, int]], text: str
) -> list[Cut]:
    """Return cuts at the characters' ends; a token begins where the one before it ends."""
    places = [0]
    for character in text:
        places.append(places[-1] + len(character.encode()))
    found, before = list[Cut](), 0
    for piece, (start, stop) in zip(pieces, offsets, strict=True):
        left_out, own = (x.encode().strip() for x in (text[before:start], text[start:stop]))
        if piece is not None and own and not piece.strip():
            stop, says = before, True  # the tokenizer's own space in front of a word
        else:
            says = piece is not None and piece.strip() == own and not left_out and start >= before
        stop = max(stop, before)
        found.append(Cut(places[before], places[stop], says))
        before = stop
    return found


def common_spans(student: Sequence[Cut], teacher: Sequence[Cut]) -> list[Span]:
    """Return the spans of two lists of cuts of one text, in their order.

    Tokens that are in none are left out: see the module.
    """
    mine, theirs = _units(student), _units(teacher)
    found, i, j, start, other = list[Span](), 0, 0, 0, 0
    while i < len(mine) and j < len(theirs):
        end, their_end = student[mine[i][-1]].end, teacher[theirs[j][-1]].end
        i, j = i + (end <= their_end), j + (their_end <= end)
        if end == their_end:
            span = Span([*chain(*mine[start:i])], [*chain(*theirs[other:j])])
            if _is_whole(span.student, student) and _is_whole(span.teacher, teacher):
                found.append(span)
            start, other = i, j
    return found


def _units(cuts: Sequence[Cut]) -> list[list[int]]:
    """Return the places of tokens that write something, each behind those that only lead to it.

    Such a one is the space that a tokenizer puts in front of a text, where it is a token.
    """
    found, before = list[list[int]](), list[int]()
    for i, cut in enumerate(cuts):
        if cut.end == cut.start:
            before = [*before, i] if cut.says else []
            continue
        found.append([*before, i])
        before = []
    return found


def _is_whole(at: Sequence[int], cuts: Sequence[Cut]) -> bool:
    """Return whether tokens follow each other and all say the text."""
    return all(b == a + 1 for a, b in pairwise(at)) and all(cuts[i].says for i in at)


@dataclass(frozen=True)
class SpanAligner:
    """Writes the student's replies in the teacher's ids, and says which tokens are a span.

    Args:
        student: what the student's tokens say.
        teacher: what the teacher's say.
        is_one: whether both are one tokenizer; the teacher then reads the student's ids.
    """

    student: TokenBytes
    teacher: TokenBytes
    is_one: bool

    def common(self, ends: TurnEnds, teacher_ends: TurnEnds) -> dict[int, int]:
        """Return which ids stand for the same on both sides, one to one."""
        if self.is_one:
            ids = self.student.tokenizer.get_vocab().values()
            return {i: i for i in ids}
        pairs = [(ends.turn, teacher_ends.turn), (ends.of_text, teacher_ends.of_text)]
        return common_ids(self.student, self.teacher, pairs)

    def text(self, ids: Sequence[int], at_start: bool) -> tuple[str, list[Cut]]:
        """Return the text that ids of the student write, and their cuts; see `TokenBytes.of`.

        It ends in front of the first byte that begins no whole character.
        """
        pieces = self.student.of(ids, at_start)
        raw = b"".join(x or b"" for x in pieces)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            text = raw[: error.start].decode()
        return text, cuts_of(pieces)

    def reply(
        self,
        ids: Sequence[int],
        end_ids: Sequence[int],
        end: int | None,
        common: Mapping[int, int],
        at_start: bool = True,
    ) -> TeacherReply:
        """Return a reply as the teacher reads it.

        An end token stands beside the teacher's, as a span without bytes. Where the reply was cut
        off, the text may go on: its last span is kept only if it is the same token on both sides.

        Args:
            ids: of the student, with its end token if it has one.
            end_ids: the student's ids that end a reply.
            end: the teacher's, or None.
            common: see `common`.
            at_start: whether its text begins with it; else it goes on with one of the prompt.
        """
        if self.is_one:
            return TeacherReply(list(ids), [Span([i], [i]) for i in range(len(ids))])
        ended = bool(ids) and ids[-1] in end_ids
        text, cuts = self.text(ids[:-1] if ended else ids, at_start)
        theirs, their_cuts = cut_text(self.teacher, text)
        spans = common_spans(cuts, their_cuts)
        is_whole = not cuts or cuts[-1].end == len(text.encode())
        if ended and is_whole and end is not None:
            spans.append(Span([len(ids) - 1], [len(theirs)]))
            return TeacherReply([*theirs, end], spans)
        if spans and spans[-1].teacher[-1] == len(theirs) - 1 and not ended:
            mine, other = spans[-1]
            same = len(mine) == len(other) == 1 and common.get(ids[mine[0]]) == theirs[other[0]]
            spans = spans if same else spans[:-1]
        return TeacherReply(theirs, spans)
