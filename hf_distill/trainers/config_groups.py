"""Settings that belong together, as one field of a config: a dataclass, a mapping or JSON text."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

Group = TypeVar("Group")

EXAMPLES = {
    "clip": '{"bound": 0.5}',
    "contrast": '{"kind": "target"}',
    "hidden": '{"loss": "cosine"}',
    "rollout": '{"temperature": 1.0}',
    "self_teacher": '{"ema_decay": 0.99}',
    "taid": '{"t_start": 0.4}',
    "token_weights": '{"number": 2.0}',
    "watchdog": '{"action": "off"}',
}
"""Mappings by the config's field, for errors."""


def as_group(name: str, kind: type[Group], value: Any) -> Group:
    """Make the group from what a script, a YAML file or a command line gives.

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
            raise ValueError(
                f"{name} must be a JSON object such as {EXAMPLES[name]}, got {value!r}: {error}"
            ) from error
    if isinstance(value, kind):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a {kind.__name__} or a mapping such as {EXAMPLES[name]}, got {value!r}"
        )
    given = dict(value or {})
    known = [x.name for x in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; it has {', '.join(known)}")
    return kind(**given)


def as_optional_group(name: str, kind: type[Group], value: Any) -> Group | None:
    """Do as `as_group`, for a group that is off if it is None (or "null"), on if it is {}."""
    if value is None or (isinstance(value, str) and value.strip() == "null"):
        return None
    return as_group(name, kind, value)
