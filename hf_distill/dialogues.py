"""Dialogues as token ids: which tokens of a rendered chat are whose message."""

from collections.abc import Callable, Sequence

from hf_distill.alignment import Rendered
from hf_distill.hints import Messages, Placed

SCORED = ("all", "hinted", "after_hint")

# Token ids of messages, with or without the prompt for a reply
Template = Callable[[Messages, bool], list[int]]


def scored_messages(
    messages: Messages, num_prompt: int, hints: Sequence[Placed], scored: str
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


def render(
    messages: Messages, scored: Sequence[int], template: Template, eos_token_id: int | None
) -> Rendered:
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
    return Rendered(ids, at)
