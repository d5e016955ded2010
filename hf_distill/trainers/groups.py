"""Settings that belong together, as one field of a config: a dataclass, a mapping or JSON text."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hf_distill.faults import Limits
from hf_distill.teachers import SelfTeacher
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
class SelfTeacherConfig:
    """How a self-teacher follows the student.

    Raises:
        ValueError: a value is out of range.
    """

    ema_decay: float = field(
        default=0.995, metadata={"help": "Decay per optimizer step of teacher ema, in [0, 1)."}
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        SelfTeacher("ema", self.ema_decay)


@dataclass
class RolloutConfig:
    """How completions are sampled, and how long they are used.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = field(
        default=0.7, metadata={"help": "Of sampling, >= 0; 0 is greedy. Not the loss's."}
    )
    steps_per_rollout: int = field(
        default=1, metadata={"help": "Optimizer steps taken on each batch of completions, >= 1."}
    )
    generation_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "More fields of GenerationConfig."}
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.steps_per_rollout < 1:
            raise ValueError(f"steps_per_rollout must be at least 1, got {self.steps_per_rollout}")
        if self.temperature < 0:
            raise ValueError(f"rollout temperature must not be negative, got {self.temperature}")


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
