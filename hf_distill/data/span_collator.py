"""SpanCollator: hints for a teacher with another tokenizer, and spans of equal bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.data import alignment, batches, rendering, sides
from hf_distill.data.batches import TokenRow
from hf_distill.data.chat import begins_reply, join_dialogue
from hf_distill.data.contrast import Hints
from hf_distill.data.cross_tokenizer_collator import consecutive_runs
from hf_distill.data.episodes import Episode
from hf_distill.data.hint_collator import HintCollator, hint_collator_behind
from hf_distill.data.hints import Messages, Row
from hf_distill.data.processor_inputs import check_tokenizers
from hf_distill.data.rendering import RenderedSides
from hf_distill.data.sides import NO_TOKEN
from hf_distill.data.spans import SpanAligner, TeacherReply
from hf_distill.data.token_bytes import TokenBytes

REFUSED = ("packing", "contrast", "student_template_kwargs")


@dataclass
class _Given(Episode):
    """Holds a row of the data as if its completion had been sampled; hints read the row alone."""

    def seen(self) -> dict[str, Any]:
        return dict(self.row)


class SpanCollator(HintCollator):
    """Makes batches for `divergence="spans"`: each side's own tokens of one text, hints included.

    The student's rows are those of a `HintCollator`. The teacher reads the prompt and the hints by
    its own tokenizer and chat template, and behind them the text of the student's replies,
    tokenised anew, with its own end tokens. What is scored are spans: the smallest runs of tokens
    of both sides that write the same bytes, see `hf_distill.data.spans`.

    Args:
        tokenizer: the student's tokenizer, a fast one.
        teacher_tokenizer: the teacher's tokenizer, a fast one.
        hint: as in `HintCollator`; [] means no hints.
        chat_template_kwargs: arguments of the student's chat template.
        teacher_template_kwargs: arguments of the teacher's chat template.
        **options: the other arguments of `HintCollator`. Lengths of hints are in the teacher's
            tokens, the other lengths in the student's. `packing`, `contrast`,
            `student_template_kwargs` and `scored` other than "all" are errors.

    Raises:
        ValueError: as `HintCollator`, or an option is refused, or a tokenizer is one of which it is
            not known what bytes its tokens write, see `TokenBytes`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        hint: Hints | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_tokenizers(tokenizer, teacher_tokenizer)
        for name in REFUSED:
            if options.get(name):
                raise ValueError(f"a SpanCollator has no {name}, got {options[name]!r}")
        if options.get("scored", "all") != "all":
            raise ValueError(f"a SpanCollator scores all replies, got scored={options['scored']!r}")
        super().__init__(tokenizer, hint, chat_template_kwargs=chat_template_kwargs, **options)
        theirs = options | {"hint_dropout": 0.0, "max_prompt_length": None}
        theirs["max_completion_length"] = None
        self._theirs = HintCollator(
            teacher_tokenizer, hint, chat_template_kwargs=teacher_template_kwargs, **theirs
        )
        self._theirs._told_columns = self._told_columns
        is_one = tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
        self.aligner = SpanAligner(TokenBytes(tokenizer), TokenBytes(teacher_tokenizer), is_one)
        self._is_bare = False

    @property
    def has_own_view(self) -> bool:
        """Return whether the teacher reads something else even without hints: its own tokens."""
        return not self._is_bare

    @property
    def student_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the student's tokenizer."""
        return self.tokenizer

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the teacher's tokenizer."""
        return self._theirs.tokenizer

    @cached_property
    def common_ids(self) -> dict[int, int]:
        """Return which ids of the student stand for the same as one of the teacher's."""
        return self.aligner.common(self.ends, self._theirs.ends)

    def with_end_tokens(self, ids: int | Sequence[int]) -> "SpanCollator":
        """Return the collator for a student that ends its replies with these tokens too."""
        told = super().with_end_tokens(ids)
        told.__dict__.pop("common_ids", None)
        return told

    def end_warnings(self) -> list[str]:
        """Return what to tell of replies without an end, on each side; empty if they have one."""
        theirs = [f"for the teacher: {x}" for x in self._theirs.end_warnings()]
        return [*super().end_warnings(), *theirs]

    def at(self, step: int, seed: int | None = None) -> "SpanCollator":
        """Return the collator of an optimizer step, see `HintCollator.at`."""
        fixed = cast("SpanCollator", super().at(step, seed))
        if fixed is not self:
            fixed._theirs = self._theirs.at(step)
            fixed._theirs._leaves_out = fixed._leaves_out
        return fixed

    def _without_hints(self) -> "SpanCollator":
        bare = cast("SpanCollator", super()._without_hints())
        bare._theirs, bare._is_bare = self._theirs._without_hints(), True
        return bare

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a training batch from rows with completions: see `from_episodes`."""
        students = self._students(lambda bare: bare._row, rows)
        pairs = zip(rows, students, strict=True)
        made = [rendering.in_row(i, self._given, x) for i, x in enumerate(pairs)]
        return self._joined(students, made)[0]

    def from_episodes(
        self, episodes: Sequence[Episode]
    ) -> tuple[dict[str, Tensor], list[Sequence[str]]]:
        """Make a training batch of dialogues that the student has written, and the hints of each.

        Returns:
            input_ids, attention_mask, labels [B, T] and completion_index [B, C] of the student, all
            of whose replies' tokens have labels; teacher_input_ids, teacher_attention_mask [B, T'];
            teacher_completion_index [B, C']: positions of the teacher's tokens that are in a span;
            teacher_spans [B, C'], teacher_spans_of_student [B, C]: the number of each one's span in
            its row, from 0 in the order of the text, -1 of a student's token in none and of
            padding; teacher_own_tokens [B] bool, true. int64 but for the last.
        """
        students = self._students(lambda bare: bare._episode, episodes)
        return self._joined(students, episodes)

    def _students(self, make: Any, given: Sequence[Any]) -> list[TokenRow]:
        self._all(self._row, [])  # says where hints depend on a step that is not known
        of_one = make(self._without_hints())
        return [rendering.in_row(i, of_one, x).student for i, x in enumerate(given)]

    def _given(self, pair: tuple[Row, TokenRow]) -> Episode:
        """Return a row of the data as an episode, with the student's ids of its replies."""
        row, student = pair
        prompt, completion = row[self.prompt_column], row[self.completion_column]
        replies = [[student.ids[i] for i in run] for run in consecutive_runs(list(student.scored))]
        said: list[Messages] = []
        if not isinstance(completion, str):
            dialogue = join_dialogue(prompt, completion)
            messages = dialogue.messages[dialogue.num_prompt :]
            at = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            if len(at) != len(replies) or at[0] != 0:
                raise ValueError(
                    "a SpanCollator needs a completion that begins with a reply, and replies that "
                    f"are apart, got roles {[m['role'] for m in messages]} and {len(replies)} runs "
                    "of scored tokens"
                )
            said = [messages[a + 1 : b] for a, b in pairwise(at)]
        made = _Given(row, prompt, completions=replies, said=said)
        made.texts = [self.text(x) for x in replies]
        return made

    def _joined(
        self, students: Sequence[TokenRow], episodes: Sequence[Episode]
    ) -> tuple[dict[str, Tensor], list[Sequence[str]]]:
        ids = [x.ids for x in students]
        dropped = [False] * len(ids) if self._draw is None else self._draw(ids)
        pairs = list(zip(episodes, dropped, strict=True))
        made = [rendering.in_row(i, self._teacher_row, x) for i, x in enumerate(pairs)]
        rendered, replies = [x for x, _ in made], [x for _, x in made]
        batch = batches.build_rows(students, None, self.pad_token_id)
        lengths = [[len(x) for x in episode.completions] for episode in episodes]
        batch |= _teacher_columns(lengths, rendered, replies, self._theirs.pad_token_id)
        alignment.assert_aligned(batch)
        return self._with_count(batch, rendered), [x.hints for x in rendered]

    def _teacher_row(self, given: tuple[Episode, bool]) -> tuple[RenderedSides, list[TeacherReply]]:
        """Return the teacher's side of an episode, and its replies."""
        episode, is_dropped = given
        theirs = self._theirs._without_hints() if is_dropped else self._theirs
        context = self._theirs.context_ids(episode.prompt)
        end = theirs._end_of(episode.prompt, context)
        goes_on = isinstance(episode.prompt, str) or begins_reply(episode.prompt)
        told = self.ends.ids, end, self.common_ids
        replies = [
            self.aligner.reply(x, *told, at_start=i > 0 or not goes_on)
            for i, x in enumerate(episode.completions)
        ]
        made = theirs._episode(replace(episode, completions=[x.ids for x in replies]))
        return made._replace(dropped=is_dropped and bool(self.hints)), replies


def _teacher_columns(
    lengths: Sequence[Sequence[int]],
    rendered: Sequence[RenderedSides],
    replies: Sequence[Sequence[TeacherReply]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Return the teacher's part of a batch.

    Args:
        lengths: of each row, the student's tokens of each reply.
        rendered: both sides of each row.
        replies: of each row, as the teacher reads them.
        pad_token_id: the teacher's.
    """
    rows = [x.teacher for x in rendered]
    numbered = [_numbered(*x) for x in zip(lengths, rows, replies, strict=True)]
    mine, at, theirs = ([x[i] for x in numbered] for i in range(3))
    ones = [[1] * len(row.ids) for row in rows]
    return {
        "teacher_input_ids": batches.pad([row.ids for row in rows], pad_token_id),
        "teacher_attention_mask": batches.pad(ones, 0),
        "teacher_completion_index": batches.pad(at, NO_TOKEN),
        sides.SPANS: batches.pad(theirs, NO_TOKEN),
        sides.SPANS_OF_STUDENT: batches.pad(mine, NO_TOKEN),
        sides.TEACHER_OWN_TOKENS: torch.ones(len(rows), dtype=torch.bool),
    }


def _numbered(
    lengths: Sequence[int], teacher: TokenRow, replies: Sequence[TeacherReply]
) -> tuple[list[int], list[int], list[int]]:
    """Return spans of the student's scored tokens, places of the teacher's, and their spans."""
    mine, at, theirs = [NO_TOKEN] * sum(lengths), list[int](), list[int]()
    number, start, other = 0, 0, 0
    for length, reply in zip(lengths, replies, strict=True):
        for span in reply.spans:
            for i in span.student:
                mine[start + i] = number
            at += [teacher.scored[other + i] for i in span.teacher]
            theirs += [number] * len(span.teacher)
            number += 1
        start, other = start + length, other + len(reply.ids)
    return mine, at, theirs


def find_span_collator(collator: Any) -> SpanCollator | None:
    """Find the `SpanCollator` that a collator is, has inside, or is a method of."""
    found = hint_collator_behind(collator)
    return found if isinstance(found, SpanCollator) else None
