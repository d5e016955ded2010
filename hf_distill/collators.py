"""HintCollator: one model's two views of a problem, with and without a hint."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill import alignment
from hf_distill.hints import Hint, Messages, Prompt, Row

SHOWN_CHARACTERS = 60


class HintCollator:
    """Batches whose student sees the prompt and whose teacher sees the prompt and a hint.

    A row has a prompt (text, or chat messages), what the hint needs, and for off-policy training a
    completion (text, or assistant messages). The student's ids are those of the prompt alone,
    whatever the hint. Each context is tokenised once, with the chat template for messages, and the
    completion's ids are appended; nothing is decoded and tokenised again.

    Args:
        tokenizer: with a chat template if prompts are messages.
        hint: a `Hint`, or its text: a column, a template or a function of the row.
        prompt_column: column of the prompt.
        completion_column: column of the completion. A text completion gets the end token appended
            if it lacks it; it is scored like every other token.
        max_prompt_length: tokens of the student's context, or None for no limit.
        max_hint_length: tokens that the hint adds to the teacher's context, or None.
        max_completion_length: tokens of a completion from the data, or None.
        chat_template_kwargs: passed to the chat template on both sides (enable_thinking, tools).

    Raises:
        ValueError: when a batch is made: a column is missing, a completion is empty, or a length
            exceeds its budget. The message names the row, the rule and the value. Nothing is cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        hint: Hint | str | Callable[[Row], str] = "hint",
        *,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        max_prompt_length: int | None = None,
        max_hint_length: int | None = None,
        max_completion_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.hint = hint if isinstance(hint, Hint) else Hint(hint)
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.max_prompt_length = max_prompt_length
        self.max_hint_length = max_hint_length
        self.max_completion_length = max_completion_length
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A training batch from rows with completions: see `alignment.build_batch`."""
        contexts = [self._contexts(i, row) for i, row in enumerate(rows)]
        completions = [self._completion(i, row) for i, row in enumerate(rows)]
        prompts, teacher_prompts = zip(*contexts, strict=True)
        return alignment.build_batch(prompts, teacher_prompts, completions, self.pad_token_id)

    def contexts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Both contexts of each row, padded on the left, for completions yet to be generated.

        Returns:
            prompt_ids, prompt_mask [B, T]; teacher_prompt_ids, teacher_prompt_mask [B, T of the
            teacher]; int64.
        """
        sides = zip(*(self._contexts(i, row) for i, row in enumerate(rows)), strict=True)
        batch = {}
        for name, ids in zip(("prompt", "teacher_prompt"), sides, strict=True):
            batch[f"{name}_ids"] = alignment.pad(ids, self.pad_token_id, side="left")
            ones = [[1] * len(row) for row in ids]
            batch[f"{name}_mask"] = alignment.pad(ones, 0, side="left")
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

    def _column(self, i: int, row: Row, column: str) -> Any:
        if row.get(column) is None:
            raise ValueError(f"row {i} of the batch has no {column!r}; it has {sorted(row)}")
        return row[column]

    def _contexts(self, i: int, row: Row) -> tuple[list[int], list[int]]:
        prompt = self._column(i, row, self.prompt_column)
        try:
            teacher_prompt = self.hint.insert(prompt, self.hint.render(row))
        except ValueError as error:
            raise ValueError(f"row {i} of the batch: {error}") from error
        ids, teacher_ids = self.context_ids(prompt), self.context_ids(teacher_prompt)
        self._check(i, prompt, "prompt", len(ids), self.max_prompt_length)
        self._check(i, prompt, "hint", len(teacher_ids) - len(ids), self.max_hint_length)
        return ids, teacher_ids

    def _completion(self, i: int, row: Row) -> list[int]:
        completion = self._column(i, row, self.completion_column)
        prompt = row[self.prompt_column]
        if not completion or (isinstance(completion, str) and not completion.strip()):
            raise ValueError(
                f"row {i} of the batch: the completion must not be empty, got {completion!r}"
            )
        ids = self._completion_ids(i, prompt, completion)
        self._check(i, prompt, "completion", len(ids), self.max_completion_length)
        return ids

    def _completion_ids(self, i: int, prompt: Prompt, completion: Prompt) -> list[int]:
        eos = self.eos_token_id
        if isinstance(completion, str):
            encoded = self.tokenizer(completion, add_special_tokens=False)
            ids = cast(list[int], encoded["input_ids"])
            return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        if isinstance(prompt, str):
            raise ValueError(f"row {i} of the batch: a text prompt needs a text completion")
        context = self._template(prompt, add_generation_prompt=True)
        whole = self._template([*prompt, *completion], add_generation_prompt=False)
        if whole[: len(context)] != context:
            raise ValueError(
                f"row {i} of the batch: the chat template must render prompt + completion as the "
                "prompt's ids and more; pass the completion as text instead"
            )
        ids = whole[len(context) :]
        # templates may write a line break behind the end token, which no rollout contains
        return ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else ids

    @staticmethod
    def _check(i: int, prompt: Prompt, what: str, length: int, budget: int | None) -> None:
        if budget is not None and length > budget:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            raise ValueError(
                f"row {i} of the batch ({str(text)[:SHOWN_CHARACTERS]!r}...): the {what} has "
                f"{length} tokens, max_{what}_length is {budget}"
            )
