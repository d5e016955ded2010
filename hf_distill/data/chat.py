"""Dialogues as token ids: which tokens of a rendered chat are whose message."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from hf_distill.data.batches import TokenRow
from hf_distill.data.hints import Messages, PlacedHint, Prompt, append_text
from hf_distill.data.turn_ends import TurnEnds

SCORED = ("all", "hinted", "after_hint")

# Token ids of messages, with or without the prompt for a reply
Template = Callable[[Messages, bool], list[int]]


def scored_messages(
    messages: Messages, num_prompt: int, hints: Sequence[PlacedHint], scored: str
) -> list[int]:
    """Return the assistant messages of a dialogue's completion that count, ascending.

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


def ids_between_replies(messages: Messages, template: Template, ends: TurnEnds) -> list[int]:
    """Return token ids from a reply's end token to the next reply: messages, then its prompt.

    They do not depend on the dialogue before them: the messages are rendered behind a stand-in for
    it, so that replies which are token ids are never rendered.

    Raises:
        ValueError: the template does not end replies with an end token.
    """
    opening = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    wanted = template(opening, False).count(ends.turn) if ends.turn is not None else 0
    wanted += ends.opens_next
    ids = template([*opening, *messages], True)
    found = [i for i, token in enumerate(ids) if token == ends.turn]
    if not wanted or len(found) < wanted:
        raise ValueError(
            "a dialogue goes on behind the end token of a reply, and the chat template writes "
            f"none of id {ends.turn or list(ends.ids)}"
        )
    return ids[found[wanted - 1] + 1 :]


def join_replies(
    between: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    scored: Sequence[bool],
    ends: TurnEnds,
) -> TokenRow:
    """Make a row from what stands in front of each reply, and the replies as they were sampled.

    A reply that was cut off gets an end token, unscored, if something follows.
    """
    ids: list[int] = []
    at: list[int] = []
    for piece, reply, counts in zip(between, replies, scored, strict=True):
        if ids and ends.turn is not None and ids[-1] not in ends.ids:
            ids.append(ends.turn)
        ids += piece
        if counts:
            at += range(len(ids), len(ids) + len(reply))
        ids += reply
    return TokenRow(ids, at)


@dataclass(frozen=True)
class ChatIds:
    """Makes token ids of dialogues, by one tokenizer and its template.

    Attributes:
        template: to token ids.
        continued: token ids of messages the last of which goes on.
        ends: the tokens that end replies.
    """

    template: Template
    continued: Callable[[Messages], list[int]]
    ends: TurnEnds

    def context(self, messages: Messages, begun: bool) -> list[int]:
        """Return ids of messages, ready for a reply, which the last of them begins if `begun`."""
        return self.continued(messages) if begun else self.template(messages, True)

    def between(
        self, dialogue: "Dialogue", messages: Messages, replies: Sequence[int], last: bool = False
    ) -> list[list[int]]:
        """Return token ids in front of each reply; with `last`, also in front of one to come.

        Args:
            dialogue: says whether the first reply is begun.
            messages: its own, or with hints among them.
            replies: where they stand there.
            last: see above.
        """
        stops = [*replies, len(messages)] if last else replies
        begun = [] if dialogue.begun is None else [dialogue.begun]
        pieces = [self.context([*messages[: stops[0]], *begun], bool(begun))]
        for start, stop in pairwise(stops):
            between = messages[start + 1 : stop]
            pieces.append(ids_between_replies(between, self.template, self.ends))
        return pieces

    def reply(self, messages: Messages, at: int) -> tuple[list[int], list[int]]:
        """Return the ids in front of a message, and its own, up to its end token.

        Raises:
            ValueError: the template does not render the one as the beginning of both.
        """
        context = self.template(messages[:at], True)
        whole = self.template(messages[: at + 1], False)
        if whole[: len(context)] != context:
            raise ValueError(
                "the chat template must render prompt + completion as the prompt's ids and more; "
                f"it does not for message {at}; pass the completion as text instead"
            )
        message = whole[len(context) :]
        return context, message[: self.ends.end_of(message)]


def render_dialogue(messages: Messages, scored: Sequence[int], chat: ChatIds) -> TokenRow:
    """Render a dialogue up to its last scored message, with the places of scored messages' tokens.

    A message ends at its end token: what a template writes behind it is the next context's. The
    last one gets an end token where the template writes none.

    Args:
        messages: the dialogue.
        scored: indices of assistant messages, ascending, at least one.
        chat: renders.

    Raises:
        ValueError: the template renders a message otherwise once others follow it.
    """
    spans = [chat.reply(messages, i) for i in scored]
    ids = [token for part in spans[-1] for token in part]
    closing = chat.ends.closing
    if closing is not None and not _ends(ids, chat.ends):
        ids.append(closing)
    at: list[int] = []
    for i, (context, message) in zip(scored, spans, strict=True):
        part = [*context, *message]
        if ids[: len(part)] != part:
            raise ValueError(
                "the chat template must render a dialogue as its beginning and more; it renders "
                f"message {i} otherwise once others follow it: score one message a row"
            )
        stop = len(part)
        if closing is not None and not _ends(part, chat.ends):
            stop += _ends(ids[: stop + 1], chat.ends)
        at += range(len(context), stop)
    return TokenRow(ids, at)


def _ends(ids: Sequence[int], ends: TurnEnds) -> bool:
    return bool(ids) and ids[-1] in ends.ids


class Dialogue(NamedTuple):
    """Holds a prompt and what follows; a reply that the prompt begins is one message with its rest.

    messages: prompt and completion. num_prompt: how many stand in front of the first reply. begun:
    the first reply as the prompt begins it, or None.
    """

    messages: Messages
    num_prompt: int
    begun: dict[str, Any] | None = None


def begins_reply(prompt: Prompt) -> bool:
    """Return whether a prompt's last message is the assistant's: completions go on with it."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"


def join_dialogue(prompt: Messages, completion: Messages) -> Dialogue:
    """Make the dialogue of a prompt and a completion.

    Raises:
        ValueError: the rest of a begun reply is more than text.
    """
    goes_on = begins_reply(prompt) and (not completion or completion[0]["role"] == "assistant")
    if not goes_on:
        return Dialogue([*prompt, *completion], len(prompt))
    *before, begun = prompt
    whole = [append_text(begun, text_of(message)) for message in completion[:1]] or [begun]
    return Dialogue([*before, *whole, *completion[1:]], len(before), begun)


def text_of(message: dict[str, Any]) -> str:
    """Return the rest of a reply, as text.

    Raises:
        ValueError: it has more than text.
    """
    content, others = message.get("content"), {k for k, x in message.items() if x}
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if others - {"role", "content"} or any(part.get("type") != "text" for part in parts):
        raise ValueError(
            "the completion goes on with the reply that the prompt begins, so its first message "
            f"must have text and nothing else, got {message!r}"
        )
    return "".join(part["text"] for part in parts)
