"""A data collator for a teacher with another tokenizer: one problem in the tokens of both."""

import copy
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.data import alignment, batches, sides
from hf_distill.data.batches import TokenRow
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.hints import Row
from hf_distill.data.processor_inputs import check_tokenizers
from hf_distill.data.sides import IGNORE_INDEX, NO_TOKEN


class CrossTokenizerCollator:
    """Makes batches for `divergence="uld"`: each side's own tokens of one prompt and completion.

    Each side is tokenised by its own tokenizer, with its own chat template for messages and its own
    end token behind a text completion. Completions stand beside each other token by token from the
    first, each reply of a dialogue by itself, up to the shorter of the two; all of the student's
    completion tokens have labels.

    Args:
        student_tokenizer: the tokenizer of the student.
        teacher_tokenizer: the tokenizer of the teacher.
        prompt_column: the column that holds the prompt, which is text or chat messages.
        completion_column: the column that holds the completion, which is text or messages.
        max_prompt_length: the maximum number of tokens of each side's context, in its own tokens.
            None means no limit.
        max_completion_length: the maximum number of tokens of each side's completion, in its own
            tokens. None means no limit.
        chat_template_kwargs: arguments that are passed to the student's chat template.
        teacher_chat_template_kwargs: arguments that are passed to the teacher's chat template.

    Attributes:
        columns: what it reads of a row.

    Raises:
        ValueError: when a batch is made: as `HintCollator`, with the side.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.columns = (prompt_column, completion_column)

        check_tokenizers(student_tokenizer, teacher_tokenizer)

        def side(
            tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None
        ) -> HintCollator:
            return HintCollator(
                tokenizer,
                (),
                prompt_column=prompt_column,
                completion_column=completion_column,
                max_prompt_length=max_prompt_length,
                max_completion_length=max_completion_length,
                chat_template_kwargs=kwargs,
            )

        self._student = side(student_tokenizer, chat_template_kwargs)
        self._teacher = side(teacher_tokenizer, teacher_chat_template_kwargs)
        self._teacher._told_columns = self._student._told_columns

    def with_end_tokens(self, ids: int | Sequence[int]) -> "CrossTokenizerCollator":
        """Return the collator for a student that ends its replies with these tokens too."""
        told = copy.copy(self)
        told._student = self._student.with_end_tokens(ids)
        return told

    def end_warnings(self) -> list[str]:
        """Return what to tell of replies without an end, on each side; empty if they have one."""
        named = (("student", self._student), ("teacher", self._teacher))
        return [f"for the {name}: {x}" for name, side in named for x in side.end_warnings()]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a training batch.

        Returns:
            input_ids, attention_mask, labels [B, T] in the student's ids; teacher_input_ids,
            teacher_attention_mask [B, T of the teacher] in the teacher's; completion_index,
            teacher_completion_index [B, C]: positions of the student's completion tokens, and of
            the teacher's beside them, padded with -1; teacher_own_tokens [B] bool, true. int64
            but for the last.
        """
        students = self._rendered(self._student, "student", rows)
        teachers = self._rendered(self._teacher, "teacher", rows)
        beside = [
            pair_positions(list(one.scored), list(other.scored))
            for one, other in zip(students, teachers, strict=True)
        ]
        ids, mask = _padded(students, self._student.pad_token_id)
        teacher_ids, teacher_mask = _padded(teachers, self._teacher.pad_token_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for i, row in enumerate(students):
            at = torch.tensor(list(row.scored))
            labels[i, at] = ids[i, at]
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "completion_index": batches.pad([row.scored for row in students], NO_TOKEN),
            "teacher_input_ids": teacher_ids,
            "teacher_attention_mask": teacher_mask,
            "teacher_completion_index": batches.pad(beside, NO_TOKEN),
            sides.TEACHER_OWN_TOKENS: torch.ones(len(rows), dtype=torch.bool),
        }
        alignment.assert_aligned(batch)
        return batch

    @staticmethod
    def _rendered(collator: HintCollator, side: str, rows: Sequence[Row]) -> Sequence[TokenRow]:
        try:
            return collator.without_hints(rows, completed=True)[0]
        except ValueError as error:
            raise ValueError(f"for the {side}: {error}") from error


def find_cross_tokenizer_collator(collator: Any) -> CrossTokenizerCollator | None:
    """Find the `CrossTokenizerCollator` that a collator is, or has inside."""
    while collator is not None and not isinstance(collator, CrossTokenizerCollator):
        collator = getattr(collator, "collator", None)
    return collator


def _padded(rows: Sequence[TokenRow], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, padded on the right."""
    ones = [[1] * len(row.ids) for row in rows]
    return batches.pad([row.ids for row in rows], pad_token_id), batches.pad(ones, 0)


def consecutive_runs(positions: list[int]) -> list[list[int]]:
    """Cut ascending positions where they are not consecutive."""
    found: list[list[int]] = []
    for at in positions:
        if found and found[-1][-1] + 1 == at:
            found[-1].append(at)
        else:
            found.append([at])
    return found


def pair_positions(student: list[int], teacher: list[int]) -> list[int]:
    """Return the teacher's position beside each of the student's scored tokens of a row, or -1.

    Each reply of the one stands beside the same reply of the other, token by token from its first;
    if the two have not as many replies, all scored tokens are one reply.

    Args:
        student: positions of the student's scored tokens, ascending; a gap ends a reply.
        teacher: those of the teacher's.
    """
    one, other = consecutive_runs(student), consecutive_runs(teacher)
    if len(one) != len(other):
        one, other = [student], [teacher]
    return [
        -1 if there is None else there
        for mine, theirs in zip(one, other, strict=True)
        for here, there in zip_longest(mine, theirs)
        if here is not None
    ]
