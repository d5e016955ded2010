"""Hints: text that only the teacher sees, and where it stands in the teacher's context."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Prompt = str | Messages
Row = Mapping[str, Any]

PLACES = ("user", "system")


@dataclass(frozen=True)
class Hint:
    """What the teacher is told, and where.

    Args:
        text: a column's name; or a template with columns in braces ("The answer is {answer}."); or
            a function from the row to the text.
        where: "user" appends the hint to the last user message (after a text prompt), "system" adds
            it to the system message, which is made if there is none (before a text prompt).
        separator: between the hint and the text it joins.

    Raises:
        ValueError: `where` is unknown.
    """

    text: str | Callable[[Row], str] = "hint"
    where: str = "user"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        """Check the place."""
        if self.where not in PLACES:
            raise ValueError(f"where must be one of {PLACES}, got {self.where!r}")

    def render(self, row: Row) -> str:
        """The hint's text for one row.

        Raises:
            ValueError: a column is missing, or the hint is empty or not a string.
        """
        if callable(self.text):
            text = self.text(row)
        else:
            template = self.text if "{" in self.text else "{" + self.text + "}"
            try:
                text = template.format_map(row)
            except KeyError as error:
                raise ValueError(
                    f"the hint needs column {error.args[0]!r}, the row has {sorted(row)}"
                ) from None
            if template == "{" + self.text + "}" and not isinstance(row[self.text], str):
                raise ValueError(f"the hint must be a string, got {row[self.text]!r}")
        if not isinstance(text, str) or not text:
            raise ValueError(f"the hint must be a non-empty string, got {text!r}")
        return text

    def insert(self, prompt: Prompt, text: str) -> Prompt:
        """The teacher's prompt; `prompt` itself is left as it is.

        Raises:
            ValueError: the messages have no user message to append to.
        """
        if isinstance(prompt, str):
            parts = (prompt, text) if self.where == "user" else (text, prompt)
            return self.separator.join(parts)
        messages = [dict(message) for message in prompt]
        if self.where == "system":
            if not messages or messages[0]["role"] != "system":
                return [{"role": "system", "content": text}, *messages]
            messages[0]["content"] += self.separator + text
            return messages
        for message in reversed(messages):
            if message["role"] == "user":
                message["content"] += self.separator + text
                return messages
        raise ValueError(f"a hint in the user turn needs a user message, got {messages!r}")
