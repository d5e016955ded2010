"""Texts as token ids: what a tokenizer puts around them, and what stays if they go on."""

from typing import cast

from transformers import PreTrainedTokenizerBase

from hf_distill.data.turn_ends import TurnEnds


def _bare(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def context_of_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return token ids of a text that is to be continued.

    What the tokenizer puts in front of a text (a start token) stays, unless the text begins with it
    already, as one does that a chat template wrote. What it puts behind a text (an end token) does
    not: the text goes on.
    """
    whole = cast(list[int], tokenizer(text)["input_ids"])
    bare = _bare(text, tokenizer)
    if whole == bare:
        return whole
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if whole[i : i + len(bare)] == bare), None)
    if start is None:
        raise ValueError(
            "a tokenizer must put special tokens around a text, and not into it: with them the "
            f"ids begin with {whole[:8]}, without them with {bare[:8]}"
        )
    if not bare:  # the special tokens alone: up to the start token
        opening = (tokenizer.bos_token_id, tokenizer.cls_token_id)
        return whole[: max((i + 1 for i, x in enumerate(whole) if x in opening), default=0)]
    if start and bare[0] == whole[0]:
        return bare
    return whole[: start + len(bare)]


def start_of_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the start token that a text begins with, as text; empty if it begins otherwise."""
    for token in (tokenizer.bos_token, tokenizer.cls_token):
        if isinstance(token, str) and token and text.startswith(token):
            return token
    return ""


def completion_of_text(
    text: str, tokenizer: PreTrainedTokenizerBase, ends: TurnEnds, end: int | None
) -> list[int]:
    """Return token ids of a completion, up to its end token, appended if the text has none.

    Args:
        text: of the completion.
        tokenizer: of the ids.
        ends: the tokens that may end it.
        end: the one to append, or None.
    """
    ids = _bare(text, tokenizer)
    for at in (i for i, token in enumerate(ids) if token in ends.ids):
        behind = [token for token in ids[at:] if token not in ends.ids]
        if not behind or not str(tokenizer.decode(behind)).strip():
            return ids[: at + 1]  # a template's line break behind it is the next context's
    return ids if end is None else [*ids, end]
