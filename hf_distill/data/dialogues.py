"""Rows of dialogues: the same replies on both sides, with hints among the messages or without."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import ChatIds, Dialogue, join_replies, render_dialogue
from hf_distill.data.hints import HintedMessages, Messages, PlacedHint, insert_hints

# One side's row, with some hints: the student's with none
RowWith = Callable[[Sequence[PlacedHint]], TokenRow]

# From messages, how many are the prompt's, and hints to what one side is shown
Shown = Callable[[Messages, int, Sequence[PlacedHint]], HintedMessages]

Written = tuple[list[int], list[Sequence[int]]]
"""Where replies stand in a dialogue, and their ids."""


def with_hints(messages: Messages, _: int, hints: Sequence[PlacedHint]) -> HintedMessages:
    """Show the dialogue with its hints."""
    return insert_hints(messages, hints)


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
    shown: Shown = with_hints,
) -> RowWith:
    """Return a function from hints to a row of replies that are token ids.

    Args:
        dialogue: with the replies as text, for hints.
        replies: where they stand in it.
        completions: their ids.
        scored: which of them count.
        chat: renders what stands between them.
        shown: puts hints into the dialogue.
    """
    counts = [reply in scored for reply in replies]

    def row(hints: Sequence[PlacedHint]) -> TokenRow:
        hinted = shown(dialogue.messages, dialogue.num_prompt, hints)
        moved = [hinted.moved[i] for i in replies]
        between = chat.between(dialogue, hinted.messages, moved)
        return join_replies(between, completions, counts, chat.ends)

    return row


def begun_replies(
    dialogue: Dialogue, rest: Sequence[int], scored: Sequence[int], chat: ChatIds
) -> Written:
    """Return the data's replies as token ids; the prompt begins the first.

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
    return [first, *others], completions


def student_replies(
    dialogue: Dialogue, student: TokenRow, scored: Sequence[int], chat: ChatIds
) -> Written:
    """Return the data's replies as the ids that they have in the student's row.

    A template that has other arguments for the teacher may write replies otherwise.

    Args:
        dialogue: of the data.
        student: its row.
        scored: indices of the replies that the row scores, ascending.
        chat: renders the student's replies.

    Raises:
        ValueError: two scored replies follow each other with nothing between.
    """
    at = list(student.scored)
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(at), 1) if b != a + 1), len(at)]
    if len(starts) != len(scored) + 1:
        raise ValueError(
            "replies must be apart where the teacher's context is rendered otherwise than the "
            f"student's, got {len(scored)} scored replies in {len(starts) - 1} places"
        )
    ids = [[student.ids[k] for k in at[a:b]] for a, b in pairwise(starts)]
    known = dict(zip(scored, ids, strict=True))
    messages = dialogue.messages
    found = range(dialogue.num_prompt, scored[-1] + 1)
    replies = [i for i in found if messages[i]["role"] == "assistant"]
    return replies, [known.get(i) or chat.reply(messages, i)[1] for i in replies]
