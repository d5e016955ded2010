"""Settings that belong together, as one field of a config: a dataclass, a mapping or JSON text."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hf_distill.faults import Limits
from hf_distill.losses import HIDDEN_LOSSES
from hf_distill.rollouts import check_engine
from hf_distill.teachers import SelfTeacher
from hf_distill.token_classes import CLASSES
from hf_distill.watchdog import Watchdog
from metal_ops import DivergenceSpec

Group = TypeVar("Group")


def as_group(name: str, kind: type[Group], value: Any) -> Group:
    """The group from what a script, a YAML file or a command line gives.

    Args:
        name: of the config's field, for errors.
        kind: the group's dataclass.
        value: an instance, a mapping with some of its fields, the same as JSON text, or None for
            the defaults.

    Raises:
        ValueError: it is not JSON of an object, or has a field that the group has not.
        TypeError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be a JSON object, got {value!r}: {error}") from error
    if isinstance(value, kind):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a {kind.__name__} or a mapping, got {value!r}")
    given = dict(value or {})
    known = [x.name for x in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; it has {', '.join(known)}")
    return kind(**given)


def as_optional_group(name: str, kind: type[Group], value: Any) -> Group | None:
    """As `as_group`, for a group that is off if it is None (or "null"), and on if it is {}."""
    if value is None or (isinstance(value, str) and value.strip() == "null"):
        return None
    return as_group(name, kind, value)


@dataclass
class ClipConfig:
    """A bound on the divergence.

    Raises:
        ValueError: a value is out of range.
    """

    bound: float | None = field(default=None, metadata={"help": "In nats, > 0; None is no clip."})
    level: str = field(
        default="vocab_entry",
        metadata={
            "help": "What is bounded: vocab_entry as in the OPSD release (can reverse gradients), "
            "token, or token_rescale (keeps their direction)."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        DivergenceSpec("jsd", clip=self.bound, clip_level=self.level)


@dataclass
class HiddenConfig:
    """How layers are compared.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    loss: str = field(
        default="mse", metadata={"help": "Of hidden states: mse, cosine or l1, mean over layers."}
    )
    attention_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight, >= 0, of KL(teacher || student) of the same layers' attention maps; "
            "needs attn_implementation='eager'."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.loss not in HIDDEN_LOSSES:
            raise ValueError(f"hidden.loss must be one of {HIDDEN_LOSSES}, got {self.loss!r}")
        if not (math.isfinite(self.attention_weight) and self.attention_weight >= 0):
            raise ValueError(
                f"hidden.attention_weight must be at least 0, got {self.attention_weight}"
            )


@dataclass
class TokenWeightsConfig:
    """How much a token counts: by the class of its text, its place, and the teacher's entropy.

    The factors are multiplied. `hf_distill.token_classes` has the classes, `hf_distill.markers` the
    places.

    Raises:
        ValueError: a number is negative or not finite, or markers are not two different texts.
    """

    special: float = field(default=1.0, metadata={"help": "Special tokens, >= 0."})
    number: float = field(default=1.0, metadata={"help": "Digits without a letter, >= 0."})
    punctuation: float = field(default=1.0, metadata={"help": "No letter and no digit, >= 0."})
    space: float = field(default=1.0, metadata={"help": "Only whitespace, >= 0."})
    word: float = field(default=1.0, metadata={"help": "The rest, >= 0."})
    entropy: float = field(
        default=0.0,
        metadata={
            "help": "A token counts 1 + entropy * H / ln V times, >= 0; H is the teacher's entropy "
            "there at temperature 1 in nats, V the number of logits."
        },
    )
    reasoning: float = field(default=1.0, metadata={"help": "Tokens between the markers, >= 0."})
    markers: list[str] = field(
        default_factory=lambda: ["<think>", "</think>"],
        metadata={"help": "Two different texts, around reasoning; they do not belong to it."},
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        for name in (*CLASSES, "entropy", "reasoning"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"token_weights.{name} must be at least 0 and finite, got {value}")
        given = self.markers
        is_pair = isinstance(given, list | tuple) and len(given) == 2
        if not is_pair or not all(isinstance(x, str) and x for x in given) or given[0] == given[1]:
            raise ValueError(
                f"token_weights.markers must be two different texts, not empty, got {given!r}"
            )

    def by_class(self) -> list[float] | None:
        """The weights in the order of `CLASSES`, or None if all are 1."""
        weights = [getattr(self, name) for name in CLASSES]
        return None if all(weight == 1.0 for weight in weights) else weights

    def around_reasoning(self) -> tuple[str, str] | None:
        """The markers, or None if reasoning counts like the rest."""
        return None if self.reasoning == 1.0 else (self.markers[0], self.markers[1])

    def active(self) -> bool:
        """Whether some tokens count more than others."""
        by_place = self.by_class() is not None or self.around_reasoning() is not None
        return by_place or self.entropy > 0.0


@dataclass
class TaidConfig:
    """How the target of TAID moves from the student (t = 0) to the teacher (t = 1).

    The defaults are those of the paper, where step_size is alpha and momentum is beta.

    Raises:
        ValueError: a value is out of range, or one that is not read was changed.
    """

    t_start: float = field(default=0.4, metadata={"help": "t at the first step, in [0, t_end]."})
    t_end: float = field(default=1.0, metadata={"help": "The largest t, in (0, 1]."})
    step_size: float = field(
        default=5e-4,
        metadata={"help": "The most that a step adds beside the linear way, per 1 - t, in [0, 1]."},
    )
    momentum: float = field(
        default=0.99, metadata={"help": "Decay of the average change of the loss, in [0, 1)."}
    )
    adaptive: bool = field(
        default=True,
        metadata={"help": "False: t is linear in the progress of training, and that alone."},
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if not 0.0 < self.t_end <= 1.0:
            raise ValueError(f"taid.t_end must be in (0, 1], got {self.t_end}")
        if not 0.0 <= self.t_start <= self.t_end:
            raise ValueError(
                f"taid.t_start must be in [0, t_end = {self.t_end}], got {self.t_start}"
            )
        if not 0.0 <= self.step_size <= 1.0:
            raise ValueError(f"taid.step_size must be in [0, 1], got {self.step_size}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"taid.momentum must be in [0, 1), got {self.momentum}")
        for name in ("step_size", "momentum"):
            value = getattr(self, name)
            if not self.adaptive and value != getattr(TaidConfig, name):
                raise ValueError(f"taid.{name} is read if taid.adaptive only, got {value}")


@dataclass
class SelfTeacherConfig:
    """How a self-teacher follows the student.

    Raises:
        ValueError: a value is out of range.
    """

    ema_decay: float = field(
        default=0.995, metadata={"help": "Decay per optimizer step of teacher ema, in [0, 1)."}
    )
    lora_scale: float | str = field(
        default=0.5,
        metadata={
            "help": "Share of the adapters' effect that teacher lora_scale has, in [0, 1]; a "
            "number, or a schedule such as 'linear:0.0->1.0@100' (from, to, optimizer steps)."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        SelfTeacher("ema", self.ema_decay, self.lora_scale)


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


@dataclass
class WatchdogConfig(Limits):
    """What is watched during training, and what happens at a fault; the limits are `Limits`.

    Raises:
        ValueError: a value is out of range.
    """

    action: str = field(
        default="warn",
        metadata={"help": "At a fault: warn, stop (ends the training), raise, or off."},
    )
    window: int = field(
        default=3, metadata={"help": "Logs whose median is a start or a present value, >= 1."}
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        super().__post_init__()
        self.make()

    def make(self) -> Watchdog:
        """The callback."""
        return Watchdog(self.action, self.window, self)
