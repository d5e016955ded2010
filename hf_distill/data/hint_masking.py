"""Hints without what a completion has of them already, or without what it has not."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

MASKS, PARTS, ANCHORS = ("seen", "unseen"), ("end", "sentences"), ("math", "words")
DIGITS = 6  # of a share of words: 2.9999999 are 3

# the content of \boxed{}, with braces in it, and formulas between dollars or \( \)
_FORMULA = re.compile(
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}|\$\$?([^$]+)\$\$?|\\\((.+?)\\\)", re.DOTALL
)
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?")
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|(?=\n)|\Z)", re.DOTALL)  # or a line


@dataclass(frozen=True)
class HintMasking:
    r"""Says what of a hint is hidden from the teacher, by what the completion has of the hint.

    A hint has anchors, and the overlap is the share of them, each counted once, that the
    completion has. The completion is what the student has sampled, or that of the data. A hint
    without anchors is not masked.

    Args:
        masks: "seen" hides what the completion has already, so that the teacher says what is left.
            "unseen" hides what it has not, so that the teacher knows little more than the student.
        part: "end" hides the end of the hint: of its words the share `most` times the overlap, or
            with "unseen" `most` times what is missing to an overlap of 1. "sentences" hides each
            sentence or line with anchors of which the completion has all, or with "unseen" none.
        most: the largest share of the words that "end" hides, in (0, 1].
        anchors: "math" takes numbers, formulas between dollars or in \( \), and what is in
            \boxed{}, without blanks. "words" takes all words, in lower case.
        mask: the text in the place of what is hidden; not empty.

    Raises:
        ValueError: a value is unknown or out of range.

    Source:
        PAINT (arXiv:2604.26573) hides the end of a verified solution by such an overlap, a recall
        of anchors that are boxed answers, formulas and numbers. That is how other papers and lists
        describe it; its text and its release were not at hand. Which way the overlap counts, the
        share, and sentences are choices made here.
    """

    masks: str = "seen"
    part: str = "end"
    most: float = 1.0
    anchors: str = "math"
    mask: str = "..."

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        for name, known in (("masks", MASKS), ("part", PARTS), ("anchors", ANCHORS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"hint_masking.{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        if not 0.0 < self.most <= 1.0:
            raise ValueError(f"hint_masking.most must be in (0, 1], got {self.most}")
        if self.part == "sentences" and self.most != 1.0:
            raise ValueError(f"hint_masking.most is read with the part 'end' only, got {self.most}")
        if not self.mask.strip():
            raise ValueError(f"hint_masking.mask must have text, got {self.mask!r}")

    def __call__(self, hint: str, completion: str) -> str:
        """Return what the teacher sees of a hint beside a completion; it is never empty."""
        has = self._finder(completion)
        if self.part == "sentences":
            return self._without_sentences(hint, has)
        found = [has(x) for x in self._anchors(hint)]
        if not found:
            return hint
        overlap = sum(found) / len(found)
        share = self.most * (overlap if self.masks == "seen" else 1.0 - overlap)
        words = list(re.finditer(r"\S+", hint))
        hidden = math.floor(round(share * len(words), DIGITS))
        return hint[: words[-hidden].start()] + self.mask if hidden else hint

    def _without_sentences(self, hint: str, has: Callable[[str], bool]) -> str:
        def shown(match: re.Match[str]) -> str:
            found = [has(x) for x in self._anchors(match.group())]
            hides = all(found) if self.masks == "seen" else not any(found)
            return self.mask if found and hides else match.group()

        mask = re.escape(self.mask)
        return re.sub(rf"{mask}(?:\s+{mask})+", lambda _: self.mask, _SENTENCE.sub(shown, hint))

    def _anchors(self, text: str) -> list[str]:
        """Return the anchors of a text, each once."""
        if self.anchors == "words":
            return list(dict.fromkeys(_words(text)))
        numbers = map(_plain, _NUMBER.findall(text))
        formulas = ("".join("".join(x).split()) for x in _FORMULA.findall(text))
        own = (x for x in formulas if x and not _NUMBER.fullmatch(x))
        return list(dict.fromkeys([*own, *numbers]))

    def _finder(self, completion: str) -> Callable[[str], bool]:
        """Return what says whether the completion has an anchor."""
        if self.anchors == "words":
            return set(_words(completion)).__contains__
        numbers, joined = set(map(_plain, _NUMBER.findall(completion))), "".join(completion.split())
        return lambda x: x in numbers if _NUMBER.fullmatch(x) else x in joined


def _plain(number: str) -> str:
    """Return a number without the commas of its thousands."""
    return number.replace(",", "")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
