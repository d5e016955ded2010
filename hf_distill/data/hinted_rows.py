"""Rows of prompts, hints and completions, as the student and the teacher read them."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

from hf_distill.data import batches, rendering, row_columns, texts
from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import (
    ChatIds,
    Dialogue,
    begins_reply,
    join_dialogue,
    scored_messages,
    text_of,
)
from hf_distill.data.dialogues import (
    begun_replies,
    rendered_row,
    student_replies,
    written_row,
)
from hf_distill.data.episodes import Episode
from hf_distill.data.hints import (
    Hint,
    Messages,
    PlacedHint,
    Prompt,
    Row,
    check_before,
    place_hint,
)
from hf_distill.data.prompt_ids import PromptIds
from hf_distill.data.rendering import RenderedSides
from hf_distill.data.teacher_view import TeacherView

logger = logging.getLogger(__name__)

PROMPT = "prompt"  # the usual column, whose prompts may begin a reply
DEFAULT_HINT = "hint"


class HintedRows(PromptIds):
    """Makes both sides of a row; a `HintCollator` makes batches of them."""

    hints: tuple[Hint, ...]
    view: TeacherView
    needs_hints: bool
    scored: str
    truncation: str
    max_prompt_length: int | None
    max_hint_length: int | None
    max_completion_length: int | None
    _was_given_hints: bool
    _leaves_out: bool
    _told_columns: set[str]

    @property
    def has_own_view(self) -> bool:
        """Return whether the teacher reads something else than the student even without hints."""
        return not self.view.is_plain(self.chat_template_kwargs)

    @property
    def _teacher_chat(self) -> ChatIds:
        if dict(self.view.template_kwargs) == self.chat_template_kwargs:
            return self._chat
        other = copy.copy(self)
        other.chat_template_kwargs = dict(self.view.template_kwargs)
        other._ends = self.ends  # replies are the student's
        return other._chat

    def _column(self, row: Row, name: str, sampled: bool = False) -> Any:
        """Return the row's prompt or completion; the name is that of its argument."""
        column = getattr(self, name)
        if row.get(column) is None:
            hinted = self._was_given_hints and (self.needs_hints or sampled)
            raise ValueError(row_columns.missing_column(row, column, name, sampled, hinted))
        row_columns.check_content(row[column], column)
        if name == "prompt_column" and column != PROMPT and begins_reply(row[column]):
            self._tell_of_begun(column)
        return row[column]

    def _tell_of_begun(self, column: str) -> None:
        if column not in self._told_columns:
            self._told_columns.add(column)
            logger.warning(row_columns.warning_of_begun(column))

    def _rendered(self, row: Row) -> list[tuple[Hint, str]]:
        if not self.needs_hints and not row_columns.may_mean(row, DEFAULT_HINT):
            return []
        rendered = [(hint, hint.render(row)) for hint in self.hints]
        return [(hint, text) for hint, text in rendered if text is not None]

    def _placed(self, row: Row, messages: Messages, num_prompt: int) -> list[PlacedHint]:
        return [place_hint(h, row, text, messages, num_prompt) for h, text in self._rendered(row)]

    def _prompt(self, row: Row, sampled: bool = False) -> list[int]:
        """Return the student's context."""
        prompt = self._column(row, "prompt_column", sampled)
        ids = self.context_ids(prompt)
        rendering.check_length(prompt, "prompt", len(ids), self.max_prompt_length)
        return ids

    def _contexts(self, row: Row) -> RenderedSides:
        """Make both contexts; nothing is scored yet."""
        prompt, ids = self._column(row, "prompt_column"), self._prompt(row)
        if isinstance(prompt, str):
            hints = [PlacedHint(hint, text, 0) for hint, text in self._rendered(row)]
        else:
            begun = begins_reply(prompt)
            hints = self._placed(row, prompt, len(prompt) - begun)
            check_before(hints, len(prompt) - begun)

        def teacher(hints: Sequence[PlacedHint]) -> TokenRow:
            if not isinstance(prompt, str):
                begun = begins_reply(prompt)
                seen = self.view.messages(prompt, len(prompt) - begun, hints).messages
                return TokenRow(self._teacher_chat.context(seen, begun), [])
            start = texts.start_of_text(prompt, self.tokenizer)
            shown = self.view.text(prompt[len(start) :], hints)
            return TokenRow(self.context_ids(f"{start}{shown}"), [])

        return self._fit(prompt, TokenRow(ids, []), hints, teacher)

    def _row(self, row: Row) -> RenderedSides:
        """Make both rows, from a row with a completion."""
        prompt = self._column(row, "prompt_column")
        completion = self._column(row, "completion_column")
        if not completion or (isinstance(completion, str) and not completion.strip()):
            raise ValueError(f"the completion must not be empty, got {completion!r}")
        if not isinstance(completion, str):
            return self._dialogue(row, prompt, completion)
        made = self._contexts(row)
        ids = self._text_ids(completion, prompt, made.student.ids)
        rendering.check_length(prompt, "completion", len(ids), self.max_completion_length)
        student, teacher = (batches.append_completion(side.ids, ids) for side in made[:2])
        return made._replace(student=student, teacher=teacher)

    def _episode(self, episode: Episode) -> RenderedSides:
        """Make both rows, from a dialogue that the student has written."""
        row, prompt = episode.seen(), episode.prompt
        if isinstance(prompt, str):
            made, ids = self._contexts(row), episode.completions[0]
            one, other = (batches.append_completion(side.ids, ids) for side in made[:2])
            if self.scored != "all" and not made.hints and not made.dropped:
                one, other = one._replace(scored=[]), other._replace(scored=[])
            return made._replace(student=one, teacher=other)
        dialogue, replies = episode.dialogue, episode.replies()
        hints = self._placed(row, dialogue.messages, dialogue.num_prompt)
        check_before(hints, replies[-1])
        scored = scored_messages(dialogue.messages, dialogue.num_prompt, hints, self.scored)
        return self._sides(prompt, dialogue, replies, episode.completions, scored, hints)

    def _sides(
        self,
        prompt: Prompt,
        dialogue: Dialogue,
        replies: Sequence[int],
        completions: Sequence[Sequence[int]],
        scored: Sequence[int],
        hints: list[PlacedHint],
    ) -> RenderedSides:
        """Make both rows of replies that are token ids, see `dialogues.written_row`."""
        made = dialogue, replies, completions, scored
        student = written_row(*made, self._chat)([])
        teacher = written_row(*made, self._teacher_chat, self.view.messages)
        return self._fit(prompt, student, hints, teacher)

    def _dialogue(self, row: Row, prompt: Prompt, completion: Messages) -> RenderedSides:
        if isinstance(prompt, str):
            raise ValueError(
                "a text prompt needs a text completion, got messages: give the prompt as messages "
                "too, [{'role': 'user', 'content': prompt}]"
            )
        dialogue, chat = join_dialogue(prompt, completion), self._chat
        messages, begun = dialogue.messages, dialogue.begun is not None
        hints = self._placed(row, messages, dialogue.num_prompt)
        replies = scored_messages(messages, dialogue.num_prompt, hints, self.scored)
        if not replies:
            raise ValueError(
                f"the completion must have a reply to score ({self.scored!r}), got roles "
                f"{[m['role'] for m in completion]} and {len(hints)} hints"
            )
        check_before(hints, replies[-1])
        context, written = chat.context(prompt, begun), None
        if begun:
            rest = self._text_ids(text_of(completion[0]), prompt, context)
            written = begun_replies(dialogue, rest, replies, chat)
            student = written_row(dialogue, *written, replies, chat)([])
        else:
            student = rendered_row(messages, replies, chat)([])
        rendering.check_length(prompt, "prompt", len(context), self.max_prompt_length)
        rendering.check_length(
            prompt, "completion", len(student.ids) - len(context), self.max_completion_length
        )
        if begun or self.has_own_view:
            written = written or student_replies(dialogue, student, replies, chat)
            teacher = written_row(
                dialogue, *written, replies, self._teacher_chat, self.view.messages
            )
        else:
            teacher = rendered_row(messages, replies, chat)
        return self._fit(prompt, student, hints, teacher)

    def _fit(
        self,
        prompt: Prompt,
        student: TokenRow,
        hints: list[PlacedHint],
        teacher: Callable[[Sequence[PlacedHint]], TokenRow],
    ) -> RenderedSides:
        """Make both rows, with hints short enough for their budget."""
        made, budget = teacher(hints), self.max_hint_length
        texts = [hint.text for hint in hints]
        if budget is None:
            return RenderedSides(student, made, False, texts)
        length = len(teacher([]).ids if self.has_own_view else student.ids)
        added = len(made.ids) - length
        if added <= budget or self.truncation == "error":
            rendering.check_length(prompt, "hint", added, budget)
            return RenderedSides(student, made, False, texts)
        fitted = rendering.fit_hints(student, hints, teacher, length + budget, self.tokenizer)
        added = len(fitted.teacher.ids) - length
        if added > budget and self._leaves_out:
            return fitted.without_hints()
        rendering.check_length(prompt, "hint", added, budget)
        return fitted
