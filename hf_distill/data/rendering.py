"""A row of both sides as token ids, with hints that are cut to fit a budget."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from hf_distill.data.batches import TokenRow
from hf_distill.data.hints import PlacedHint, Prompt

SHOWN_CHARACTERS = 60  # of a prompt in an error

# [B] bool, in batches of a collator that shortens hints, and of one that leaves them out
TRUNCATED, DROPPED = "teacher_hint_truncated", "teacher_hint_dropped"
MASKED = "teacher_hint_masked"  # and of one that hides parts of them


Given = TypeVar("Given")
Result = TypeVar("Result")


class RenderedSides(NamedTuple):
    """Holds both sides of a row.

    contrasts: the teacher's side with each wrong hint. again: the teacher's side with other texts
    in the places of its hints.
    """

    student: TokenRow
    teacher: TokenRow
    truncated: bool  # whether hints were
    hints: Sequence[str] = ()  # as they stand in the teacher's row
    dropped: bool = False  # whether they were left out, all of them
    contrasts: Sequence[TokenRow] = ()
    again: Callable[[Sequence[str]], TokenRow] | None = None
    masked: bool = False  # whether a part of the hints is hidden, see `HintMasking`

    def without_hints(self) -> "RenderedSides":
        """Score the same tokens, and let the teacher read what the student reads."""
        return RenderedSides(self.student, self.student, truncated=False, dropped=bool(self.hints))

    def each(self, change: Callable[[TokenRow], TokenRow]) -> "RenderedSides":
        """Change the rows of all sides in the same way."""
        again = self.again
        return self._replace(
            student=change(self.student),
            teacher=change(self.teacher),
            contrasts=[change(x) for x in self.contrasts],
            again=None if again is None else lambda texts: change(again(texts)),
        )


def in_row(i: int, make: Callable[[Given], Result], row: Given) -> Result:
    """Make something of row `i` of a batch, whose number an error then names.

    Raises:
        ValueError: what is made of it raises one.
    """
    try:
        return make(row)
    except ValueError as error:
        raise ValueError(f"row {i} of the batch: {error}") from error


def check_length(prompt: Prompt, what: str, length: int, budget: int | None) -> None:
    """Check that a row's prompt, hint or completion (`what`) has at most `budget` tokens.

    Raises:
        ValueError: it has more; naming the row by its prompt.
    """
    if budget is not None and length > budget:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        raise ValueError(
            f"the {what} of {str(text)[:SHOWN_CHARACTERS]!r}... has {length} tokens, "
            f"max_{what}_length is {budget}"
        )


def fit_hints(
    student: TokenRow,
    hints: Sequence[PlacedHint],
    teacher: Callable[[Sequence[PlacedHint]], TokenRow],
    longest: int,
    tokenizer: PreTrainedTokenizerBase,
) -> RenderedSides:
    """Make both sides of a row whose hints are over their budget, cut until they fit.

    The teacher's side is still too long if nothing is left to cut.

    Args:
        student: its side.
        hints: uncut.
        teacher: its side, with some hints.
        longest: tokens that the teacher's row may have.
        tokenizer: of the hints.
    """
    made = teacher(hints)
    while (excess := len(made.ids) - longest) > 0:
        shorter = shorten_hints(hints, excess, tokenizer)
        if shorter is None:
            break
        hints, made = shorter, teacher(shorter)
    return RenderedSides(student, made, True, [hint.text for hint in hints])


def shorten_hints(
    hints: Sequence[PlacedHint], excess: int, tokenizer: PreTrainedTokenizerBase
) -> list[PlacedHint] | None:
    """Cut `excess` tokens off the longest hint's end, or return None if it has no more.

    At least a token of the hint stays at each call. A template can change how a text is tokenised,
    so the caller counts again.

    Raises:
        ValueError: the tokenizer does not say where tokens begin and end.
    """
    offsets = [_offsets(hint.text, tokenizer) for hint in hints]
    longest = max(range(len(hints)), key=lambda i: len(offsets[i]))
    text, spans = hints[longest].text, offsets[longest]
    shorter = text[: _end(spans, max(1, len(spans) - excess))]
    if len(shorter) in (0, len(text)):
        return None
    result = list(hints)
    result[longest] = hints[longest]._replace(text=shorter)
    return result


def _end(offsets: Sequence[tuple[int, int]], kept: int) -> int:
    """Return where a text ends after so many tokens; the bytes of a character stay together."""
    while kept and kept < len(offsets) and offsets[kept][0] < offsets[kept - 1][1]:
        kept -= 1
    return offsets[kept - 1][1] if kept else 0


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Return where in a text its tokens begin and end."""
    if not tokenizer.is_fast:
        raise ValueError(
            "truncation 'hint' needs a fast tokenizer, got " + type(tokenizer).__name__
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return cast(list[tuple[int, int]], encoded["offset_mapping"])
