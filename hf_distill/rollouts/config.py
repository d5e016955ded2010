"""The settings of rollouts."""

import math
from dataclasses import dataclass, field
from typing import Any

from hf_distill.rollouts.engines import check_engine
from hf_distill.schedules import Schedule, Value

DIGITS = 6  # of a scheduled length: 63.9999999 tokens are 64


@dataclass
class RolloutConfig:
    """Says how completions are sampled, and how long they are used.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = field(
        default=0.7,
        metadata={
            "help": "The temperature of sampling, at least 0, where 0 is greedy. It is not the "
            "temperature of the loss."
        },
    )
    num_completions: int = field(
        default=1,
        metadata={
            "help": "The number of completions that are sampled for each prompt, at least 1. It "
            "must divide the number of rows of a batch."
        },
    )
    max_turns: int = field(
        default=8,
        metadata={
            "help": "The maximum number of replies in a dialogue with an environment, at least 1."
        },
    )
    steps_per_rollout: int = field(
        default=1,
        metadata={
            "help": "The number of optimizer steps that are taken on each batch of completions, at "
            "least 1."
        },
    )
    on_policy_fraction: float = field(
        default=1.0,
        metadata={
            "help": "The share of rollouts that are sampled, in [0, 1]. The others take the data's "
            "completions. This is lambda in GKD."
        },
    )
    generation_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Sets more fields of GenerationConfig or, with the engine vllm, of "
            "SamplingParams."
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "The number of prompts in one call of `generate`, at least 1. With None, one "
            "call samples the whole rollout."
        },
    )
    engine: str = field(
        default="generate",
        metadata={
            "help": "Chooses what samples the completions: generate, continuous (Transformers' "
            "continuous batching) or vllm (through TRL)."
        },
    )
    engine_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Sets options of the engine: fields of ContinuousBatchingConfig, or arguments "
            "of TRL's VLLMGeneration such as mode."
        },
    )

    importance_clip: float | None = field(
        default=None,
        metadata={
            "help": "Limits the weight of a reused token. Its soft loss counts as many times as "
            "the student has become more likely to write it, but at most this many times. It must "
            "be greater than 0, and None turns it off."
        },
    )

    prefix_tokens: Value = field(
        default=None,
        metadata={
            "help": "The maximum number of tokens that are sampled of each completion in training, "
            "from 1 to max_completion_length. It may follow a schedule, rounded down, so that the "
            "prefix grows. None samples completions until they end. It cannot be combined with an "
            "environment, which would judge the cut ones."
        },
    )

    only_failed: bool = field(
        default=False,
        metadata={
            "help": "Whether only the sampled completions that have failed are trained on: those "
            "whose score, by the environment, is not above 0. It requires an environment."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        for name in ("num_completions", "max_turns", "steps_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.on_policy_fraction <= 1.0:
            raise ValueError(f"on_policy_fraction must be in [0, 1], got {self.on_policy_fraction}")
        if self.importance_clip is not None and not self.importance_clip > 0:
            raise ValueError(f"importance_clip must be positive, got {self.importance_clip}")
        if self.temperature < 0:
            raise ValueError(f"rollout temperature must not be negative, got {self.temperature}")
        self._check_prefix()
        check_engine(self.engine, self.engine_kwargs, self.generation_kwargs, self.batch_size)

    def _check_prefix(self) -> None:
        if self.prefix_tokens is None:
            return
        try:
            low, _ = Schedule.parse(self.prefix_tokens).bounds
        except ValueError as error:
            raise ValueError(f"rollout.prefix_tokens: {error}") from error
        if low < 1:
            raise ValueError(f"rollout.prefix_tokens must be at least 1, got {low:g}")

    @property
    def prefix_bounds(self) -> tuple[int, int] | None:
        """Return the shortest and the longest prefix, in tokens; None if whole ones are sampled."""
        if self.prefix_tokens is None:
            return None
        low, high = Schedule.parse(self.prefix_tokens).bounds
        return math.floor(low), math.floor(high)

    def prefix_at(self, step: int) -> int | None:
        """Return how many tokens are sampled after `step` optimizer steps; None is no prefix."""
        if self.prefix_tokens is None:
            return None
        return math.floor(round(Schedule.parse(self.prefix_tokens).at(step), DIGITS))
