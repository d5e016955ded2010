"""Hints: text that only the teacher sees, and where it stands in the teacher's context."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple

from hf_distill.data import row_columns

Messages = list[dict[str, Any]]
Prompt = str | Messages
Row = Mapping[str, Any]

PLACES = ("user", "system", "before", "after")
OWN_MESSAGE = ("before", "after")


def columns_of_template(text: str) -> list[str]:
    """Return the columns that a template names in braces; of {a.b[0]:>3} it is a.

    Raises:
        ValueError: a brace is open, or what is in braces is the name of no column.
    """
    try:
        fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        columns = [re.split(r"[.\[]", name)[0] for name in fields]
        for name in columns:
            if not name.strip() or name.isdigit() or set(name) & set("\"'{}\n"):
                raise ValueError(f"{name!r} is no column")
    except ValueError as error:
        raise ValueError(
            f"the hint {text!r} must be a template with columns in braces: {error}; write {{{{ and "
            "}} for braces that are text"
        ) from error
    return columns


@dataclass(frozen=True)
class Hint:
    """Says what the teacher is told, and where.

    Args:
        text: names a column, or is a template with columns in braces ("The answer is {answer}."),
            or a function from the row to the text. The function may return None for a row without
            this hint.
        where: says where the hint stands. "user" appends it to a user message (after a text
            prompt). "system" adds it to the system message (before a text prompt). If there is no
            system message, one is made, which takes the place of one that the chat template writes
            by itself. "before" and "after" make it a message of its own beside message `turn`.
        separator: the text between the hint and the message that it joins.
        turn: the message that "user", "before" and "after" mean, counted over prompt and
            completion, and from the end if negative. It is a number, a column that contains it, or
            a function of the row. None means the last user message of the prompt, or for "before"
            and "after" the last message of the prompt in front of the reply.
        role: the role of a hint that is a message of its own.
        optional: whether a row in which one of the hint's columns is None has no such hint.
            Otherwise such a row raises an error.

    Raises:
        ValueError: `where` is unknown, or `turn` is given for "system", or the text is no template
            of columns.
    """

    text: str | Callable[[Row], str | None] = "hint"
    where: str = "user"
    separator: str = "\n\n"
    turn: int | str | Callable[[Row], int] | None = None
    role: str = "user"
    optional: bool = False

    def __post_init__(self) -> None:
        """Check the place."""
        if self.where not in PLACES:
            raise ValueError(f"where must be one of {PLACES}, got {self.where!r}")
        if self.where == "system" and self.turn is not None:
            raise ValueError(f"a hint in the system message has no turn, got {self.turn!r}")
        if isinstance(self.text, str) and "{" in self.text:
            columns_of_template(self.text)

    def render(self, row: Row) -> str | None:
        """Return the hint's text for one row; None if there is none for it.

        Raises:
            ValueError: a column is missing, or the hint is empty or not a string.
        """
        if callable(self.text):
            text = self.text(row)
            if text is None:
                return None
        else:
            text = self._filled(row)
            if text is None:
                return None
        if not isinstance(text, str) or not text:
            raise ValueError(f"the hint must be a non-empty string, got {text!r}")
        return text

    def _filled(self, row: Row) -> Any:
        assert isinstance(self.text, str)
        is_template = "{" in self.text
        names = [self.text]
        if is_template:  # of {a.b[0]:>3} the column is a
            names = columns_of_template(self.text)
        for name in names:
            if name not in row:
                raise ValueError(row_columns.missing_hint(row, name, is_template))
            if row[name] is None and self.optional:
                return None
            if row[name] is None:
                raise ValueError(f"the hint's column {name!r} must not be None")
        return self.text.format_map(row) if is_template else row[self.text]

    def index(self, row: Row, messages: Messages, num_prompt: int) -> int:
        """Return the index of the message beside which, or in which, the hint stands.

        Args:
            row: for `turn`.
            messages: prompt and completion.
            num_prompt: how many of them are the prompt's.

        Raises:
            ValueError: there is no such message, or a hint in a user turn would be in another's.
        """
        if self.turn is None:
            last = range(num_prompt - 1, -1, -1)
            found = [i for i in last if self.where != "user" or messages[i]["role"] == "user"]
            if not found:
                raise ValueError(f"a hint in the user turn needs a user message, got {messages!r}")
            return found[0]
        if isinstance(self.turn, str) and self.turn not in row:
            raise ValueError(
                f"the hint's turn needs column {self.turn!r}, the row has {sorted(row)}"
            )
        turn = self.turn(row) if callable(self.turn) else self.turn
        turn = row[turn] if isinstance(turn, str) else turn
        if not hasattr(turn, "__index__") or not -len(messages) <= turn < len(messages):
            raise ValueError(
                f"the hint's turn must name one of {len(messages)} messages, got {turn!r}"
            )
        turn = operator.index(turn) % len(messages)
        if self.where == "user" and messages[turn]["role"] != "user":
            raise ValueError(
                f"a hint in the user turn needs a user message, got {messages[turn]!r} at {turn}"
            )
        return turn

    def insert(self, prompt: Prompt, text: str) -> Prompt:
        """Put a hint that has no turn into the teacher's prompt; `prompt` itself is left as it is.

        Raises:
            ValueError: the messages have no user message to append to, or a text prompt has none
                of its own.
        """
        if isinstance(prompt, str):
            if self.where in OWN_MESSAGE or self.turn is not None:
                raise ValueError(
                    "a hint with a turn, or as a message of its own, needs chat messages, got text"
                )
            parts = (prompt, text) if self.where == "user" else (text, prompt)
            return self.separator.join(parts)
        return insert_hints(prompt, [place_hint(self, {}, text, prompt, len(prompt))]).messages


class PlacedHint(NamedTuple):
    """Holds a hint for one dialogue: its text, and the message it concerns (0 for the system's)."""

    hint: Hint
    text: str
    at: int

    @property
    def start(self) -> int:
        """Return the index of the first message that comes behind the hint, or holds it."""
        return self.at + (self.hint.where == "after")


class HintedMessages(NamedTuple):
    """Holds a dialogue with its hints; message i of the one without is now message moved[i]."""

    messages: Messages
    moved: list[int]


def place_hint(hint: Hint, row: Row, text: str, messages: Messages, num_prompt: int) -> PlacedHint:
    """Look up the message of a hint: see `Hint.index`."""
    at = 0 if hint.where == "system" else hint.index(row, messages, num_prompt)
    return PlacedHint(hint, text, at)


def check_before(hints: Sequence[PlacedHint], reply: int) -> None:
    """Check that each hint stands before a reply that is scored; the last is message `reply`.

    Raises:
        ValueError: one stands behind it.
    """
    for hint in hints:
        if hint.start > reply:
            raise ValueError(
                "a hint must stand before a reply that is scored, the last is message "
                f"{reply}; got {hint.hint.where!r} of message {hint.at}"
            )


def append_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the message with more text; its content is a string or a list of parts.

    Raises:
        ValueError: it has another content, or none.
    """
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": content + text}
    if isinstance(content, list):
        return message | {"content": [*content, {"type": "text", "text": text}]}
    raise ValueError(f"text needs a message with content to append to, got {message!r}")


def insert_hints(messages: Messages, hints: Sequence[PlacedHint]) -> HintedMessages:
    """Put all hints into a copy of the dialogue; their `at` count the messages without hints."""
    before: list[Messages] = [[] for _ in messages]
    after: list[Messages] = [[] for _ in messages]
    changed = [dict(message) for message in messages]
    first: Messages = []
    for hint, text, at in hints:
        if hint.where in OWN_MESSAGE:
            side = before if hint.where == "before" else after
            side[at].append({"role": hint.role, "content": text})
        elif hint.where == "user":
            changed[at] = append_text(changed[at], hint.separator + text)
        elif first or (changed and changed[0]["role"] == "system"):
            target = first or changed
            target[0] = append_text(target[0], hint.separator + text)
        else:
            first = [{"role": "system", "content": text}]
    result, moved = first, []
    for i, message in enumerate(changed):
        result += before[i]
        moved.append(len(result))
        result += [message, *after[i]]
    return HintedMessages(result, moved)
