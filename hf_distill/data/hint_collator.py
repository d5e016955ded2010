"""HintCollator: one model's two views of a problem, with and without a hint."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.data import batches, rendering
from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import SCORED, join_replies
from hf_distill.data.contrast import (
    Contrast,
    Hints,
    as_contrasts,
    as_hints,
    contrast_columns,
    with_other_rows,
)
from hf_distill.data.episodes import Episode
from hf_distill.data.hint_masking import HintMasking
from hf_distill.data.hint_schedule import HintSchedule, Value
from hf_distill.data.hinted_rows import DEFAULT_HINT, PROMPT, HintedRows
from hf_distill.data.hints import Messages, Prompt, Row
from hf_distill.data.processor_inputs import check_placeholders, join_images
from hf_distill.data.rendering import DROPPED, MASKED, TRUNCATED, RenderedSides
from hf_distill.data.sides import TEACHER_PREFIX
from hf_distill.data.teacher_view import TeacherView

SHOWN_TOKENS = 8
TRUNCATIONS = ("error", "hint")

Given = TypeVar("Given")


class HintCollator(HintedRows):
    """Makes batches whose student sees the prompt and whose teacher sees the prompt and a hint.

    A row has a prompt (text, or chat messages), what the hints need, and for off-policy training a
    completion (text, or messages: replies with what came between them). The student's ids are
    those of the prompt and completion alone, whatever the hints. Each side is tokenised once, with
    the chat template for messages; nothing is decoded and tokenised again.

    Args:
        tokenizer: the student's tokenizer. It needs a chat template if prompts are messages. For an
            image-text model it is its processor, and messages may have images, which both sides
            read.
        hint: a `Hint`, or its text (a column, a template or a function of the row), or several; []
            means no hints. None means the column hint; rows without it have no hint, which is an
            error if the teacher is the student itself.
        prompt_column: the column that holds the prompt.
        completion_column: the column that holds the completion. If a text completion lacks the end
            token, the end token is appended (that of a turn behind a chat). It is scored like every
            other token.
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
        student_template_kwargs: arguments for the student alone, beside those of both sides.
        teacher_template_kwargs: arguments for the teacher alone, such as {"enable_thinking": True}.
            The replies keep the student's ids.
        teacher_system_prompt: the teacher's system message, in place of the prompt's.
        teacher_sees: "prompt" shows the teacher the prompt and the hints, "reference" the hints
            alone, behind the system message if there is one.
        packing: whether a batch is one sequence of all student rows, and one of all teacher rows,
            without padding. Each row is read as it is alone, see `packed_rows`.
        contrast: a wrong hint, of a second context that the teacher reads as well: a `Contrast`,
            or what `hint` may be. Several `Contrast` objects are as many contexts. See
            `ContrastConfig` for what is made of them. None means no second context.
        hint_masking: hides parts of the hints, right and wrong ones, by what the completion has of
            them. None hides nothing.

    Raises:
        ValueError: an argument is unknown or out of range. When a batch is made: a column is
            missing, a completion is empty or has no scored reply, or a length exceeds its budget.
            The message names the row, the rule and the value.
    """

    reads_all_columns = True  # a hint may be a function of the row

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        hint: Hints | None = None,
        *,
        prompt_column: str = PROMPT,
        completion_column: str = "completion",
        scored: str = "all",
        max_prompt_length: int | None = None,
        max_hint_length: Value | None = None,
        max_completion_length: int | None = None,
        truncation: str = "error",
        hint_dropout: Value = 0.0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        student_template_kwargs: Mapping[str, Any] | None = None,
        teacher_template_kwargs: Mapping[str, Any] | None = None,
        teacher_system_prompt: str | None = None,
        teacher_sees: str = "prompt",
        packing: bool = False,
        contrast: Contrast | Hints | Sequence[Contrast] | None = None,
        hint_masking: HintMasking | None = None,
    ) -> None:
        for name, value, choices in (
            ("scored", scored, SCORED),
            ("truncation", truncation, TRUNCATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        both = dict(chat_template_kwargs or {})
        super().__init__(tokenizer, {**both, **(student_template_kwargs or {})})
        own = {**both, **(teacher_template_kwargs or {})}
        self.view = TeacherView(own, teacher_system_prompt, teacher_sees)
        self.needs_hints, hint = hint is not None, DEFAULT_HINT if hint is None else hint
        self.hints = as_hints(hint)
        self.contrasts = as_contrasts(contrast)
        if self.contrasts and not self.hints:
            raise ValueError(f"a contrast needs hints that it is the contrast of, got {contrast!r}")
        if self.contrasts and packing:
            raise ValueError("packed batches have one context of the teacher: no contrast, got one")
        if hint_masking is not None and not self.hints:
            raise ValueError(f"hint_masking needs hints to mask, got none and {hint_masking!r}")
        self._check_processor(packing, teacher_sees)
        self.hint_masking = hint_masking
        self._was_given_hints = bool(self.hints)
        self.scored, self.truncation, self.packing = scored, truncation, packing
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.max_prompt_length = max_prompt_length
        plan = HintSchedule.of(hint_dropout, max_hint_length, truncation)
        if plan.depends_on_step and not self.hints:
            raise ValueError(f"{plan.refusal()}, and there are no hints")
        if teacher_sees == "reference" and max_hint_length is not None:
            raise ValueError(
                "max_hint_length counts what hints add to the prompt, which a teacher that sees "
                f"the reference only has not, got {max_hint_length}"
            )
        self.hint_plan = plan if plan.depends_on_step else None
        self.max_hint_length, self._draw, self._leaves_out = plan.length_at(0), None, False
        self.max_completion_length = max_completion_length
        self._told_columns: set[str] = set()  # of which copies know too

    def _check_processor(self, packing: bool, teacher_sees: str) -> None:
        if self.processor is None:
            return
        for name, value, plain in (
            ("packing", packing, False),
            ("teacher_sees", teacher_sees, "prompt"),
            ("contrast", [x.source for x in self.contrasts], []),
        ):
            if value != plain:
                raise ValueError(
                    "with a processor both sides read the same images, each row in its own "
                    f"sequence: {name} must be {plain!r}, got {value!r}"
                )

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a training batch from rows with completions: see `batches.build_batch`."""
        return self._batch(self._all(self._row, rows), (self.messages(row) for row in rows))

    def at(self, step: int, seed: int | None = None) -> "HintCollator":
        """Return the collator of an optimizer step. Trainers call it; fixed settings need no step.

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
        """Make both sides of some rows, without the hints that the step drops."""
        if self.hint_plan is not None:
            raise ValueError(
                f"{self.hint_plan.refusal()}: give this collator, or one around it, to a trainer, "
                "or make batches with collator.at(step)"
            )
        made = [rendering.in_row(i, make, each) for i, each in enumerate(given)]
        if self._draw is not None:
            dropped = self._draw([each.student.ids for each in made])
            made = [x.without_hints() if drop else x for x, drop in zip(made, dropped, strict=True)]
        for contrast in self.contrasts:
            if contrast.source == "other_row":
                made = with_other_rows(made, contrast.number)
        return made

    def messages(self, row: Row, completed: bool = True) -> Messages:
        """Return the messages of a row, with its completion if `completed`; none of a text."""
        names = (self.prompt_column, *([self.completion_column] if completed else []))
        parts = [row.get(name) for name in names]
        return [x for part in parts if isinstance(part, list | tuple) for x in part]

    def images(self, messages: Messages) -> dict[str, Tensor]:
        """Return the inputs that the images of a row's messages make; none without a processor."""
        if self.processor is None:
            return {}
        return self.processor.images(messages, **self.chat_template_kwargs)

    def image_inputs(
        self, ids: Tensor, images: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what an image-text model reads of rows besides ids [B, T] and mask.

        Args:
            ids: of the rows.
            images: of each row, see `images`.
        """
        if self.processor is None:
            return {}
        return join_images(images) | self.processor.token_types(ids)

    def sampling_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return what `GenerateEngine.sample` is given besides the ids of prompts.

        It makes the inputs of some of the prompts from their numbers and ids.
        """
        if self.processor is None:
            return {}

        def inputs(numbers: Sequence[int], ids: Tensor) -> dict[str, Tensor]:
            given = [prompts[i] for i in numbers]
            images = [self.images([] if isinstance(x, str) else x) for x in given]
            return self.image_inputs(ids, images)

        return {"more_inputs": inputs}

    def _with_images(
        self, batch: dict[str, Tensor], dialogues: Iterable[Messages]
    ) -> dict[str, Tensor]:
        if self.processor is None:
            return batch
        ids, teacher_ids = batch["input_ids"], batch.get("teacher_input_ids")
        batch |= self.image_inputs(ids, [self.images(x) for x in dialogues])
        if teacher_ids is not None:
            batch |= self.processor.token_types(teacher_ids, TEACHER_PREFIX)
            check_placeholders(self.processor, ids, teacher_ids)
        return batch

    def _batch(
        self, made: Sequence[RenderedSides], dialogues: Iterable[Messages]
    ) -> dict[str, Tensor]:
        students, teachers = [x.student for x in made], [x.teacher for x in made]
        hinted = self.needs_hints or any(x.hints or x.dropped for x in made)
        if not self.has_own_view and not (self.hints and hinted) and not self.contrasts:
            teachers = None  # both sides read the same
        if self.packing:
            return self._with_count(batches.pack_rows(students, teachers), made)
        batch = batches.build_rows(students, teachers, self.pad_token_id)
        if self.contrasts and teachers is not None:
            number = sum(x.number for x in self.contrasts)
            batch |= contrast_columns(batch, made, number, self.pad_token_id)
        return self._with_count(self._with_images(batch, dialogues), made)

    def prompts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the rows as they are, and student contexts, for completions yet to be generated.

        Returns:
            rows: the list; prompt_ids, prompt_mask: [B, T] int64, padded on the left.
        """
        make = partial(self._prompt, sampled=True)
        prompts = [rendering.in_row(i, make, row) for i, row in enumerate(rows)]
        ids, mask = batches.pad_left(prompts, self.pad_token_id)
        return {"prompt_ids": ids, "prompt_mask": mask, "rows": list(rows)}

    def from_episodes(
        self, episodes: Sequence[Episode]
    ) -> tuple[dict[str, Tensor], list[Sequence[str]]]:
        """Make a training batch of dialogues that the student has written, and the hints of each.

        Hints may read the columns of `Episode.seen`. The replies' ids are those that were sampled.
        An episode may have nothing to score.
        """
        made = self._all(self._episode, episodes)
        return self._batch(made, (x.messages for x in episodes)), [x.hints for x in made]

    def next_context(self, episode: Episode) -> list[int]:
        """Return the student's ids up to its next reply, behind what an environment has said."""
        made, chat = episode.dialogue, self._chat
        between = chat.between(made, made.messages, episode.replies(), last=True)
        replies, nothing = [*episode.completions, []], [False] * len(between)
        return list(join_replies(between, replies, nothing, chat.ends).ids)

    def contexts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return both contexts of each row, padded on the left, for completions to be generated.

        Returns:
            prompt_ids, prompt_mask [B, T]; teacher_prompt_ids, teacher_prompt_mask [B, T of the
            teacher]; int64.
        """
        if self.processor is not None:
            raise ValueError("contexts are token ids alone: with a processor use `prompts`")
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
        """Return student's and teacher's rows as if there were no hints, to compare the two sides.

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
        bare.hints, bare.scored, bare.hint_plan, bare.packing = (), "all", None, False
        bare.view, bare.contrasts = TeacherView(bare.chat_template_kwargs), ()
        return bare

    def references(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return student rows of the data's own completions: input_ids, attention_mask, labels."""
        batch = self._without_hints()(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def _with_tail(self, row: Row) -> RenderedSides:
        ids, prompt = self._prompt(row, sampled=True), self._column(row, "prompt_column")
        end = self._end_of(prompt, ids)
        images = () if self.processor is None else self.processor.placeholder_ids
        words = [token for token in ids if token not in images]
        tail = [*words[-SHOWN_TOKENS:], *([] if end is None else [end])]
        return self._episode(Episode(row, prompt, completions=[tail], texts=[self.text(tail)]))

    def _with_count(
        self, batch: dict[str, Tensor], made: Sequence[RenderedSides]
    ) -> dict[str, Tensor]:
        if self.truncation == "hint":
            batch[TRUNCATED] = torch.tensor([x.truncated for x in made])
        if self.hint_masking is not None:
            batch[MASKED] = torch.tensor([x.masked for x in made])
        if self._leaves_out or self._draw is not None:
            batch[DROPPED] = torch.tensor([x.dropped for x in made])
        return batch


def find_hint_collator(collator: Any) -> HintCollator | None:
    """Find the `HintCollator` that a collator is, or has inside."""
    while collator is not None and not isinstance(collator, HintCollator):
        collator = getattr(collator, "collator", None)
    return collator


def hint_collator_behind(collator: Any) -> HintCollator | None:
    """Find the `HintCollator` that a collator is, has inside, or is a method of."""
    found, owner = find_hint_collator(collator), getattr(collator, "__self__", None)
    return owner if found is None and isinstance(owner, HintCollator) else found
