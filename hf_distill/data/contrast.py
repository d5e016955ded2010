"""A wrong hint beside the right one: where it comes from, and rows that have none."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_distill.data.batches import TokenRow
from hf_distill.data.hints import Hint, Row
from hf_distill.data.rendering import RenderedSides

SOURCES = ("hint", "other_row", "corrupted_number", "reference")
Hints = Hint | str | Callable[[Row], str | None] | Sequence[Hint]
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Contrast:
    """Says what the teacher reads in its second context, whose effect is taken off the first's.

    Args:
        source: "hint" is a hint of its own, see `hint`. "other_row" puts the hints of another row
            of the batch into the places of this row's. "corrupted_number" changes a digit of the
            last number of the row's own hints, everywhere in them. "reference" shows the hints
            alone, without the question.
        hint: of the source "hint": a `Hint`, or its text (a column, a template or a function of
            the row), or several.

    Raises:
        ValueError: the source is unknown, or a hint is given for another source or missing.
    """

    source: str = "hint"
    hint: Hints | None = None

    def __post_init__(self) -> None:
        """Check the source."""
        if self.source not in SOURCES:
            raise ValueError(f"a contrast's source must be one of {SOURCES}, got {self.source!r}")
        if (self.source == "hint") != (self.hint is not None):
            raise ValueError(
                f"a contrast needs a hint with the source 'hint' only, got {self.source!r} and "
                f"{self.hint!r}"
            )

    @property
    def hints(self) -> tuple[Hint, ...]:
        """Return the hints of the source "hint"."""
        return as_hints(() if self.hint is None else self.hint)


def as_hints(hint: Hints) -> tuple[Hint, ...]:
    """Return what is given for hints as `Hint` objects."""
    several = [hint] if isinstance(hint, Hint | str) or callable(hint) else hint
    return tuple(x if isinstance(x, Hint) else Hint(x) for x in several)


def corrupted(texts: Sequence[str]) -> list[str] | None:
    """Return texts in which their last number has become another; None if they have no number.

    One digit changes, so that the number keeps its length, and everywhere where the number stands
    by itself. Which digit follows from the texts.
    """
    numbers = [x for text in texts for x in _NUMBER.findall(text)]
    if not numbers:
        return None
    old, draw = numbers[-1], random.Random("\n".join(texts))
    at = draw.randrange(len(old))
    lowest = "1" if at == 0 and len(old) > 1 else "0"
    digit = draw.choice([x for x in "0123456789" if x >= lowest and x != old[at]])
    new = f"{old[:at]}{digit}{old[at + 1 :]}"
    return [_NUMBER.sub(lambda m: new if m.group() == old else m.group(), text) for text in texts]


def with_other_rows(made: Sequence[RenderedSides]) -> list[RenderedSides]:
    """Give each row of a batch the hints of the next one whose hints are others, as its contrast.

    A row without such a neighbour, or without hints, stays without.
    """
    found = []
    for i, row in enumerate(made):
        others = [*made[i + 1 :], *made[:i]]
        theirs = [x.hints for x in others if x.hints and list(x.hints) != list(row.hints)]
        fitting = next((x for x in theirs if len(x) == len(row.hints)), None)
        again = row.again if row.hints and not row.dropped else None
        found.append(
            row if fitting is None or again is None else row._replace(contrast=again(fitting))
        )
    return found


def contrast_rows(made: Sequence[RenderedSides]) -> tuple[list[TokenRow], list[bool]]:
    """Return the rows of the second context, and which of them are those of the first.

    A row without a wrong hint has the teacher's own row, from which nothing is learnt.
    """
    rows = [x.teacher if x.contrast is None else x.contrast for x in made]
    same = [list(row.ids) == list(x.teacher.ids) for row, x in zip(rows, made, strict=True)]
    return rows, same
