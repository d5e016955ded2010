"""Settings that a run does not read: they are named instead of being ignored in silence."""

import dataclasses
from typing import Any, cast

from hf_distill.trainers.configs import DistillConfig, OPSDConfig
from hf_distill.trainers.groups import RolloutConfig, SelfTeacherConfig, TokenWeightsConfig

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
