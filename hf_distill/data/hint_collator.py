"""HintCollator: one model's two views of a problem, with and without a hint."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.data import batches, rendering
from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import (
    SCORED,
    ids_between_replies,
    join_replies,
    render_dialogue,
    scored_messages,
)
from hf_distill.data.episodes import Episode
from hf_distill.data.hint_schedule import HintSchedule, Value
from hf_distill.data.hints import (
    Hint,
    Messages,
    PlacedHint,
    Prompt,
    Row,
    check_before,
    insert_hints,
    place_hint,
)
from hf_distill.data.rendering import DROPPED, TRUNCATED, RenderedSides

SHOWN_TOKENS = 8
TRUNCATIONS = ("error", "hint")

Given = TypeVar("Given")
Hints = Hint | str | Callable[[Row], str | None] | Sequence[Hint]


class HintCollator:
    """Batches whose student sees the prompt and whose teacher sees the prompt and a hint.

    A row has a prompt (text, or chat messages), what the hints need, and for off-policy training a
    completion (text, or messages: replies with what came between them). The student's ids are
    those of the prompt and completion alone, whatever the hints. Each side is tokenised once, with
    the chat template for messages; nothing is decoded and tokenised again.

    Args:
        tokenizer: the student's tokenizer. It needs a chat template if prompts are messages.
        hint: a `Hint`, or its text (a column, a template or a function of the row), or several.
        prompt_column: the column that holds the prompt.
        completion_column: the column that holds the completion. If a text completion lacks the end
            token, the end token is appended. It is scored like every other token.
        scored: says which replies of a completion of messages are scored: "all" scores all,
            "hinted" the first behind each hint, and "after_hint" all behind the first hint.
        max_prompt_length: the most tokens that the student's context may have. None means no limit.
        max_hint_length: the most tokens that the hints may add to the teacher's row, or None. With
            truncation "hint" it may be a schedule such as "linear:64->8@500", rounded down.
        max_completion_length: the most tokens that a completion from the data may have, or None.
        truncation: says what happens to hints over their budget: "error" raises an error, and
            "hint" cuts the end of the longest hint until all fit, and counts them as
            `hints_truncated` in the trainer's log. Prompts and completions are never cut. Hints
            that cannot be cut to a scheduled length are left out.
        hint_dropout: the share of the rows, in [0, 1], whose hints are all left out in training, so
            that the teacher reads what the student reads, while the same tokens are scored. It is a
            number, or a schedule over optimizer steps.
        chat_template_kwargs: arguments of the chat template on both sides (enable_thinking, tools).

    Raises:
        ValueError: an argument is unknown or out of range. When a batch is made: a column is
            missing, a completion is empty or has no scored reply, or a length exceeds its budget.
            The message names the row, the rule and the value.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        hint: Hints = "hint",
        *,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        scored: str = "all",
        max_prompt_length: int | None = None,
        max_hint_length: Value | None = None,
        max_completion_length: int | None = None,
        truncation: str = "error",
        hint_dropout: Value = 0.0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, choices in (
            ("scored", scored, SCORED),
            ("truncation", truncation, TRUNCATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        self.tokenizer = tokenizer
        several = [hint] if isinstance(hint, Hint | str) or callable(hint) else hint
        self.hints = tuple(x if isinstance(x, Hint) else Hint(x) for x in several)
        self.scored = scored
        self.truncation = truncation
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.max_prompt_length = max_prompt_length
        plan = HintSchedule.of(hint_dropout, max_hint_length, truncation)
        if plan.depends_on_step and not self.hints:
            raise ValueError(f"{plan.refusal()}, and there are no hints")
        self.hint_plan = plan if plan.depends_on_step else None
        self.max_hint_length, self._draw, self._leaves_out = plan.length_at(0), None, False
        self.max_completion_length = max_completion_length
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A training batch from rows with completions: see `alignment.build_batch`."""
        return self._batch(self._all(self._row, rows))

    def at(self, step: int, seed: int | None = None) -> "HintCollator":
        """The collator of one optimizer step. Trainers call it; fixed settings need no step.

        Args:
            step: optimizer steps taken.
            seed: of the training, to drop hints; None keeps them, as evaluation does.
        """
        if self.hint_plan is None:
            return self
        fixed, plan = copy.copy(self), self.hint_plan
        fixed.hint_plan, fixed.max_hint_length = None, plan.length_at(step)
        fixed._draw = None if seed is None else plan.draw(step, seed)
        fixed._leaves_out = plan.length_changes
        return fixed

    def _all(
        self, make: Callable[[Given], RenderedSides], given: Sequence[Given]
    ) -> list[RenderedSides]:
        """Both sides of some rows, without the hints that the step drops."""
        if self.hint_plan is not None:
            raise ValueError(
                f"{self.hint_plan.refusal()}: give this collator, or one around it, to a trainer, "
                "or make batches with collator.at(step)"
            )
        made = [rendering.in_row(i, make, each) for i, each in enumerate(given)]
        if self._draw is None:
            return made
        dropped = self._draw([each.student.ids for each in made])
        return [x.without_hints() if drop else x for x, drop in zip(made, dropped, strict=True)]

    def _batch(self, made: Sequence[RenderedSides]) -> dict[str, Tensor]:
        students, teachers = [x.student for x in made], [x.teacher for x in made]
        return self._with_count(batches.build_rows(students, teachers, self.pad_token_id), made)

    def prompts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The rows as they are, and the student's contexts, for completions yet to be generated.

        Returns:
            rows: the list; prompt_ids, prompt_mask: [B, T] int64, padded on the left.
        """
        prompts = [rendering.in_row(i, self._prompt, row) for i, row in enumerate(rows)]
        ids, mask = batches.pad_left(prompts, self.pad_token_id)
        return {"prompt_ids": ids, "prompt_mask": mask, "rows": list(rows)}

    def from_episodes(
        self, episodes: Sequence[Episode]
    ) -> tuple[dict[str, Tensor], list[Sequence[str]]]:
        """A training batch of dialogues that the student has written, and the hints of each.

        Hints may read the columns of `Episode.seen`. The replies' ids are those that were sampled.
        An episode may have nothing to score.
        """
        made = self._all(self._episode, episodes)
        return self._batch(made), [x.hints for x in made]

    def next_context(self, episode: Episode) -> list[int]:
        """The student's ids up to its next reply, behind what an environment has said."""
        between = self._between(episode.messages, episode.replies(), last=True)
        replies, nothing = [*episode.completions, []], [False] * len(between)
        return list(join_replies(between, replies, nothing, self.eos_token_id).ids)

    def text(self, ids: Sequence[int]) -> str:
        """A completion to be read, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def contexts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Both contexts of each row, padded on the left, for completions yet to be generated.

        Returns:
            prompt_ids, prompt_mask [B, T]; teacher_prompt_ids, teacher_prompt_mask [B, T of the
            teacher]; int64.
        """
        made = self._all(self._contexts, rows)
        sides = ([x.student.ids for x in made], [x.teacher.ids for x in made])
        batch = {}
        for name, ids in zip(("prompt", "teacher_prompt"), sides, strict=True):
            padded = batches.pad_left(ids, self.pad_token_id)
            batch[f"{name}_ids"], batch[f"{name}_mask"] = padded
        return self._with_count(batch, made)

    def without_hints(
        self, rows: Sequence[Row], completed: bool = False
    ) -> tuple[list[TokenRow], list[TokenRow]]:
        """Student's and teacher's rows as if there were no hints, to compare the two sides.

        Args:
            rows: of the data.
            completed: whether to take their completions; else the last tokens of each prompt and
                the end token stand for a reply.
        """
        bare = self._without_hints()
        make = bare._row if completed else bare._with_tail
        made = [rendering.in_row(i, make, row) for i, row in enumerate(rows)]
        return [x.student for x in made], [x.teacher for x in made]

    def _without_hints(self) -> "HintCollator":
        bare = copy.copy(self)
        bare.hints, bare.scored, bare.hint_plan = (), "all", None
        return bare

    def references(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The student's rows of the data's own completions: input_ids, attention_mask, labels."""
        batch = self._without_hints()(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def _with_tail(self, row: Row) -> RenderedSides:
        end = [] if self.eos_token_id is None else [self.eos_token_id]
        tail = [*self._prompt(row)[-SHOWN_TOKENS:], *end]
        prompt = row[self.prompt_column]
        return self._episode(Episode(row, prompt, completions=[tail], texts=[self.text(tail)]))

    def _with_count(
        self, batch: dict[str, Tensor], made: Sequence[RenderedSides]
    ) -> dict[str, Tensor]:
        if self.truncation == "hint":
            batch[TRUNCATED] = torch.tensor([x.truncated for x in made])
        if self._leaves_out or self._draw is not None:
            batch[DROPPED] = torch.tensor([x.dropped for x in made])
        return batch

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding id, or its end id where it has none; masks tell it apart."""
        for token_id in (self.tokenizer.pad_token_id, self.eos_token_id):
            if token_id is not None:
                return cast(int, token_id)
        raise ValueError("the tokenizer must have a pad or eos token, got neither")

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end id, or None."""
        return cast("int | None", self.tokenizer.eos_token_id)

    def context_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, ready to be completed."""
        if isinstance(prompt, str):
            return cast(list[int], self.tokenizer(prompt)["input_ids"])
        return self._template(prompt, add_generation_prompt=True)

    def _template(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        encoded: Any = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )
        return encoded["input_ids"]

    def _column(self, row: Row, column: str) -> Any:
        if row.get(column) is None:
            empty = "" if row else " (remove_unused_columns=False keeps the data's columns)"
            raise ValueError(f"there is no {column!r}; the row has {sorted(row)}{empty}")
        return row[column]

    def _rendered(self, row: Row) -> list[tuple[Hint, str]]:
        rendered = [(hint, hint.render(row)) for hint in self.hints]
        return [(hint, text) for hint, text in rendered if text is not None]

    def _placed(self, row: Row, messages: Messages, num_prompt: int) -> list[PlacedHint]:
        return [place_hint(h, row, text, messages, num_prompt) for h, text in self._rendered(row)]

    def _prompt(self, row: Row) -> list[int]:
        """The student's context."""
        prompt = self._column(row, self.prompt_column)
        ids = self.context_ids(prompt)
        rendering.check_length(prompt, "prompt", len(ids), self.max_prompt_length)
        return ids

    def _contexts(self, row: Row) -> RenderedSides:
        """Both contexts; nothing is scored yet."""
        prompt, ids = self._column(row, self.prompt_column), self._prompt(row)
        if isinstance(prompt, str):
            hints = [PlacedHint(hint, text, 0) for hint, text in self._rendered(row)]
        else:
            hints = self._placed(row, prompt, len(prompt))

        def teacher(hints: Sequence[PlacedHint]) -> TokenRow:
            shown = prompt
            if not isinstance(prompt, str):
                return TokenRow(self.context_ids(insert_hints(prompt, hints).messages), [])
            for hint, text, _ in hints:
                shown = hint.insert(shown, text)
            return TokenRow(self.context_ids(shown), [])

        return self._fit(prompt, TokenRow(ids, []), hints, teacher)

    def _row(self, row: Row) -> RenderedSides:
        """Both rows, from a row with a completion."""
        prompt = self._column(row, self.prompt_column)
        completion = self._column(row, self.completion_column)
        if not completion or (isinstance(completion, str) and not completion.strip()):
            raise ValueError(f"the completion must not be empty, got {completion!r}")
        if not isinstance(completion, str):
            return self._dialogue(row, prompt, completion)
        made = self._contexts(row)
        eos = self.eos_token_id
        ids = cast(list[int], self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        ids = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        rendering.check_length(prompt, "completion", len(ids), self.max_completion_length)
        student, teacher = (batches.append_completion(side.ids, ids) for side in made[:2])
        return made._replace(student=student, teacher=teacher)

    def _between(self, messages: Messages, replies: Sequence[int], last: bool) -> list[list[int]]:
        """Token ids in front of each reply; with `last`, also in front of one to come."""
        ends = [*replies, len(messages)] if last else replies
        pieces = [self.context_ids(messages[: ends[0]])]
        for start, end in pairwise(ends):
            between = messages[start + 1 : end]
            pieces.append(ids_between_replies(between, self._template, self.eos_token_id))
        return pieces

    def _episode(self, episode: Episode) -> RenderedSides:
        """Both rows, from a dialogue that the student has written."""
        row, prompt = episode.seen(), episode.prompt
        if isinstance(prompt, str):
            made, ids = self._contexts(row), episode.completions[0]
            one, other = (batches.append_completion(side.ids, ids) for side in made[:2])
            if self.scored != "all" and not made.hints and not made.dropped:
                one, other = one._replace(scored=[]), other._replace(scored=[])
            return made._replace(student=one, teacher=other)
        messages, replies = episode.messages, episode.replies()
        hints = self._placed(row, messages, len(prompt))
        check_before(hints, replies[-1])
        chosen = scored_messages(messages, len(prompt), hints, self.scored)
        counts = [reply in chosen for reply in replies]

        def rendered(messages: Messages, replies: Sequence[int]) -> TokenRow:
            between = self._between(messages, replies, last=False)
            return join_replies(between, episode.completions, counts, self.eos_token_id)

        def teacher(hints: Sequence[PlacedHint]) -> TokenRow:
            hinted = insert_hints(messages, hints)
            return rendered(hinted.messages, [hinted.moved[i] for i in replies])

        return self._fit(prompt, rendered(messages, replies), hints, teacher)

    def _dialogue(self, row: Row, prompt: Prompt, completion: Messages) -> RenderedSides:
        if isinstance(prompt, str):
            raise ValueError("a text prompt needs a text completion")
        messages = [*prompt, *completion]
        hints = self._placed(row, messages, len(prompt))
        replies = scored_messages(messages, len(prompt), hints, self.scored)
        if not replies:
            raise ValueError(
                f"the completion must have a reply to score ({self.scored!r}), got roles "
                f"{[m['role'] for m in completion]} and {len(hints)} hints"
            )
        check_before(hints, replies[-1])
        student = render_dialogue(messages, replies, self._template, self.eos_token_id)
        length = len(self.context_ids(prompt))
        rendering.check_length(prompt, "prompt", length, self.max_prompt_length)
        rendering.check_length(
            prompt, "completion", len(student.ids) - length, self.max_completion_length
        )

        def teacher(hints: Sequence[PlacedHint]) -> TokenRow:
            hinted = insert_hints(messages, hints)
            moved = [hinted.moved[i] for i in replies]
            return render_dialogue(hinted.messages, moved, self._template, self.eos_token_id)

        return self._fit(prompt, student, hints, teacher)

    def _fit(
        self,
        prompt: Prompt,
        student: TokenRow,
        hints: list[PlacedHint],
        teacher: Callable[[Sequence[PlacedHint]], TokenRow],
    ) -> RenderedSides:
        """Both rows, with hints short enough for their budget."""
        made, budget = teacher(hints), self.max_hint_length
        added = len(made.ids) - len(student.ids)
        if budget is None or added <= budget or self.truncation == "error":
            rendering.check_length(prompt, "hint", added, budget)
            return RenderedSides(student, made, False, [hint.text for hint in hints])
        fitted = rendering.fit_hints(student, hints, teacher, budget, self.tokenizer)
        added = len(fitted.teacher.ids) - len(student.ids)
        if added > budget and self._leaves_out:
            return fitted.without_hints()
        rendering.check_length(prompt, "hint", added, budget)
        return fitted
