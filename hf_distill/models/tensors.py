"""Tensors of a file, which must be those that a run has."""

from collections.abc import Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]


def assert_same_tensors(path: str, found: Tensors, wanted: Tensors) -> None:
    """Check that a file of a checkpoint is of a run like this one.

    Args:
        path: of the file.
        found: what is in it.
        wanted: what the run has, by name.

    Raises:
        ValueError: names or shapes differ.
    """
    reason = _difference(found, wanted)
    if reason is not None:
        raise ValueError(
            f"{path} is of another run: {reason}; resume with the student, the teacher and the "
            "layers of that run, or start anew"
        )


def _difference(found: Tensors, wanted: Tensors) -> str | None:
    missing, others = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or others:
        return (
            f"it lacks {len(missing)} of {len(wanted)} tensors{_first(missing)}, and has "
            f"{len(others)} that this run does not have{_first(others)}"
        )
    for name, here in sorted(wanted.items()):
        there = found[name]
        if there.shape != here.shape:
            return f"{name} has the shape {list(there.shape)} there and {list(here.shape)} here"
    return None


def _first(names: set[str]) -> str:
    return f" ({min(names)})" if names else ""
