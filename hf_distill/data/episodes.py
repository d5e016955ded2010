"""Episodes: what the student wrote for a row, and what an environment said to it."""

from dataclasses import dataclass, field
from typing import Any

from hf_distill.data.chat import Dialogue, join_dialogue
from hf_distill.data.hints import Messages, Prompt, Row

# Columns that a hint can read after the rollout, besides the row's and the environment's
FAILED_SIBLINGS = "failed_siblings"
ROLLOUT_COLUMNS = ("attempt", "dialogue", "sibling", "failed_sibling", FAILED_SIBLINGS)


@dataclass(frozen=True)
class Attempt:
    """Holds what an environment sees of an episode.

    Args:
        row: the row of the data.
        messages: the prompt, and the replies and the environment's messages so far. The last one is
            the reply to judge. It is empty if the prompt is text.
        text: the last reply as text, without special tokens. Of a reply that the prompt begins, it
            is the rest; `messages` has the whole.
        ended: whether the reply ended with an end token.
        turn: the number of replies before this one.
        group: a number that is the same for all attempts at one row in one step, and different for
            others.
    """

    row: Row
    messages: Messages
    text: str
    ended: bool
    turn: int
    group: int


@dataclass
class Episode:
    """Holds one row's dialogue.

    Args:
        row: the data's columns.
        prompt: its prompt, text or messages.
        group: of attempts at the same row.
        completions: token ids of each reply, as sampled.
        texts: the replies as text, for hints and environments; they are never tokenised for the
            student's or the teacher's replies.
        said: the environment's messages behind each reply but the last.
        columns: the environment's.
        hints: as the teacher reads them.
        context: token ids of the prompt, ready to be completed.
    """

    row: Row
    prompt: Prompt
    group: int = 0
    completions: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    said: list[Messages] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    context: list[int] = field(default_factory=list)

    @property
    def dialogue(self) -> Dialogue:
        """Return prompt, replies as text and what the environment said; empty for a text prompt."""
        if isinstance(self.prompt, str):
            return Dialogue([], 0)
        result = []
        for i, text in enumerate(self.texts):
            result.append({"role": "assistant", "content": text})
            result += self.said[i] if i < len(self.said) else []
        return join_dialogue(self.prompt, result)

    @property
    def messages(self) -> Messages:
        """Return the messages of the dialogue."""
        return self.dialogue.messages

    def replies(self) -> list[int]:
        """Return where among `messages` the replies stand."""
        at, result = self.dialogue.num_prompt, []
        for i in range(len(self.completions)):
            result.append(at)
            at += 1 + (len(self.said[i]) if i < len(self.said) else 0)
        return result

    def seen(self) -> dict[str, Any]:
        """Return the row as hints read it: with the environment's columns and the rollout's.

        Raises:
            ValueError: a column of the data has the name of one of the rollout.
        """
        taken = sorted(self.row.keys() & set(ROLLOUT_COLUMNS))
        if taken:
            raise ValueError(f"the column {taken[0]!r} is the rollout's; rename the data's")
        made = dict.fromkeys(ROLLOUT_COLUMNS)
        made |= {"attempt": self.texts[-1], "dialogue": self.messages}
        return {**self.row, **made, **self.columns}

    def attempt(self, ended: bool) -> Attempt:
        """Return what an environment sees."""
        turn = len(self.completions) - 1
        return Attempt(self.row, self.messages, self.texts[-1], ended, turn, self.group)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to build the same rows again, beside the data's row."""
        names = ("completions", "texts", "said", "columns")
        return {name: getattr(self, name) for name in names}
