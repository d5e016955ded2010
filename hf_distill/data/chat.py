"""Dialogues as token ids: which tokens of a rendered chat are whose message."""

from collections.abc import Callable, Sequence
from typing import cast

from hf_distill.data.batches import TokenRow
from hf_distill.data.hints import Messages, PlacedHint

SCORED = ("all", "hinted", "after_hint")

# Token ids of messages, with or without the prompt for a reply
Template = Callable[[Messages, bool], list[int]]


def scored_messages(
    messages: Messages, num_prompt: int, hints: Sequence[PlacedHint], scored: str
) -> list[int]:
    """Assistant messages of a dialogue's completion that count, ascending.

    Args:
        messages: prompt and completion.
        num_prompt: how many are the prompt's.
        hints: those of the dialogue.
        scored: "all"; "hinted", the first reply behind each hint; "after_hint", all behind the
            first hint.
    """
    replies = [i for i, m in enumerate(messages) if i >= num_prompt and m["role"] == "assistant"]
    if scored == "all":
        return replies
    # a message of its own in front of a reply, or in the turn before it, concerns that reply
    starts = [hint.start for hint in hints]
    if scored == "after_hint":
        return [i for i in replies if starts and i >= min(starts)]
    found = {next((i for i in replies if i >= start), None) for start in starts}
    return sorted(i for i in found if i is not None)


def ids_between_replies(
    messages: Messages, template: Template, eos_token_id: int | None
) -> list[int]:
    """Token ids between the end token of a reply and the next reply: messages, then its prompt.

    They do not depend on the dialogue before them: the messages are rendered behind a stand-in for
    it, so that replies which are token ids are never rendered.

    Raises:
        ValueError: the template does not end replies with the tokenizer's end token.
    """
    opening = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    ends_of_opening = template(opening, False).count(cast(int, eos_token_id))
    ids = template([*opening, *messages], True)
    ends = [i for i, token in enumerate(ids) if token == eos_token_id]
    if not ends_of_opening or len(ends) < ends_of_opening:
        raise ValueError(
            "a dialogue goes on behind the end token of a reply, and the chat template writes "
            f"none of id {eos_token_id}"
        )
    return ids[ends[ends_of_opening - 1] + 1 :]


def join_replies(
    between: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    scored: Sequence[bool],
    eos_token_id: int | None,
) -> TokenRow:
    """A row from what stands in front of each reply, and the replies as they were sampled.

    A reply that was cut off gets an end token, unscored, if something follows.
    """
    ids: list[int] = []
    at: list[int] = []
    for piece, reply, counts in zip(between, replies, scored, strict=True):
        if ids and eos_token_id is not None and ids[-1] != eos_token_id:
            ids.append(eos_token_id)
        ids += piece
        if counts:
            at += range(len(ids), len(ids) + len(reply))
        ids += reply
    return TokenRow(ids, at)


def render_dialogue(
    messages: Messages, scored: Sequence[int], template: Template, eos_token_id: int | None
) -> TokenRow:
    """The dialogue up to its last scored message, with the places of the scored messages' tokens.

    A message ends at its last end token: what a template writes behind it is the next context's.

    Args:
        messages: the dialogue.
        scored: indices of assistant messages, ascending, at least one.
        template: to token ids.
        eos_token_id: of the tokenizer, or None.

    Raises:
        ValueError: the template renders a message otherwise once others follow it.
    """
    spans: list[tuple[list[int], int]] = []  # ids to the end of a message, and where it begins
    for i in scored:
        context, whole = template(messages[:i], True), template(messages[: i + 1], False)
        if whole[: len(context)] != context:
            raise ValueError(
                "the chat template must render prompt + completion as the prompt's ids and more; "
                f"it does not for message {i}; pass the completion as text instead"
            )
        message = whole[len(context) :]
        if eos_token_id in message:
            message = message[: len(message) - message[::-1].index(eos_token_id)]
        spans.append(([*context, *message], len(context)))
    ids = spans[-1][0]
    for i, (part, _) in zip(scored, spans, strict=True):
        if ids[: len(part)] != part:
            raise ValueError(
                "the chat template must render a dialogue as its beginning and more; it renders "
                f"message {i} otherwise once others follow it: score one message a row"
            )
    at = [position for part, start in spans for position in range(start, len(part))]
    return TokenRow(ids, at)
