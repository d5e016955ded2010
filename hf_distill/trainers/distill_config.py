"""The settings of a DistillTrainer: TrainingArguments and what defines the loss."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast

from transformers import TrainingArguments

from hf_distill.data.token_weights import TokenWeightsConfig
from hf_distill.losses import (
    SAMPLED_KINDS,
    UNIVERSAL,
    AnyObjective,
    Objective,
    SampledObjective,
    TaidObjective,
    UniversalObjective,
    normalised_jsd,
)
from hf_distill.losses.divergence import ClipConfig
from hf_distill.losses.hidden_states import HiddenConfig
from hf_distill.losses.taid import TaidConfig
from hf_distill.models.layers import parse_layers
from hf_distill.monitoring.watchdog import WatchdogConfig
from hf_distill.schedules import Schedule, Value
from hf_distill.trainers import config_schedules
from hf_distill.trainers.config_groups import as_group, as_optional_group
from metal_ops import DivergenceSpec


class LossSettings(NamedTuple):
    """What a loss knows of rollouts: `rollout.importance_clip`, and `anchor_weight`."""

    importance_clip: float | None = None
    anchor_weight: float = 0.0


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments and what defines the objective, alpha * soft + (1 - alpha) * hard.

    temperature, alpha, beta and hidden_weight are numbers or follow the optimizer steps, as a
    `Schedule` or its text ("linear:4.0->1.0@1000"). A group (`clip`) is its dataclass, a mapping
    with some of its fields (as in YAML), or the same as JSON text (as on a command line); it is the
    dataclass afterwards.
    """

    temperature: Value = field(
        default=2.0, metadata={"help": "Softmax temperature of both sides in the soft loss, > 0."}
    )
    alpha: Value = field(
        default=0.5,
        metadata={"help": "Share of the soft loss in [0, 1]; the rest is cross-entropy."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl = KL(teacher||student), reverse_kl, jsd (with beta), another kind "
            "of metal_ops.DivergenceSpec; policy_gradient or k3, of the tokens alone; or uld, for "
            "another tokenizer's teacher."
        },
    )
    beta: Value = field(
        default=0.5,
        metadata={
            "help": "Weight of the teacher in the JSD's mixture, in [0, 1]; 0 and 1 mean forward "
            "and reverse KL, as in GKD. On a schedule the JSD is divided by beta (1 - beta)."
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
    token_weights: TokenWeightsConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "How much tokens count: special, number, punctuation, space, word, entropy, "
            "reasoning, markers."
        },
    )
    hidden_layers: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Layers whose hidden states are compared: 'uniform', 'last', student layers "
            "such as [6, 12], or pairs [[6, 12], [12, 24]] (student, teacher); None is none."
        },
    )
    hidden_weight: Value = field(
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
        for name in config_schedules.RANGES:
            setattr(self, name, config_schedules.checked(name, getattr(self, name)))
        config_schedules.check_read(self)
        self.clip = as_group("clip", ClipConfig, self.clip)
        self.token_weights = as_group("token_weights", TokenWeightsConfig, self.token_weights)
        self.hidden = as_group("hidden", HiddenConfig, self.hidden)
        self.hidden_layers = parse_layers(self.hidden_layers)
        self.watchdog = as_group("watchdog", WatchdogConfig, self.watchdog)
        self.taid = as_optional_group("taid", TaidConfig, self.taid)
        if self.taid is not None and config_schedules.bounds(self, "alpha")[1] == 0:
            raise ValueError(f"taid is a soft loss and needs alpha > 0, got {self.alpha}")
        list(self.objectives())

    def objective(self, step: int = 0) -> AnyObjective:
        """The loss of a token in the optimizer step that follows `step` of them.

        Raises:
            ValueError: a value is out of range, the clip or taid is not one of this divergence,
                or a setting is given that it does not read.
        """
        return self._objective(config_schedules.values_at(self, step))

    def objectives(self) -> Iterator[AnyObjective]:
        """Those of the ends of all schedules, and between them: what holds for these always holds.

        Raises:
            ValueError: as `objective`.
        """
        return map(self._objective, config_schedules.extremes(self))

    def _objective(self, values: Mapping[str, float]) -> AnyObjective:
        alpha = values["alpha"]
        measures_hard = config_schedules.bounds(self, "alpha")[0] < 1.0
        if self.taid is not None and self.divergence != "forward_kl":
            raise ValueError(f"taid needs divergence 'forward_kl', got {self.divergence!r}")
        if self.divergence == UNIVERSAL:
            self._check_universal()
            return UniversalObjective(
                alpha,
                values["temperature"],
                self.temperature_scaling,
                measures_hard=measures_hard,
            )
        if self.divergence not in SAMPLED_KINDS:
            spec, factor = self._divergence_spec(values), 1.0
            if self.divergence == "jsd" and Schedule.parse(self.beta).moves:
                spec, factor = normalised_jsd(spec)
            kind = Objective if self.taid is None else TaidObjective
            return kind(spec, alpha, factor=factor, measures_hard=measures_hard)
        clip = cast(ClipConfig, self.clip)
        if clip.bound is not None and clip.level != "token":
            raise ValueError(
                f"the clip of {self.divergence} must have level 'token', got {clip.level!r}: it "
                "reads single tokens, not the vocabulary"
            )
        return SampledObjective(
            self.divergence,
            alpha,
            values["temperature"],
            self.temperature_scaling,
            clip.bound,
            measures_hard=measures_hard,
        )

    def _check_universal(self) -> None:
        """Settings of other divergences must be as they are."""
        beta = next(x.default for x in fields(self) if x.name == "beta")
        bound = cast(ClipConfig, self.clip).bound
        for name, value, plain in (("beta", self.beta, beta), ("clip.bound", bound, None)):
            if value != plain:
                raise ValueError(
                    f"divergence {UNIVERSAL!r} has no {name}: leave it at {plain}, got {value}"
                )

    def loss_settings(self) -> LossSettings:
        """What the loss knows of rollouts: here nothing."""
        return LossSettings()

    def divergence_spec(self, step: int = 0) -> DivergenceSpec:
        """The divergence of the soft loss after so many steps, unless it is of sampled tokens."""
        return self._divergence_spec(config_schedules.values_at(self, step))

    def _divergence_spec(self, values: Mapping[str, float]) -> DivergenceSpec:
        clip = cast(ClipConfig, self.clip)
        return DivergenceSpec(
            self.divergence,
            values["beta"],
            values["temperature"],
            self.temperature_scaling,
            clip=clip.bound,
            clip_level=clip.level,
        )

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`; groups are dicts, schedules their texts."""
        result = super().to_dict()
        for name in (x.name for x in fields(self) if x.name in result):
            value = result[name]
            if dataclasses.is_dataclass(value) and type(value).__module__ == ClipConfig.__module__:
                result[name] = dataclasses.asdict(cast(Any, value))
            elif isinstance(value, Schedule):
                result[name] = str(value)
        return result
