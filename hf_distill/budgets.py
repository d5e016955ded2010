"""Hints that are cut to fit a budget of tokens."""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from hf_distill.hints import Placed


def shortened(
    hints: Sequence[Placed], excess: int, tokenizer: PreTrainedTokenizerBase
) -> list[Placed] | None:
    """The hints with `excess` tokens less at the end of the longest, or None if it has no more.

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
    """Where a text ends after so many tokens; the bytes of a character stay together."""
    while kept and kept < len(offsets) and offsets[kept][0] < offsets[kept - 1][1]:
        kept -= 1
    return offsets[kept - 1][1] if kept else 0


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Where in a text its tokens begin and end."""
    if not tokenizer.is_fast:
        raise ValueError(
            "truncation 'hint' needs a fast tokenizer, got " + type(tokenizer).__name__
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return cast(list[tuple[int, int]], encoded["offset_mapping"])
