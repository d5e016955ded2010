"""The settings of a DistillTrainer: TrainingArguments and what defines the loss."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, cast

from transformers import TrainingArguments

from hf_distill.data.token_weights import TokenWeightsConfig
from hf_distill.losses import (
    SAMPLED_KINDS,
    SPANS,
    UNIVERSAL,
    CrossTokenizerLoss,
    DivergenceLoss,
    Loss,
    LossSettings,
    SampledTokenLoss,
    SpanLoss,
    TaidLoss,
    normalised_jsd,
)
from hf_distill.losses.divergence import ClipConfig
from hf_distill.losses.hidden_states import HiddenConfig
from hf_distill.losses.taid import TaidConfig
from hf_distill.models.layers import parse_layers
from hf_distill.monitoring.metrics import LOSSES
from hf_distill.monitoring.watchdog import WatchdogConfig
from hf_distill.schedules import Schedule, Value
from hf_distill.trainers import config_schedules
from hf_distill.trainers.config_groups import as_group, as_optional_group
from metal_ops import DivergenceSpec
from metal_ops.spec import KINDS

logger = logging.getLogger(__name__)

DIVERGENCES = (*KINDS, *SAMPLED_KINDS, UNIVERSAL, SPANS)


def check_divergence(name: str) -> None:
    """Check that a divergence is one that there is.

    Raises:
        ValueError: it is another; naming all, and those that it may mean.
    """
    if name in DIVERGENCES:
        return
    parts = [x for x in DIVERGENCES if name and name in x]
    near = parts or get_close_matches(name, DIVERGENCES)
    meant = f"; do you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"divergence must be one of {DIVERGENCES}, got {name!r}{meant}")


# settings of the losses that the config makes
OF_BUILT_IN = (
    "divergence",
    "temperature",
    "temperature_scaling",
    "beta",
    "support",
    "top_k",
    "missing",
    "clip",
    "taid",
)


def loss_settings_of(args: Any) -> tuple[Any, ...]:
    """Return of a config what the loss of a step is made of."""
    names = ("alpha", *OF_BUILT_IN, "contrast", "contrast_weight")
    return tuple(getattr(args, name, None) for name in names)


@dataclass
class DistillConfig(TrainingArguments):
    """Adds to TrainingArguments what defines the loss, alpha * soft + (1 - alpha) * hard.

    temperature, alpha, beta and hidden_weight are numbers or follow the optimizer steps, as a
    `Schedule` or its text ("linear:4.0->1.0@1000"). A group (`clip`) is its dataclass, a mapping
    with some of its fields (as in YAML), or the same as JSON text (as on a command line); it is the
    dataclass afterwards.
    """

    temperature: Value = field(
        default=2.0,
        metadata={
            "help": "The softmax temperature of both sides in the soft loss. It must be greater "
            "than 0."
        },
    )
    alpha: Value = field(
        default=0.5,
        metadata={
            "help": "The share of the soft loss, in [0, 1]. The rest is the cross-entropy of the "
            "labels."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Chooses the soft loss: forward_kl, which is KL(teacher||student), reverse_kl, "
            "jsd (with beta) or another kind of metal_ops.DivergenceSpec. policy_gradient and k3 "
            "read the scored tokens alone, and uld and spans compare with a teacher of another "
            "tokenizer."
        },
    )
    beta: Value = field(
        default=0.5,
        metadata={
            "help": "The weight of the teacher in the mixture of the JSD, in [0, 1]. As in GKD, 0 "
            "means the forward and 1 the reverse KL divergence. If beta follows a schedule, the "
            "JSD is divided by beta (1 - beta)."
        },
    )
    temperature_scaling: str = field(
        default="t2",
        metadata={
            "help": "'t2' multiplies the soft loss by temperature², so that its gradients keep "
            "their size beside the hard loss. 'none' leaves it as it is."
        },
    )
    support: str = field(
        default="full",
        metadata={
            "help": "The entries of the vocabulary that the divergence reads: full reads all, "
            "teacher_topk and student_topk read the top_k most probable ones of that side, and "
            "union reads the top_k of both."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "The number of entries that each token reads, at least 1. It requires a "
            "support other than full."
        },
    )
    missing: str = field(
        default="tail",
        metadata={
            "help": "Says what happens to the entries outside the support: tail keeps their mass "
            "as one more entry, renormalise divides both sides by their mass on the support, and "
            "zero drops the terms."
        },
    )
    clip: ClipConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Limits the soft loss. The group has the fields bound and level."},
    )
    token_weights: TokenWeightsConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Says how much each token counts. The group has the fields special, number, "
            "punctuation, space, word, entropy, reasoning, markers, position, skip_first and "
            "drift, and some that shape these."
        },
    )
    hidden_layers: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "The layers whose hidden states are compared: 'uniform', 'last', layers of the "
            "student such as [6, 12], or pairs [[6, 12], [12, 24]] of student and teacher. With "
            "None, no layers are compared."
        },
    )
    hidden_weight: Value = field(
        default=0.1,
        metadata={"help": "The weight of the hidden loss, at least 0. It requires hidden_layers."},
    )
    hidden: HiddenConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Says how layers are compared. The group has the fields loss and "
            "attention_weight."
        },
    )
    watchdog: WatchdogConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Says what happens when a fault is noticed. The group has the fields action "
            "and window, and a limit for each fault."
        },
    )
    shard_loss: bool = field(
        default=False,
        metadata={
            "help": "Under FSDP 2, leaves output heads in pieces: each process computes its part "
            "of the vocabulary for the tokens of all, and hidden states are exchanged in place of "
            "the head. It takes less memory where heads are large, and needs FSDP 2."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "The most tokens of a batch on a device in training, at least 1. Batches are "
            "filled until per_device_train_batch_size rows or so many tokens: of packed rows all "
            "together, of padded ones with the padding, on the longer of both sides. None means no "
            "limit."
        },
    )
    taid: TaidConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Puts a moving target between student and teacher (TAID). The group has the "
            "fields t_start, t_end, step_size, momentum and adaptive. {} takes their defaults, and "
            "None turns TAID off."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        self._prefer_less()
        super().__post_init__()
        self.check_values()

    def _prefer_less(self) -> None:
        """Choose the least of a metric that is a loss: by its name, which the parent class goes by.

        It takes the most of every metric whose name does not end in "loss".
        """
        name = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and name in LOSSES:
            self.greater_is_better = False
            logger.info(
                "greater_is_better is False: metric_for_best_model %r is a loss",
                self.metric_for_best_model,
            )

    def check_values(self) -> None:
        """Check the values, and make groups of what was given for them.

        Raises:
            ValueError: a value is unknown or out of range, or does not go with another.
        """
        for name in config_schedules.schedules_of(self):
            setattr(self, name, config_schedules.checked_value(name, getattr(self, name)))
        config_schedules.check_schedules_are_read(self)
        self.clip = as_group("clip", ClipConfig, self.clip)
        self.token_weights = as_group("token_weights", TokenWeightsConfig, self.token_weights)
        self.hidden = as_group("hidden", HiddenConfig, self.hidden)
        self.hidden_layers = parse_layers(self.hidden_layers)
        self.watchdog = as_group("watchdog", WatchdogConfig, self.watchdog)
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(
                f"max_tokens_per_batch must be at least 1, got {self.max_tokens_per_batch}"
            )
        self.taid = as_optional_group("taid", TaidConfig, self.taid)
        if self.taid is not None and config_schedules.bounds(self, "alpha")[1] == 0:
            raise ValueError(f"taid is a soft loss and needs alpha > 0, got {self.alpha}")
        list(self.losses())

    def loss_at(self, step: int = 0) -> Loss:
        """Return the loss in the optimizer step that follows `step` of them.

        Raises:
            ValueError: a value is out of range, the clip, support or taid is not one of this
                divergence, or a setting is given that it does not read.
        """
        return self._loss(config_schedules.values_at(self, step))

    def losses(self) -> Iterator[Loss]:
        """Yield losses at the ends of all schedules, and between: what holds for them always holds.

        Raises:
            ValueError: as `loss_at`.
        """
        return map(self._loss, config_schedules.extreme_values(self))

    @property
    def measures_hard(self) -> bool:
        """Return whether some step has a share of the cross-entropy, so that all measure it."""
        return config_schedules.bounds(self, "alpha")[0] < 1.0

    def _loss(self, values: Mapping[str, float]) -> Loss:
        check_divergence(self.divergence)
        alpha, hard = values["alpha"], self.measures_hard
        scale = values["temperature"], self.temperature_scaling
        if self.taid is not None and self.divergence != "forward_kl":
            raise ValueError(f"taid needs divergence 'forward_kl', got {self.divergence!r}")
        if self.divergence == UNIVERSAL:
            self._check_unread("beta", "clip", "support", "top_k", "missing")
            return CrossTokenizerLoss(alpha, *scale, measures_hard=hard)
        if self.divergence == SPANS:
            self._check_unread("beta", "support", "top_k", "missing")
            return SpanLoss(alpha, *scale, self._token_bound(), measures_hard=hard)
        if self.divergence in SAMPLED_KINDS:
            self._check_unread("support", "top_k", "missing")
            return SampledTokenLoss(
                self.divergence, alpha, *scale, self._token_bound(), measures_hard=hard
            )
        spec, factor = self._divergence_spec(values), 1.0
        if self.divergence == "jsd" and Schedule.parse(self.beta).moves:
            spec, factor = normalised_jsd(spec)
        made = DivergenceLoss(spec, alpha, factor=factor, measures_hard=hard)
        return self._with_target(made, values)

    def _with_target(self, loss: DivergenceLoss, values: Mapping[str, float]) -> DivergenceLoss:
        """Return the divergence to what the config asks for in place of the teacher."""
        if self.taid is None:
            return loss
        hard = loss.measures_hard
        return TaidLoss(loss.spec, loss.alpha, factor=loss.factor, measures_hard=hard)

    def _token_bound(self) -> float | None:
        """Return the clip's bound, for a loss of single tokens."""
        clip = cast(ClipConfig, self.clip)
        if clip.bound is not None and clip.level != "token":
            raise ValueError(
                f"the clip of {self.divergence} must have level 'token', got {clip.level!r}: it "
                "reads single tokens, not the vocabulary"
            )
        return clip.bound

    def _check_unread(self, *names: str) -> None:
        """Check that settings that the divergence does not read are at their defaults."""
        plain = {x.name: x.default for x in fields(self)}
        for name in names:
            value, default = getattr(self, name), plain[name]
            if name == "clip":
                name, value = "clip.bound", cast(ClipConfig, value).bound
            if value != default:
                raise ValueError(
                    f"divergence {self.divergence!r} has no {name}: leave it at {default}, got "
                    f"{value}"
                )

    def loss_settings(self) -> LossSettings:
        """Return what the loss knows of rollouts: here nothing."""
        return LossSettings()

    def divergence_spec(self, step: int = 0) -> DivergenceSpec:
        """Return the soft loss's divergence after so many steps, unless it is of sampled tokens."""
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
            support=self.support,
            top_k=self.top_k,
            missing=self.missing,
        )

    def to_dict(self) -> dict[str, Any]:
        """Do as `TrainingArguments` does; groups become dicts, schedules their texts."""
        result = super().to_dict()
        for name in (x.name for x in fields(self) if x.name in result):
            value = result[name]
            if isinstance(value, Schedule):
                result[name] = str(value)
            elif dataclasses.is_dataclass(value) and type(value).__module__.startswith(
                "hf_distill"
            ):
                result[name] = dataclasses.asdict(cast(Any, value))
        return result
