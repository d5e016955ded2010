"""Token ids of prompts and replies, by one tokenizer and its chat template."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.data import texts
from hf_distill.data.chat import ChatIds, begins_reply
from hf_distill.data.hints import Messages, Prompt
from hf_distill.data.processor_inputs import split_processor
from hf_distill.data.turn_ends import TurnEnds, checked_ids, find_turn_ends, warnings_of


def _check_tokenizer(tokenizer: Any) -> None:
    if hasattr(tokenizer, "eos_token_id") and callable(tokenizer):
        return
    if isinstance(tokenizer, str):
        raise TypeError(
            f"tokenizer must be a tokenizer, got its name {tokenizer!r}: load it with "
            f"AutoTokenizer.from_pretrained({tokenizer!r})"
        )
    inner = "; give its attribute `tokenizer`" if hasattr(tokenizer, "tokenizer") else ""
    raise TypeError(f"tokenizer must be a tokenizer, got {type(tokenizer).__name__}{inner}")


class PromptIds:
    """Makes token ids of prompts that are to be completed, and of what completes them.

    Args:
        tokenizer: with a chat template if prompts are messages; or a processor of images and text.
        chat_template_kwargs: arguments of the template.

    Raises:
        TypeError: the tokenizer is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:
        known, self.processor = split_processor(tokenizer)
        _check_tokenizer(known)
        self.tokenizer: PreTrainedTokenizerBase = known
        self.chat_template_kwargs = dict(chat_template_kwargs)
        self._told: tuple[int, ...] = ()
        self._ends: TurnEnds | None = None

    @property
    def pad_token_id(self) -> int:
        """Return the tokenizer's padding id, or its end id without one; masks tell them apart."""
        for token_id in (self.tokenizer.pad_token_id, self.eos_token_id):
            if token_id is not None:
                return cast(int, token_id)
        raise ValueError("the tokenizer must have a pad or eos token, got neither")

    @property
    def eos_token_id(self) -> int | None:
        """Return the tokenizer's end id, or None."""
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def ends(self) -> TurnEnds:
        """Return the tokens that end replies, by tokenizer, template and `with_end_tokens`."""
        if self._ends is None:
            self._ends = find_turn_ends(self.tokenizer, self.chat_template_kwargs, self._told)
        return self._ends

    def with_end_tokens(self, ids: int | Sequence[int]) -> Self:
        """Return the collator for a model that ends its replies with these tokens too.

        Trainers call it with the ids of the model's generation config, one or several, which come
        to those of an earlier call.

        Raises:
            ValueError: these are no token ids.
        """
        told = copy.copy(self)
        told._told, told._ends = (*self._told, *checked_ids(ids)), None
        return told

    def end_warnings(self) -> list[str]:
        """Return what to tell of replies without an end; empty if they have one."""
        return warnings_of(self.ends, self.tokenizer)

    def _end_of(self, prompt: Prompt, context: Sequence[int]) -> int | None:
        """Return what ends a text completion: in a chat, also a rendered one, the turn's end."""
        of_chat = not isinstance(prompt, str) or self.ends.turn in context
        end = self.ends.turn if of_chat else None
        return self.ends.of_text if end is None else end

    def context_ids(self, prompt: Prompt) -> list[int]:
        """Return token ids of a prompt, ready to be completed; a reply that it begins goes on."""
        if isinstance(prompt, str):
            return texts.context_of_text(prompt, self.tokenizer)
        return self._chat.context(prompt, begins_reply(prompt))

    @property
    def _chat(self) -> ChatIds:
        continued = partial(
            self._template, add_generation_prompt=False, continue_final_message=True
        )
        return ChatIds(self._template, continued, self.ends)

    def _template(
        self, messages: Messages, add_generation_prompt: bool, **options: Any
    ) -> list[int]:
        if self.processor is not None:
            options |= {"add_generation_prompt": add_generation_prompt, **self.chat_template_kwargs}
            return self.processor.ids(messages, **options)
        encoded: Any = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            **options,
            **self.chat_template_kwargs,
        )
        return encoded["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """Return a completion to be read, without special tokens and its end token."""
        shown = list(ids[:-1] if ids and ids[-1] in self.ends.ids else ids)
        return str(self.tokenizer.decode(shown, skip_special_tokens=True))

    def _text_ids(self, text: str, prompt: Prompt, context: Sequence[int]) -> list[int]:
        end = self._end_of(prompt, context)
        return texts.completion_of_text(text, self.tokenizer, self.ends, end)
