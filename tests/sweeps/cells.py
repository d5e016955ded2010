"""What one trial found: right, a clear error, wrong, or that there was nothing to try."""

import math
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hf_distill
import metal_ops

RIGHT, CLEAR, WRONG, NONE = "right", "clear error", "wrong", "-"
PACKAGES = tuple(Path(str(x.__file__)).parent for x in (hf_distill, metal_ops))
SUBJECTS = ("model", "student", "teacher", "adapter")  # what an error must be about

EPS = torch.finfo(torch.float32).eps
# The mean of some twenty float32 losses, of logits that padding has summed in another order
LOSS = 16 * EPS
# A gradient is a sum of as many terms as there are positions, of either sign, which may cancel:
# it is compared with the largest gradient of the model, and so many roundings are allowed
GRADIENT = 256 * EPS
# Logits go through the same sums, but nothing makes their mean
LOGITS = 64 * EPS


class Cell(NamedTuple):
    """A verdict and what was measured, or the error's text."""

    verdict: str
    text: str = ""


def measured(off: float, tolerance: float, text: str = "") -> Cell:
    """Right where a deviation is within its tolerance; NaN is not."""
    return Cell(RIGHT if off <= tolerance else WRONG, text or f"{off:.0e}")


def worst(*cells: Cell) -> Cell:
    """The first of the worst of several."""
    order = (WRONG, CLEAR, RIGHT, NONE)
    return min(cells, key=lambda cell: order.index(cell.verdict))


def is_clear(error: BaseException, names: tuple[str, ...]) -> bool:
    """Whether an error is the project's own, a ValueError that says whose fault it is.

    Args:
        error: what was raised.
        names: of the model's classes.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = any(Path(frames[-1].filename).is_relative_to(package) for package in PACKAGES)
    text = str(error)
    named = any(word in text for word in (*SUBJECTS, *names))
    return isinstance(error, ValueError) and own and named and len(text) >= 40


def of_error(error: BaseException, names: tuple[str, ...] = ()) -> Cell:
    """The cell of a trial that raised."""
    text = " ".join(str(error).split())
    if is_clear(error, names):
        return Cell(CLEAR, text)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return Cell(WRONG, f"{type(error).__name__}: {text[:300]} ({place})")


def tried(
    trial: Callable[[], Cell],
    names: tuple[str, ...] = (),
    plain: Callable[[], Any] | None = None,
) -> Cell:
    """The cell of a trial, whatever happens in it.

    Args:
        trial: gives the cell.
        names: of the model's classes, which a clear error may name.
        plain: the same by Transformers alone. Where that raises the same, there is nothing to try.
    """
    try:
        return trial()
    except Exception as error:  # a trial may fail in any way: that is its finding
        cell = of_error(error, names)
        if cell.verdict == WRONG and plain is not None and _raises(plain, type(error)):
            return Cell(NONE, f"Transformers: {cell.text}")
        return cell


def _raises(call: Callable[[], Any], kind: type[BaseException]) -> bool:
    try:
        call()
    except Exception as error:  # any: what counts is whether it is the same
        return type(error) is kind
    return False


def relative(got: float, expected: float) -> float:
    """How far a loss is off, as a share of it; below 1 nat, in nats."""
    return abs(got - expected) / max(1.0, abs(expected))


def furthest(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, as a share of the largest gradient."""
    largest = max((float(x.abs().max()) for x in expected.values()), default=0.0)
    off = 0.0
    for name in got.keys() | expected.keys():
        mine, theirs = got.get(name), expected.get(name)
        gap = [x for x in (mine, theirs) if x is not None]
        difference = (gap[0] - gap[1] if len(gap) == 2 else gap[0]).abs().max()
        off = max(off, float(difference)) if not math.isnan(float(difference)) else math.nan
        if math.isnan(off):
            return off
    return off / max(largest, torch.finfo(torch.float32).tiny)


def as_json(cells: Mapping[str, Cell]) -> dict[str, Any]:
    """Cells as lists of strings."""
    return {name: list(cell) for name, cell in cells.items()}
