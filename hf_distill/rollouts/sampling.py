"""What every engine needs: the settings of sampling, and where completions end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_distill.models.structure import generation_end_ids


@dataclass(frozen=True)
class Sampling:
    """Says how completions are sampled.

    Args:
        pad_token_id: may equal an end token.
        eos_token_id: the end token, or several: the tokenizer's, that of the chat template's turns.
        max_completion_length: tokens.
        temperature: of sampling from the whole vocabulary; 0 is greedy.
        generation_kwargs: further settings in the engine's own words.
    """

    pad_token_id: int
    eos_token_id: int | Sequence[int] | None
    max_completion_length: int
    temperature: float
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def at_most(self, max_new_tokens: int | None) -> "Sampling":
        """Return the settings with completions of no more tokens; None changes nothing."""
        longest = self.max_completion_length
        if max_new_tokens is None or max_new_tokens >= longest:
            return self
        return replace(self, max_completion_length=max_new_tokens)


def end_token_ids(model: nn.Module, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Return every id that ends a completion: the generation config's, and those given."""
    given = eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]
    return sorted({i for i in (*generation_end_ids(model), *given) if i is not None})


def cut_at_end_token(completion: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Return the ids up to and with the first end token; all of them if there is none."""
    for position, token in enumerate(completion):
        if token in end_ids:
            return list(completion[: position + 1])
    return list(completion)
