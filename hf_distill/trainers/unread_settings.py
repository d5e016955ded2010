"""Settings that a run does not read, though the user has changed them from their defaults.

Each is named with the setting, or the part of a run, that would read it.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any, cast

from hf_distill.data.hint_collator import hint_collator_behind
from hf_distill.data.token_weights import TokenWeightsConfig
from hf_distill.losses import ClipConfig, ContrastConfig, HiddenConfig
from hf_distill.monitoring.watchdog import WatchdogConfig
from hf_distill.rollouts.config import RolloutConfig
from hf_distill.run import Run
from hf_distill.teachers import ModelTeacher, SelfTeacher, SelfTeacherConfig, Teacher
from hf_distill.trainers import config_schedules
from hf_distill.trainers.distill_config import OF_BUILT_IN, DistillConfig
from hf_distill.trainers.opsd_config import OPSDConfig

logger = logging.getLogger(__name__)

READERS = {"ema_decay": "ema", "lora_scale": "lora_scale"}  # of SelfTeacherConfig's fields

OF_COMPLETIONS = ("teacher_unsure", "too_long", "too_short", "endless", "hint_copied")
OF_KIND = {"teacher_moves": "live", "ema_still": "ema", "ema_same": "ema"}
OF_TEACHER = (
    *OF_BUILT_IN,
    "hidden_layers",
    "hidden_weight",
    "hidden",
    "watchdog",
)

GROUPS = {
    "clip": ClipConfig,
    "hidden": HiddenConfig,
    "watchdog": WatchdogConfig,
}


def warn_of_unread(found: Iterable[str]) -> None:
    """Say what is not read."""
    for text in found:
        logger.warning("a setting is not used: %s", text)


def _changed(settings: Any) -> list[str]:
    """Return the names of a group's fields that differ from their defaults, in order."""
    plain = type(settings)()
    names = sorted(x.name for x in dataclasses.fields(settings))
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def _changed_of(args: DistillConfig, names: Iterable[str]) -> list[str]:
    """Return those of the names whose fields of the config differ from their defaults."""
    plain: dict[str, Any] = {x.name: x.default for x in dataclasses.fields(args)}
    plain |= {name: kind() for name, kind in GROUPS.items()}
    return [name for name in names if getattr(args, name) != plain[name]]


def unread_opsd_settings(args: OPSDConfig, has_environment: bool, own_teacher: bool) -> list[str]:
    """Return what an `OPSDTrainer` does not read of what only it has.

    Args:
        args: of the run.
        has_environment: whether completions are judged.
        own_teacher: whether the teacher is the one that `args.teacher` names.
    """
    rollout = cast(RolloutConfig, args.rollout)
    changed, found = _changed(rollout), []
    if not own_teacher and _changed_of(args, ["teacher"]):
        found.append(f"teacher {args.teacher!r} gives way to the trainer's argument teacher=")
    if not args.on_policy:
        names = [*_changed_of(args, ["max_completion_length"]), *(f"rollout.{x}" for x in changed)]
        found += [f"{name} needs on_policy" for name in names]
    else:
        if "max_turns" in changed and not has_environment:
            found.append("rollout.max_turns needs an environment")
        if "importance_clip" in changed and rollout.steps_per_rollout == 1:
            found.append("rollout.importance_clip needs steps_per_rollout > 1")
    for name in _changed(cast(SelfTeacherConfig, args.self_teacher)):
        if not own_teacher or args.teacher != READERS[name]:
            found.append(f"self_teacher.{name} needs teacher {READERS[name]!r}")
    return found


def unread_without_teacher(args: DistillConfig) -> list[str]:
    """Return what a run without a teacher does not read: all but `TrainingArguments` and alpha."""
    names = _changed_of(args, OF_TEACHER)
    if cast(WatchdogConfig, args.watchdog).action == "off":  # as it is
        names = [name for name in names if name != "watchdog"]
    return [f"{name} needs a teacher" for name in names]


def unread_settings(run: Run) -> list[str]:
    """Return what a run with a teacher does not read of what both trainers have."""
    args = cast(DistillConfig, run.args)
    found = [*(_of_own_loss(args) if run.own_loss else _of_built_in(args, run.teacher))]
    weights = cast(TokenWeightsConfig, args.token_weights)
    if "markers" in _changed(weights) and weights.around_reasoning() is None:
        found.append("token_weights.markers needs a token_weights.reasoning other than 1")
    if "entropy_floor" in _changed(weights) and weights.entropy >= 0:
        found.append("token_weights.entropy_floor needs a token_weights.entropy below 0")
    for name in ("position_floor", "position_middle", "position_width"):
        if name in _changed(weights) and weights.position == "none":
            found.append(f"token_weights.{name} needs a token_weights.position")
    return [*found, *_of_contrast(run), *_of_hidden_layers(args), *_of_watchdog(run)]


def _of_contrast(run: Run) -> Iterator[str]:
    if not isinstance(run.args, OPSDConfig):
        return
    args, collator = run.args, hint_collator_behind(run.collator)
    config = cast(ContrastConfig, args.contrast)
    changed = _changed(config)
    if collator is None or not collator.contrasts:
        names = [*(f"contrast.{x}" for x in changed), *_changed_of(args, ["contrast_weight"])]
        yield from (f"{name} needs a HintCollator with a contrast" for name in names)
        return
    if run.own_loss and config.kind == "target":
        yield "contrast.kind 'target' is read by the built-in losses, not by your own"
    others = {"weight": ("strength", "bound"), "target": ("scale", "threshold")}[config.kind]
    yield from (f"contrast.{x} is of another contrast.kind" for x in others if x in changed)


def _of_own_loss(args: DistillConfig) -> Iterator[str]:
    for name in _changed_of(args, OF_BUILT_IN):
        yield f"{name} is read by the built-in losses, not by your own"


def _of_built_in(args: DistillConfig, teacher: Teacher) -> Iterator[str]:
    clip = cast(ClipConfig, args.clip)
    if _changed_of(args, ["beta"]) and args.divergence not in config_schedules.WITH_BETA:
        readers = ", ".join(map(repr, sorted(config_schedules.WITH_BETA)))
        yield f"beta needs a divergence that has it ({readers}), got {args.divergence!r}"
    # of a teacher that knows some entries, it also says what becomes of the others
    if _changed_of(args, ["missing"]) and args.support == "full" and teacher.dense:
        yield "missing needs a support other than 'full'"
    if "level" in _changed(clip) and clip.bound is None:
        yield "clip.level needs a clip.bound"


def _of_hidden_layers(args: DistillConfig) -> Iterator[str]:
    settings = cast(HiddenConfig, args.hidden)
    if args.hidden_layers is None:
        yield from (f"hidden.{name} needs hidden_layers" for name in _changed(settings))
        if _changed_of(args, ["hidden_weight"]):
            yield "hidden_weight needs hidden_layers"
    elif not (config_schedules.bounds(args, "hidden_weight")[1] or settings.attention_weight):
        yield "hidden_layers needs a hidden_weight or a hidden.attention_weight above 0"


def _of_watchdog(run: Run) -> Iterator[str]:
    settings = cast(WatchdogConfig, run.args.watchdog)
    changed = [name for name in _changed(settings) if name != "action"]
    if settings.action == "off":
        yield from (f"watchdog.{name} needs an action other than 'off'" for name in changed)
        return
    samples = getattr(run.args, "on_policy", False)
    for name in changed:
        if getattr(settings, name) is None:
            continue  # off, as it would be
        if name in OF_COMPLETIONS and not samples:
            yield f"watchdog.{name} needs completions that the student samples"
        elif name == "clipped" and not run.own_loss and run.args.clip.bound is None:
            yield "watchdog.clipped needs a clip.bound"
        elif name in OF_KIND and _kind(run.teacher) != OF_KIND[name]:
            yield f"watchdog.{name} needs a self-teacher {OF_KIND[name]!r}"
        elif name == "teacher_follows" and _kind(run.teacher) not in ("base", "model"):
            yield "watchdog.teacher_follows needs a teacher that is another model, or 'base'"


def _kind(teacher: Teacher) -> str | None:
    if isinstance(teacher, SelfTeacher):
        return teacher.kind
    return "model" if isinstance(teacher, ModelTeacher) else None
