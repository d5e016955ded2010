"""The trainers' configs: TrainingArguments, what defines the objective, and groups of the rest."""

import dataclasses
import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast

from transformers import TrainingArguments

from hf_distill.layers import parse_layers
from hf_distill.losses import SAMPLED_KINDS, Objective, SampledObjective, TaidObjective
from hf_distill.teachers import SelfTeacher
from hf_distill.trainers.groups import (
    ClassWeightsConfig,
    ClipConfig,
    HiddenConfig,
    RolloutConfig,
    SelfTeacherConfig,
    TaidConfig,
    WatchdogConfig,
    as_group,
    as_optional_group,
)
from metal_ops import DivergenceSpec


class LossSettings(NamedTuple):
    """What a loss knows of rollouts: `rollout.importance_clip`, and `anchor_weight`."""

    importance_clip: float | None = None
    anchor_weight: float = 0.0


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments and what defines the objective, alpha * soft + (1 - alpha) * hard.

    A group (`clip`) is its dataclass, a mapping with some of its fields (as in YAML), or the same
    as JSON text (as on a command line); it is the dataclass afterwards.
    """

    temperature: float = field(
        default=2.0, metadata={"help": "Softmax temperature of both sides in the soft loss, > 0."}
    )
    alpha: float = field(
        default=0.5,
        metadata={"help": "Share of the soft loss in [0, 1]; the rest is cross-entropy."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl = KL(teacher||student), reverse_kl, jsd (with beta), another kind "
            "of metal_ops.DivergenceSpec, or policy_gradient or k3, of the tokens alone."
        },
    )
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the teacher in the JSD's mixture, in [0, 1]; 0 and 1 mean forward "
            "and reverse KL, as in GKD."
        },
    )
    temperature_scaling: str = field(
        default="t2",
        metadata={
            "help": "'t2' multiplies the soft loss by temperature², so that its gradients keep "
            "their size beside the hard loss; 'none' does not."
        },
    )
    clip: ClipConfig | str | dict[str, Any] | None = field(
        default=None, metadata={"help": "A bound on the soft loss: bound, level."}
    )
    class_weights: ClassWeightsConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Weights of tokens by class: special, number, punctuation, space, word."},
    )
    hidden_layers: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Layers whose hidden states are compared: 'uniform', 'last', student layers "
            "such as [6, 12], or pairs [[6, 12], [12, 24]] (student, teacher); None is none."
        },
    )
    hidden_weight: float = field(
        default=0.1, metadata={"help": "Weight of the hidden loss, >= 0; needs hidden_layers."}
    )
    hidden: HiddenConfig | str | dict[str, Any] | None = field(
        default=None, metadata={"help": "How layers are compared: loss, attention_weight."}
    )
    watchdog: WatchdogConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "What happens at faults: action, window, and a limit per fault."},
    )
    taid: TaidConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "TAID, a target between student and teacher: t_start, t_end, step_size, "
            "momentum, adaptive; {} takes the defaults, None is off."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        self.clip = as_group("clip", ClipConfig, self.clip)
        self.class_weights = as_group("class_weights", ClassWeightsConfig, self.class_weights)
        self.hidden = as_group("hidden", HiddenConfig, self.hidden)
        self.hidden_layers = parse_layers(self.hidden_layers)
        if not (math.isfinite(self.hidden_weight) and self.hidden_weight >= 0):
            raise ValueError(f"hidden_weight must be at least 0, got {self.hidden_weight}")
        self.watchdog = as_group("watchdog", WatchdogConfig, self.watchdog)
        self.taid = as_optional_group("taid", TaidConfig, self.taid)
        if self.taid is not None and self.alpha == 0:
            raise ValueError(f"taid is a soft loss and needs alpha > 0, got {self.alpha}")
        self.objective()

    def objective(self) -> Objective | SampledObjective:
        """The loss of a token.

        Raises:
            ValueError: a value is out of range, or the clip or taid is not one of this divergence.
        """
        if self.taid is not None and self.divergence != "forward_kl":
            raise ValueError(f"taid needs divergence 'forward_kl', got {self.divergence!r}")
        if self.divergence not in SAMPLED_KINDS:
            kind = Objective if self.taid is None else TaidObjective
            return kind(self.divergence_spec(), self.alpha)
        clip = cast(ClipConfig, self.clip)
        if clip.bound is not None and clip.level != "token":
            raise ValueError(
                f"the clip of {self.divergence} must have level 'token', got {clip.level!r}: it "
                "reads single tokens, not the vocabulary"
            )
        return SampledObjective(
            self.divergence, self.alpha, self.temperature, self.temperature_scaling, clip.bound
        )

    def loss_settings(self) -> LossSettings:
        """What the loss knows of rollouts: here nothing."""
        return LossSettings()

    def divergence_spec(self) -> DivergenceSpec:
        """The divergence of the soft loss, unless it is one of sampled tokens."""
        clip = cast(ClipConfig, self.clip)
        return DivergenceSpec(
            self.divergence,
            self.beta,
            self.temperature,
            self.temperature_scaling,
            clip=clip.bound,
            clip_level=clip.level,
        )

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`; groups are dicts."""
        result = super().to_dict()
        for name in (x.name for x in fields(self) if x.name in result):
            value = result[name]
            if dataclasses.is_dataclass(value) and type(value).__module__ == ClipConfig.__module__:
                result[name] = dataclasses.asdict(cast(Any, value))
        return result


@dataclass
class OPSDConfig(DistillConfig):
    """DistillConfig with the defaults of on-policy self-distillation, and its own settings."""

    temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of both sides in the loss, > 0."}
    )
    alpha: float = field(
        default=1.0,
        metadata={
            "help": "Share of the soft loss in [0, 1]; the rest is the completions' cross-entropy."
        },
    )
    divergence: str = field(
        default="jsd",
        metadata={
            "help": "jsd, forward_kl = KL(teacher||student), reverse_kl, another kind of "
            "metal_ops.DivergenceSpec, or policy_gradient or k3, of the tokens alone."
        },
    )
    temperature_scaling: str = field(
        default="none", metadata={"help": "'none' is the convention of OPSD and TRL; or 't2'."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "False: the collator reads hints from any column."}
    )
    teacher: str = field(
        default="base",
        metadata={
            "help": "base: the model before training (adapters off, or a frozen copy); ema: a "
            "moving average; lora_scale: the model with weaker adapters; live: the model as it is, "
            "which tends to collapse."
        },
    )
    on_policy: bool = field(
        default=True,
        metadata={"help": "Sample completions from the student; False takes them from the data."},
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens of a sampled completion, >= 1."}
    )
    self_teacher: SelfTeacherConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "How the teacher follows the student: ema_decay, lora_scale."},
    )
    rollout: RolloutConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Sampling: temperature, steps_per_rollout, engine, batch_size, ..."},
    )
    anchor_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight, >= 0, of the mean cross-entropy of the data's own completions beside "
            "the loss of the sampled ones; needs on_policy."
        },
    )
    log_completions: int = field(
        default=0,
        metadata={"help": "Sampled rows shown per log, >= 0; with 0 none are collected either."},
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        super().__post_init__()
        self.self_teacher = as_group("self_teacher", SelfTeacherConfig, self.self_teacher)
        self.rollout = as_group("rollout", RolloutConfig, self.rollout)
        self.make_teacher()
        if not (math.isfinite(self.anchor_weight) and self.anchor_weight >= 0):
            raise ValueError(f"anchor_weight must be at least 0, got {self.anchor_weight}")
        if self.anchor_weight > 0 and not self.on_policy:
            raise ValueError(
                f"anchor_weight {self.anchor_weight} > 0 needs on_policy: the data's completions "
                "are scored already, and alpha < 1 adds their cross-entropy"
            )
        if self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length must be at least 1, got {self.max_completion_length}"
            )
        if self.log_completions < 0:
            raise ValueError(f"log_completions must not be negative, got {self.log_completions}")
        if self.log_completions and not self.on_policy:
            raise ValueError(
                f"log_completions {self.log_completions} > 0 needs on_policy: else none are sampled"
            )

    def loss_settings(self) -> LossSettings:
        """What the loss knows of rollouts."""
        rollout = cast(RolloutConfig, self.rollout)
        return LossSettings(rollout.importance_clip, self.anchor_weight)

    def make_teacher(self) -> SelfTeacher:
        """The teacher that `teacher` names."""
        follow = cast(SelfTeacherConfig, self.self_teacher)
        return SelfTeacher(self.teacher, follow.ema_decay, follow.lora_scale)
