"""The settings of an OPSDTrainer: a DistillConfig and what defines the teacher and the rollouts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from hf_distill.losses import (
    SAMPLED_KINDS,
    SPANS,
    UNIVERSAL,
    ContrastConfig,
    ContrastLoss,
    DivergenceLoss,
    LossSettings,
)
from hf_distill.rollouts.config import RolloutConfig
from hf_distill.schedules import Value
from hf_distill.teachers import SelfTeacher
from hf_distill.teachers.self_teacher import SelfTeacherConfig
from hf_distill.trainers.config_groups import as_group
from hf_distill.trainers.distill_config import DistillConfig


@dataclass
class OPSDConfig(DistillConfig):
    """Gives DistillConfig the defaults of on-policy self-distillation, and settings of its own."""

    temperature: Value = field(
        default=1.0,
        metadata={
            "help": "The softmax temperature of both sides in the loss. It must be greater than 0."
        },
    )
    alpha: Value = field(
        default=1.0,
        metadata={
            "help": "The share of the soft loss, in [0, 1]. The rest is the cross-entropy of the "
            "completions."
        },
    )
    divergence: str = field(
        default="jsd",
        metadata={
            "help": "Chooses the soft loss: jsd, forward_kl, which is KL(teacher||student), "
            "reverse_kl or another kind of metal_ops.DivergenceSpec. policy_gradient and k3 read "
            "the scored tokens alone."
        },
    )
    temperature_scaling: str = field(
        default="none",
        metadata={
            "help": "'none' is the convention of OPSD and TRL. 't2' multiplies the soft loss by "
            "temperature²."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "With False, the data collator can read hints from any column."},
    )
    teacher: str = field(
        default="base",
        metadata={
            "help": "Chooses the self-teacher: base is the model before training (adapters "
            "switched off, or a frozen copy), ema is a moving average of its trained parameters, "
            "lora_scale is the model with weaker adapters, and live is the model as it is, which "
            "tends to collapse."
        },
    )
    on_policy: bool = field(
        default=True,
        metadata={
            "help": "Whether completions are sampled from the student. With False, they are taken "
            "from the data."
        },
    )
    max_completion_length: int = field(
        default=256,
        metadata={"help": "The maximum number of tokens of a sampled completion, at least 1."},
    )
    self_teacher: SelfTeacherConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Says how the teacher follows the student. The group has the fields ema_decay "
            "and lora_scale."
        },
    )
    rollout: RolloutConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Says how completions are sampled and used. The group has fields such as "
            "temperature, num_completions, steps_per_rollout, engine and batch_size."
        },
    )
    contrast: ContrastConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Says what is made of a wrong hint, which a HintCollator(contrast=) adds. The "
            "group has the fields kind, scale, threshold, strength and bound."
        },
    )
    contrast_weight: Value = field(
        default=1.0,
        metadata={
            "help": "The share of the contrast, in [0, 1]. With 0, the teacher's right hint alone "
            "counts. It is read with a HintCollator(contrast=)."
        },
    )
    base_kl_weight: float = field(
        default=0.0,
        metadata={
            "help": "The weight, at least 0, of KL(student||base) at temperature 1, which is added "
            "to the training loss. The base is the student before training, and reads the "
            "student's rows. It requires the teacher base."
        },
    )
    anchor_weight: float = field(
        default=0.0,
        metadata={
            "help": "The weight, at least 0, of the mean cross-entropy of the data's own "
            "completions, which is added to the loss of the sampled ones. It requires on_policy."
        },
    )
    log_completions: int = field(
        default=0,
        metadata={
            "help": "The number of sampled rows that are shown at each log, at least 0. With 0, no "
            "rows are collected either."
        },
    )
    log_token_values: int = field(
        default=0,
        metadata={
            "help": "The number of rows of each batch of training whose scored tokens are written "
            "to completions.jsonl, each with its loss, weight, entropies and contrast, at least 0. "
            "It requires log_completions."
        },
    )
    forecast_rows: int = field(
        default=0,
        metadata={
            "help": "The number of rows of the evaluation set, or without one of the training set, "
            "that a forecast before the first step measures, see OPSDTrainer.forecast. With 0, "
            "there is none. It requires on_policy."
        },
    )
    forecast_steps: int | None = field(
        default=None,
        metadata={
            "help": "Measures the forecast again every so many steps, at least 1, so that it can "
            "be held against what came. None measures it before the first step only."
        },
    )

    def check_values(self) -> None:
        """Check the values as `DistillConfig` does, and those of this class."""
        self.contrast = as_group("contrast", ContrastConfig, self.contrast)
        if self.contrast.kind == "target":
            self._check_contrast_target()
        super().check_values()
        if not (math.isfinite(self.base_kl_weight) and self.base_kl_weight >= 0):
            raise ValueError(
                f"base_kl_weight must be at least 0 and finite, got {self.base_kl_weight}"
            )
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
        self._check_prefix()
        if self.log_completions < 0:
            raise ValueError(f"log_completions must not be negative, got {self.log_completions}")
        if self.log_token_values < 0:
            raise ValueError(f"log_token_values must not be negative, got {self.log_token_values}")
        if self.log_token_values and not self.log_completions:
            raise ValueError(
                f"log_token_values {self.log_token_values} > 0 needs log_completions of at least "
                f"1, got {self.log_completions}: the values are written to the same file"
            )
        self._check_forecast()
        if self.log_completions and not self.on_policy:
            raise ValueError(
                f"log_completions {self.log_completions} > 0 needs on_policy: else none are sampled"
            )

    def _check_contrast_target(self) -> None:
        """Check that nothing else makes a target of its own, and that there is a vocabulary."""
        of_tokens = self.divergence in (*SAMPLED_KINDS, UNIVERSAL, SPANS)
        if self.taid is not None or of_tokens or self.support != "full":
            raise ValueError(
                "contrast.kind 'target' needs a divergence over the whole vocabulary and no taid, "
                f"got divergence {self.divergence!r}, support {self.support!r} and taid "
                f"{self.taid!r}"
            )

    def _with_target(self, loss: DivergenceLoss, values: Mapping[str, float]) -> DivergenceLoss:
        config = cast(ContrastConfig, self.contrast)
        if config.kind != "target":
            return super()._with_target(loss, values)
        more = {"factor": loss.factor, "measures_hard": loss.measures_hard, "config": config}
        return ContrastLoss(loss.spec, loss.alpha, share=values["contrast_weight"], **more)

    def _check_prefix(self) -> None:
        bounds = cast(RolloutConfig, self.rollout).prefix_bounds
        if bounds is not None and bounds[1] > self.max_completion_length:
            raise ValueError(
                f"rollout.prefix_tokens must be at most max_completion_length, got {bounds[1]} and "
                f"{self.max_completion_length}"
            )

    def _check_forecast(self) -> None:
        if self.forecast_rows < 0:
            raise ValueError(f"forecast_rows must be at least 0, got {self.forecast_rows}")
        if self.forecast_rows and not self.on_policy:
            raise ValueError(
                f"forecast_rows {self.forecast_rows} > 0 needs on_policy: it samples completions"
            )
        if self.forecast_steps is not None and self.forecast_steps < 1:
            raise ValueError(f"forecast_steps must be at least 1, got {self.forecast_steps}")
        if self.forecast_steps is not None and not self.forecast_rows:
            raise ValueError(
                f"forecast_steps {self.forecast_steps} needs forecast_rows of at least 1, got 0"
            )

    def loss_settings(self) -> LossSettings:
        """Return what the loss knows of rollouts."""
        rollout = cast(RolloutConfig, self.rollout)
        return LossSettings(rollout.importance_clip, self.anchor_weight)

    def make_teacher(self) -> SelfTeacher:
        """Make the teacher that `teacher` names."""
        follow = cast(SelfTeacherConfig, self.self_teacher)
        return SelfTeacher(self.teacher, follow.ema_decay, follow.lora_scale)
