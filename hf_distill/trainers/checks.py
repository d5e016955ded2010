"""What must hold before a run begins, and settings that a run does not read."""

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel
from torch import nn

from hf_distill import losses
from hf_distill.cache import CachedTeacher
from hf_distill.data.hint_schedule import plan_of
from hf_distill.data.token_weights import TokenWeightsConfig
from hf_distill.losses.hard_loss import check_anchor
from hf_distill.models.structure import causal_lm, check_kind
from hf_distill.rollouts.config import RolloutConfig
from hf_distill.teachers import ModelTeacher, RemoteTeacher, Teacher, check_kinds, each_teacher
from hf_distill.teachers.self_teacher import SelfTeacherConfig
from hf_distill.trainers import config_schedules
from hf_distill.trainers.distill_config import DistillConfig
from hf_distill.trainers.opsd_config import OPSDConfig

if TYPE_CHECKING:
    from hf_distill.trainers.distill_trainer import DistillTrainer

logger = logging.getLogger(__name__)


def check_setup(trainer: "DistillTrainer") -> None:
    """Check a trainer whose teacher and objective are known.

    Raises:
        ValueError: its loss could not be right; the message names the rule and the value.
    """
    _check_processes(trainer)
    low, high = config_schedules.bounds(trainer.args, "temperature")
    for teacher in each_teacher(trainer.teacher):
        if isinstance(teacher, ModelTeacher):
            check_kinds(cast(nn.Module, trainer.model), teacher.model)
        if isinstance(teacher, RemoteTeacher) and (low, high) != (1.0, 1.0):
            raise ValueError(
                "a remote teacher's log-probabilities are at temperature 1: set "
                f"temperature=1.0, got {trainer.args.temperature}"
            )
        if isinstance(teacher, CachedTeacher):
            _check_cached(trainer, teacher)
        _check_taid(trainer, teacher)
    if trainer._classification is None:
        _check_student(cast(nn.Module, trainer.model))
    _check_token_weights(trainer)
    check_anchor(trainer)


def _check_token_weights(trainer: "DistillTrainer") -> None:
    config = cast(TokenWeightsConfig, trainer.args.token_weights)
    for text in unused_anywhere(trainer.args):
        logger.warning("a setting is not used: %s", text)
    whole = config.entropy > 0 or config.around_reasoning() is not None
    split = trainer.get_cp_size() * trainer.get_sp_size()
    if whole and split > 1:
        raise ValueError(
            "token_weights.entropy and token_weights.reasoning need whole rows on each process, "
            f"got rows that are split over {split} (context or sequence parallelism)"
        )
    for teacher in each_teacher(trainer.teacher) if config.entropy > 0 else []:
        if isinstance(teacher, CachedTeacher):
            low, high = teacher.codec.temperature_range
            if not low <= 1.0 <= high:
                raise ValueError(
                    "token_weights.entropy is the teacher's at temperature 1, the cache serves "
                    f"{low:g} to {high:g}: write it with a temperature_range that has 1"
                )


def check_without_teacher(trainer: "DistillTrainer") -> None:
    """Check a trainer that has no teacher.

    Raises:
        ValueError: a setting is of what a teacher says.
    """
    if cast(TokenWeightsConfig, trainer.args.token_weights).active():
        raise ValueError("token_weights need a teacher; without one this is a Trainer")
    if plan_of(trainer.data_collator) is not None:
        raise ValueError("hints that depend on the step need a teacher, got None")


def _check_processes(trainer: "DistillTrainer") -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"one process per device is needed, got {trainer.args.n_gpu} GPUs in one process: "
            "start the script with `accelerate launch`"
        )
    # accelerate sets MASTER_ADDR if several processes were asked for; without MPI it starts one
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True"
    if on_cpu and "MASTER_ADDR" in os.environ and trainer.accelerator.num_processes == 1:
        logger.warning(
            "`accelerate launch --cpu --num_processes N` starts one process unless MPI is "
            "set up; `accelerate launch --multi_gpu --num_processes N` with --use_cpu in "
            "the training arguments starts N processes on the CPU"
        )


def _check_student(model: nn.Module) -> None:
    check_kind(causal_lm(model))
    config = getattr(causal_lm(model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("the student must be a decoder-only causal LM, got an encoder-decoder")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "prompt-learning adapters put virtual tokens before the text, so labels and "
            f"logits do not line up; got {model.active_peft_config.peft_type}"
        )


def _check_taid(trainer: "DistillTrainer", teacher: Teacher) -> None:
    if trainer.args.taid is not None and isinstance(teacher, CachedTeacher | RemoteTeacher):
        raise ValueError(
            "taid mixes the logits of student and teacher, so it needs a teacher with logits or "
            f"hidden states, got a {type(teacher).__name__}, which knows some log-probabilities"
        )


def _check_cached(trainer: "DistillTrainer", teacher: CachedTeacher) -> None:
    plan = plan_of(trainer.data_collator)
    if plan is not None:
        raise ValueError(
            f"a cached teacher knows its rows with the hints of the writing, and {plan.refusal()}"
        )
    objectives = list(trainer.args.objectives())
    if not all(isinstance(objective, losses.Objective) for objective in objectives):
        raise ValueError(
            "a cached teacher has not the log-probability of every token, which divergence "
            f"{trainer.args.divergence!r} reads: take another divergence"
        )
    tokenizer = trainer.processing_class
    # with alpha 0 it is measured
    for spec in dict.fromkeys(cast(losses.Objective, each).spec for each in objectives):
        teacher.check(spec, tokenizer)
        tokenizer = None  # it is the same for all


HIDDEN_WEIGHT = next(
    x.default for x in dataclasses.fields(DistillConfig) if x.name == "hidden_weight"
)

READERS = {"ema_decay": "ema", "lora_scale": "lora_scale"}  # of SelfTeacherConfig's fields


def _changed(settings: Any) -> set[str]:
    """The fields that differ from their defaults."""
    plain = type(settings)()
    names = (x.name for x in dataclasses.fields(settings))
    return {name for name in names if getattr(settings, name) != getattr(plain, name)}


def unused(args: OPSDConfig, has_environment: bool, own_teacher: bool) -> list[str]:
    """What differs from its default and is not read, each with the setting that would read it.

    Args:
        args: of the run.
        has_environment: whether completions are judged.
        own_teacher: whether the teacher is the one that `args.teacher` names.
    """
    rollout = cast(RolloutConfig, args.rollout)
    changed, found = _changed(rollout), []
    if not args.on_policy:
        found += [f"rollout.{name} needs on_policy" for name in sorted(changed)]
    else:
        if "max_turns" in changed and not has_environment:
            found.append("rollout.max_turns needs an environment")
        if "importance_clip" in changed and rollout.steps_per_rollout == 1:
            found.append("rollout.importance_clip needs steps_per_rollout > 1")
    for name in sorted(_changed(cast(SelfTeacherConfig, args.self_teacher))):
        if not own_teacher or args.teacher != READERS[name]:
            found.append(f"self_teacher.{name} needs teacher {READERS[name]!r}")
    return found


def unused_anywhere(args: DistillConfig) -> list[str]:
    """As `unused`, of settings that both trainers have."""
    found = []
    weights = cast(TokenWeightsConfig, args.token_weights)
    if "markers" in _changed(weights) and weights.around_reasoning() is None:
        found.append("token_weights.markers needs a token_weights.reasoning other than 1")
    if args.hidden_layers is None:
        found += [f"hidden.{name} needs hidden_layers" for name in sorted(_changed(args.hidden))]
        if args.hidden_weight != HIDDEN_WEIGHT:
            found.append("hidden_weight needs hidden_layers")
    return found
