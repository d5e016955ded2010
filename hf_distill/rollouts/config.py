"""The settings of rollouts."""

from dataclasses import dataclass, field
from typing import Any

from hf_distill.rollouts.engines import check_engine


@dataclass
class RolloutConfig:
    """How completions are sampled, and how long they are used.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = field(
        default=0.7, metadata={"help": "Of sampling, >= 0; 0 is greedy. Not the loss's."}
    )
    num_completions: int = field(
        default=1,
        metadata={"help": "Completions of each prompt, >= 1; must divide the rows of a batch."},
    )
    max_turns: int = field(
        default=8, metadata={"help": "Replies of a dialogue with an environment, >= 1."}
    )
    steps_per_rollout: int = field(
        default=1, metadata={"help": "Optimizer steps taken on each batch of completions, >= 1."}
    )
    on_policy_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of rollouts in [0, 1] that are sampled; the others take the data's "
            "completions (lambda of GKD)."
        },
    )
    generation_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "More fields of GenerationConfig; with vllm, of SamplingParams."},
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Prompts of one call of `generate`, >= 1; None is all of a rollout."},
    )
    engine: str = field(
        default="generate",
        metadata={
            "help": "generate, continuous (Transformers' continuous batching) or vllm (TRL's)."
        },
    )
    engine_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Options of the engine: fields of ContinuousBatchingConfig, or arguments of "
            "TRL's VLLMGeneration (mode, ...)."
        },
    )

    importance_clip: float | None = field(
        default=None,
        metadata={
            "help": "Largest weight of a reused token: its soft loss counts as often as the "
            "student has become more likely to write it, at most so often, > 0; None is off."
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
        check_engine(self.engine, self.engine_kwargs, self.generation_kwargs, self.batch_size)
