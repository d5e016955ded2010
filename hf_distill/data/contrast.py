"""Wrong hints beside the right one: where they come from, and rows that have none."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.data import batches
from hf_distill.data.hints import Hint, Row
from hf_distill.data.rendering import RenderedSides
from hf_distill.data.sides import CONTRAST_ABSENT, CONTRAST_SAME, UNCONTRASTED

SOURCES = ("hint", "other_row", "corrupted_number", "reference")
Hints = Hint | str | Callable[[Row], str | None] | Sequence[Hint]
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Contrast:
    """Says what the teacher reads in other contexts, whose effect is taken off the first's.

    Args:
        source: "hint" is a hint of its own, see `hint`. "other_row" puts the hints of another row
            of the batch into the places of this row's. "corrupted_number" changes a digit of the
            last number of the row's own hints, everywhere in them. "reference" shows the hints
            alone, without the question.
        hint: of the source "hint": a `Hint`, or its text (a column, a template or a function of
            the row), or several.
        number: how many wrong contexts this makes, K, at least 1: of K other rows, or with K other
            digits. With the source "hint", a column that holds a list of texts is one of them in
            each context, such as failed_siblings after a rollout. Rows may have fewer. "reference"
            has one.

    Raises:
        ValueError: the source is unknown, or a hint is given for another source or missing, or the
            number is out of range.
    """

    source: str = "hint"
    hint: Hints | None = None
    number: int = 1

    def __post_init__(self) -> None:
        """Check the source."""
        if self.source not in SOURCES:
            raise ValueError(f"a contrast's source must be one of {SOURCES}, got {self.source!r}")
        if (self.source == "hint") != (self.hint is not None):
            raise ValueError(
                f"a contrast needs a hint with the source 'hint' only, got {self.source!r} and "
                f"{self.hint!r}"
            )
        if self.number < 1 or (self.source == "reference" and self.number > 1):
            most = ", and is 1 for the source 'reference'" if self.source == "reference" else ""
            raise ValueError(f"a contrast's number must be at least 1{most}, got {self.number}")

    def views(self, row: Row) -> list[Row]:
        """Return the row as the hints of each of its contexts read it."""
        if self.number == 1:
            return [row]
        return [_entry(row, i) for i in range(self.number)]

    @property
    def hints(self) -> tuple[Hint, ...]:
        """Return the hints of the source "hint"."""
        found = as_hints(() if self.hint is None else self.hint)
        return found if self.number == 1 else tuple(replace(x, optional=True) for x in found)


def _entry(row: Row, number: int) -> Row:
    """Return the row with one text in place of each list of texts, None where it is shorter."""

    def one(value: Any) -> Any:
        if not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            return value
        return value[number] if number < len(value) else None

    return {name: one(value) for name, value in row.items()}


def as_contrasts(given: "Contrast | Hints | Sequence[Contrast] | None") -> tuple[Contrast, ...]:
    """Return what is given for contrasts as `Contrast` objects.

    Raises:
        ValueError: some of a list are hints, or two have the same source of their own.
    """
    if given is None:
        return ()
    if isinstance(given, Contrast):
        return (given,)
    several: Any = [] if isinstance(given, Hint | str) or callable(given) else list(given)
    made = tuple(x for x in several if isinstance(x, Contrast))
    if not made:
        return (Contrast(hint=given),)  # pyright: ignore[reportArgumentType]
    if len(made) < len(several):
        raise ValueError(
            "several contrasts must all be Contrast objects, each with a context of its own, or "
            f"all be hints of one context, got {several!r}"
        )
    named = [x.source for x in made if x.source != "hint"]
    twice = sorted({x for x in named if named.count(x) > 1})
    if twice:
        raise ValueError(
            f"of several contrasts only the source 'hint' may come twice, got {twice[0]!r} "
            f"{named.count(twice[0])} times: set its number"
        )
    return made


def as_hints(hint: Hints) -> tuple[Hint, ...]:
    """Return what is given for hints as `Hint` objects."""
    several = [hint] if isinstance(hint, Hint | str) or callable(hint) else hint
    return tuple(x if isinstance(x, Hint) else Hint(x) for x in several)


def corrupted(texts: Sequence[str], number: int = 1) -> list[list[str]]:
    """Return texts in which their last number has become another, `number` times or fewer.

    One digit changes, so that the number keeps its length, and everywhere where the number stands
    by itself. Which digits follows from the texts. Without a number there is none.
    """
    numbers = [x for text in texts for x in _NUMBER.findall(text)]
    if not numbers:
        return []
    old, draw = numbers[-1], random.Random("\n".join(texts))
    at = draw.randrange(len(old))
    found = [draw.choice(_with_digit(old, at))]
    if number > 1:
        others = [x for i in range(len(old)) for x in _with_digit(old, i) if x != found[0]]
        draw.shuffle(others)
        found += others[: number - 1]
    return [
        [_NUMBER.sub(lambda m, new=new: new if m.group() == old else m.group(), x) for x in texts]
        for new in found
    ]


def _with_digit(number: str, at: int) -> list[str]:
    """Return the numbers of the same length that differ in one digit."""
    lowest = "1" if at == 0 and len(number) > 1 else "0"
    digits = [x for x in "0123456789" if x >= lowest and x != number[at]]
    return [f"{number[:at]}{x}{number[at + 1 :]}" for x in digits]


def with_other_rows(made: Sequence[RenderedSides], number: int = 1) -> list[RenderedSides]:
    """Give each row of a batch the hints of the next ones whose hints are others, as contrasts.

    A row without such a neighbour, or without hints, stays without.

    Args:
        made: the rows.
        number: the most contrasts of a row. The hints of two rows that are the same give one.
    """
    found = []
    for i, row in enumerate(made):
        fitting = [list(x.hints) for x in (*made[i + 1 :], *made[:i]) if x.hints]
        fitting = [x for x in fitting if x != list(row.hints) and len(x) == len(row.hints)]
        fitting = [x for j, x in enumerate(fitting) if x not in fitting[:j]][:number]
        again = row.again if row.hints and not row.dropped else None
        others = [] if again is None else [again(x) for x in fitting]
        found.append(row._replace(contrasts=[*row.contrasts, *others]))
    return found


def contrast_columns(
    batch: Mapping[str, Tensor], made: Sequence[RenderedSides], number: int, pad_token_id: int
) -> dict[str, Tensor]:
    """Return the keys of the teacher's contexts with wrong hints, the same for all batches.

    A row without a wrong hint has the teacher's own row as its first, from which nothing is learnt.

    Args:
        batch: of the rows.
        made: the rows.
        number: of contexts, K.
        pad_token_id: of the tokenizer.

    Raises:
        AlignmentError: the scored tokens of a row are not the batch's.
    """
    found: dict[str, Tensor] = {}
    same, absent = [], []
    for k in range(number):
        rows = [x.contrasts[k] if k < len(x.contrasts) else x.teacher for x in made]
        found |= batches.build_contrast(batch, rows, pad_token_id, k)
        pairs = list(zip(rows, made, strict=True))
        same.append([list(row.ids) == list(x.teacher.ids) for row, x in pairs])
        absent.append([k >= max(1, len(x.contrasts)) for x in made])
    flags = torch.tensor(same).T.reshape(-1, number)
    if number > 1:
        found |= {CONTRAST_SAME: flags, CONTRAST_ABSENT: torch.tensor(absent).T.contiguous()}
    return found | {UNCONTRASTED: flags.all(1)}
