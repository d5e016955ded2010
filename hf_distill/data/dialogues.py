"""Rows of dialogues: the same replies on both sides, with hints among the messages or without."""

from collections.abc import Callable, Sequence

from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import ChatIds, Dialogue, join_replies, render_dialogue
from hf_distill.data.hints import Messages, PlacedHint, insert_hints

# One side's row, with some hints: the student's with none
RowWith = Callable[[Sequence[PlacedHint]], TokenRow]


def rendered_row(messages: Messages, scored: Sequence[int], chat: ChatIds) -> RowWith:
    """Return a function from hints to a row of replies as the template writes them.

    Args:
        messages: the dialogue.
        scored: indices of replies, ascending, at least one.
        chat: renders.
    """

    def row(hints: Sequence[PlacedHint]) -> TokenRow:
        hinted = insert_hints(messages, hints)
        return render_dialogue(hinted.messages, [hinted.moved[i] for i in scored], chat)

    return row


def written_row(
    dialogue: Dialogue,
    replies: Sequence[int],
    completions: Sequence[Sequence[int]],
    scored: Sequence[int],
    chat: ChatIds,
) -> RowWith:
    """Return a function from hints to a row of replies that are token ids.

    Args:
        dialogue: with the replies as text, for hints.
        replies: where they stand in it.
        completions: their ids.
        scored: which of them count.
        chat: renders what stands between them.
    """
    counts = [reply in scored for reply in replies]

    def row(hints: Sequence[PlacedHint]) -> TokenRow:
        hinted = insert_hints(dialogue.messages, hints)
        moved = [hinted.moved[i] for i in replies]
        between = chat.between(dialogue, hinted.messages, moved)
        return join_replies(between, completions, counts, chat.ends)

    return row


def begun_row(
    dialogue: Dialogue, rest: Sequence[int], scored: Sequence[int], chat: ChatIds
) -> RowWith:
    """Return a function from hints to a row of the data's replies; the prompt begins the first.

    Its rest is token ids, so that the row begins with the ids that completions are sampled behind;
    rendered whole, the template could write its beginning otherwise (thoughts, joined tokens).

    Args:
        dialogue: of the data.
        rest: what the completion adds to the begun reply, with its end token.
        scored: indices of replies, ascending, at least one.
        chat: renders the other replies.
    """
    messages, first = dialogue.messages, dialogue.num_prompt
    others = [i for i in range(first + 1, scored[-1] + 1) if messages[i]["role"] == "assistant"]
    completions = [rest, *(chat.reply(messages, i)[1] for i in others)]
    return written_row(dialogue, [first, *others], completions, scored, chat)
