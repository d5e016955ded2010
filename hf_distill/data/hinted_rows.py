"""Rows of prompts, hints and completions, as the student and the teacher read them."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from hf_distill.data import batches, rendering, row_columns, texts
from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import (
    ChatIds,
    begins_reply,
    join_dialogue,
    scored_messages,
    text_of,
)
from hf_distill.data.contrast import Contrast, corrupted
from hf_distill.data.dialogues import (
    begun_replies,
    rendered_row,
    student_replies,
    written_row,
)
from hf_distill.data.episodes import Episode
from hf_distill.data.hint_masking import HintMasking
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


TeacherSide = Callable[[TeacherView, Sequence[PlacedHint]], TokenRow]
"""Makes the teacher's row, as a view shows it, with some hints."""


def _text(message: dict[str, Any]) -> str:
    """Return a reply's text; messages that are not the student's have none."""
    content = message.get("content") if message["role"] == "assistant" else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or [])


class AllHints(NamedTuple):
    """Holds a row's hints, and the wrong ones of each of its contexts that has its own."""

    right: list[PlacedHint]
    wrong: list[list[PlacedHint]]
    masked: bool = False

    def check_before(self, reply: int) -> None:
        """Check all, see `hints.check_before`."""
        for hints in (self.right, *self.wrong):
            check_before(hints, reply)


class HintedRows(PromptIds):
    """Makes both sides of a row; a `HintCollator` makes batches of them."""

    hints: tuple[Hint, ...]
    view: TeacherView
    contrasts: tuple[Contrast, ...]
    hint_masking: HintMasking | None
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
    def _shows_reference(self) -> bool:
        return "reference" in {x.source for x in self.contrasts}

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

    def _all_hints(
        self, row: Row, completion: str | None, place: Callable[[Hint, str], PlacedHint]
    ) -> AllHints:
        """Return the row's hints, and the wrong ones, as far as the teacher may see them."""
        if not self.needs_hints and not row_columns.may_mean(row, DEFAULT_HINT):
            return AllHints([], [])

        def placed(hints: Sequence[Hint], seen: Row) -> list[PlacedHint]:
            pairs = [(x, x.render(seen)) for x in hints]
            return [place(x, text) for x, text in pairs if text is not None]

        right, wrong = placed(self.hints, row), list[list[PlacedHint]]()
        for contrast in self.contrasts:
            found = [placed(contrast.hints, seen) for seen in contrast.views(row)]
            wrong += [x for i, x in enumerate(found) if x and x not in found[:i]]
        return self._masked(right, wrong, completion)

    def _masked(
        self, right: list[PlacedHint], wrong: list[list[PlacedHint]], completion: str | None
    ) -> AllHints:
        masking = self.hint_masking
        if masking is None or not right:
            return AllHints(right, wrong)
        if completion is None:
            raise ValueError(
                "hint_masking needs a completion to compare the hints with, and a context that is "
                "still to be completed has none"
            )

        def seen(hints: list[PlacedHint]) -> list[PlacedHint]:
            return [x._replace(text=masking(x.text, completion)) for x in hints]

        shown = seen(right)
        return AllHints(shown, [seen(x) for x in wrong], masked=shown != right)

    def _placed(
        self, row: Row, messages: Messages, num_prompt: int, completion: str | None
    ) -> AllHints:
        return self._all_hints(
            row, completion, lambda x, t: place_hint(x, row, t, messages, num_prompt)
        )

    def _prompt(self, row: Row, sampled: bool = False) -> list[int]:
        """Return the student's context."""
        prompt = self._column(row, "prompt_column", sampled)
        ids = self.context_ids(prompt)
        rendering.check_length(prompt, "prompt", len(ids), self.max_prompt_length)
        return ids

    def _contexts(self, row: Row, completion: str | None = None) -> RenderedSides:
        """Make both contexts; nothing is scored yet."""
        prompt, ids = self._column(row, "prompt_column"), self._prompt(row)
        begun = begins_reply(prompt)

        def side(view: TeacherView, hints: Sequence[PlacedHint]) -> TokenRow:
            if not isinstance(prompt, str):
                seen = view.messages(prompt, len(prompt) - begun, hints).messages
                return TokenRow(self._teacher_chat.context(seen, begun), [])
            start = texts.start_of_text(prompt, self.tokenizer)
            return TokenRow(self.context_ids(start + view.text(prompt[len(start) :], hints)), [])

        if isinstance(prompt, str):
            hints = self._all_hints(row, completion, lambda hint, text: PlacedHint(hint, text, 0))
        else:
            hints = self._placed(row, prompt, len(prompt) - begun, completion)
            hints.check_before(len(prompt) - begun)
        return self._made(prompt, TokenRow(ids, []), hints, side)

    def _row(self, row: Row) -> RenderedSides:
        """Make both rows, from a row with a completion."""
        prompt = self._column(row, "prompt_column")
        completion = self._column(row, "completion_column")
        if not completion or (isinstance(completion, str) and not completion.strip()):
            raise ValueError(f"the completion must not be empty, got {completion!r}")
        if not isinstance(completion, str):
            return self._dialogue(row, prompt, completion)
        made = self._contexts(row, completion)
        ids = self._text_ids(completion, prompt, made.student.ids)
        rendering.check_length(prompt, "completion", len(ids), self.max_completion_length)
        return made.each(lambda side: batches.append_completion(side.ids, ids))

    def _episode(self, episode: Episode) -> RenderedSides:
        """Make both rows, from a dialogue that the student has written."""
        row, prompt, written = episode.seen(), episode.prompt, "\n".join(episode.texts)
        if isinstance(prompt, str):
            made, ids = self._contexts(row, written), episode.completions[0]
            made = made.each(lambda side: batches.append_completion(side.ids, ids))
            if self.scored != "all" and not made.hints and not made.dropped:
                made = made.each(lambda side: side._replace(scored=[]))
            return made
        dialogue, replies = episode.dialogue, episode.replies()
        messages, num_prompt = dialogue.messages, dialogue.num_prompt
        hints = self._placed(row, messages, num_prompt, written)
        hints.check_before(replies[-1])
        scored = scored_messages(messages, num_prompt, hints.right, self.scored)
        made = dialogue, replies, episode.completions, scored
        student = written_row(*made, self._chat)([])
        return self._made(prompt, student, hints, self._written_side(*made))

    def _written_side(self, *written: Any) -> TeacherSide:
        """Return what makes the teacher's row of replies that are ids, see `written_row`."""
        make = partial(written_row, *written, chat=self._teacher_chat)
        return lambda view, hints: make(shown=view.messages)(hints)

    def _dialogue(self, row: Row, prompt: Prompt, completion: Messages) -> RenderedSides:
        if isinstance(prompt, str):
            raise ValueError(
                "a text prompt needs a text completion, got messages: give the prompt as messages "
                "too, [{'role': 'user', 'content': prompt}]"
            )
        dialogue, chat = join_dialogue(prompt, completion), self._chat
        messages, begun = dialogue.messages, dialogue.begun is not None
        shown = "\n".join(map(_text, completion))
        hints = self._placed(row, messages, dialogue.num_prompt, shown)
        replies = scored_messages(messages, dialogue.num_prompt, hints.right, self.scored)
        if not replies:
            raise ValueError(
                f"the completion must have a reply to score ({self.scored!r}), got roles "
                f"{[m['role'] for m in completion]} and {len(hints.right)} hints"
            )
        hints.check_before(replies[-1])
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
        if not (begun or self.has_own_view or self._shows_reference):
            plain = rendered_row(messages, replies, chat)
            return self._made(prompt, student, hints, lambda _, hints: plain(hints))
        written = written or student_replies(dialogue, student, replies, chat)
        return self._made(prompt, student, hints, self._written_side(dialogue, *written, replies))

    def _made(
        self, prompt: Prompt, student: TokenRow, hints: AllHints, side: TeacherSide
    ) -> RenderedSides:
        """Make the rows of all sides, with hints short enough for their budget."""
        teacher = partial(side, self.view)
        made = self._fit(prompt, student, hints.right, teacher)
        made = made._replace(masked=hints.masked and not made.dropped)
        if not self.contrasts or made.dropped or not hints.right:
            return made
        wrong = [self._fit(prompt, student, x, teacher).teacher for x in hints.wrong]

        def again(texts: Sequence[str], view: TeacherView = self.view) -> TokenRow:
            pairs = zip(hints.right, texts, strict=True)
            return side(view, [x._replace(text=text) for x, text in pairs])

        for contrast in self.contrasts:
            if contrast.source == "reference":
                wrong.append(again(made.hints, replace(self.view, sees="reference")))
            elif contrast.source == "corrupted_number":
                wrong += [again(texts) for texts in corrupted(made.hints, contrast.number)]
        return made._replace(contrasts=wrong, again=again)

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
