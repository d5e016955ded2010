"""What the teacher's context has of its own besides hints: its template, its system message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_distill.data.hints import HintedMessages, Messages, PlacedHint, insert_hints

TEACHER_SEES = ("prompt", "reference")


@dataclass(frozen=True)
class TeacherView:
    """Makes the teacher's context out of the student's prompt and hints.

    Args:
        template_kwargs: arguments of the chat template, those of both sides included.
        system_prompt: the text of the teacher's system message, in place of the prompt's; or None.
        sees: "prompt" for the prompt with its hints; "reference" for the hints alone, with the
            system message.

    Raises:
        ValueError: `sees` is unknown.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    sees: str = "prompt"

    def __post_init__(self) -> None:
        """Check what the teacher sees."""
        if self.sees not in TEACHER_SEES:
            raise ValueError(f"teacher_sees must be one of {TEACHER_SEES}, got {self.sees!r}")
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise ValueError(
                f"teacher_system_prompt must have text, or be None, got {self.system_prompt!r}"
            )

    def is_plain(self, student_kwargs: Mapping[str, Any]) -> bool:
        """Return whether without hints the teacher reads what the student reads."""
        same = dict(self.template_kwargs) == dict(student_kwargs)
        return same and self.system_prompt is None and self.sees == "prompt"

    def messages(
        self, messages: Messages, num_prompt: int, hints: Sequence[PlacedHint]
    ) -> HintedMessages:
        """Return a dialogue as the teacher sees it.

        Args:
            messages: prompt and completion, as the student sees them.
            num_prompt: how many of them are the prompt's.
            hints: to insert; their `at` count the messages.

        Returns:
            The messages, and where those of the completion now stand.

        Raises:
            ValueError: the teacher sees hints alone, and there are none.
        """
        if self.sees == "prompt":
            return self._in_system(insert_hints, messages, hints)
        check_reference(hints)
        asked = [i < num_prompt and m["role"] != "system" for i, m in enumerate(messages)]
        empty = [m | {"content": ""} if x else m for m, x in zip(messages, asked, strict=True)]
        made = self._in_system(insert_hints, empty, without_first_separators(hints))
        dropped = {
            at
            for at, x in zip(made.moved, asked, strict=True)
            if x and not made.messages[at]["content"]
        }
        kept = [i for i in range(len(made.messages)) if i not in dropped]
        new = {old: i for i, old in enumerate(kept)}
        return HintedMessages(
            [made.messages[i] for i in kept], [new.get(at, -1) for at in made.moved]
        )

    def _in_system(
        self, insert: Any, messages: Messages, hints: Sequence[PlacedHint]
    ) -> HintedMessages:
        """Insert hints, with the teacher's system message in place of the student's."""
        if self.system_prompt is None:
            return insert(messages, hints)
        own = {"role": "system", "content": self.system_prompt}
        if messages and messages[0]["role"] == "system":
            return insert([own, *messages[1:]], hints)
        behind = [x if x.hint.where == "system" else x._replace(at=x.at + 1) for x in hints]
        made = insert([own, *messages], behind)
        return HintedMessages(made.messages, made.moved[1:])

    def text(self, prompt: str, hints: Sequence[PlacedHint]) -> str:
        """Return a text prompt as the teacher sees it.

        Raises:
            ValueError: there is a system message, which texts have not; or as `messages`.
        """
        if self.system_prompt is not None:
            raise ValueError(
                "teacher_system_prompt needs prompts of chat messages, got a text; a Hint with "
                "where='system' puts text in front of a text prompt"
            )
        shown: Any = prompt
        if self.sees == "reference":
            check_reference(hints)
            shown, hints = hints[0].text, hints[1:]
        for hint, text, _ in hints:
            shown = hint.insert(shown, text)
        return shown


def check_reference(hints: Sequence[PlacedHint]) -> None:
    """Check that there is something for a teacher that sees nothing else.

    Raises:
        ValueError: there is not.
    """
    if not hints:
        raise ValueError(
            "a teacher that sees the reference only needs a hint in each row, got none"
        )


def without_first_separators(hints: Sequence[PlacedHint]) -> list[PlacedHint]:
    """Return the hints; the first that joins a user message has nothing in front of it."""
    joined: set[int] = set()
    result = []
    for placed in hints:
        first = placed.hint.where == "user" and placed.at not in joined
        if first:
            joined.add(placed.at)
            placed = placed._replace(hint=replace(placed.hint, separator=""))
        result.append(placed)
    return result
