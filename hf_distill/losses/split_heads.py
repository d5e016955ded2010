"""Output heads whose rows lie on several processes, as tensor parallelism leaves them."""

import functools
import logging
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec, Head

logger = logging.getLogger(__name__)


class Heads(NamedTuple):
    """Holds both heads as `linear_divergence` takes them, and its options for them."""

    student: Head
    teacher: Head
    options: dict[str, Any]


@functools.cache
def _say(text: str) -> None:
    logger.info("output heads on several processes: %s", text)


class _Averaged(torch.autograd.Function):
    """Returns its input; the gradient is divided by the number of processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / ctx.processes, None


def _averaged(head: Head, hidden: Tensor, processes: int) -> Head:
    """Return the head as data parallelism wants it.

    It is in the dtype of the hidden states, and its gradients are averaged over the processes.
    """
    weight, bias = (None if x is None else x.to(hidden.dtype) for x in (head.weight, head.bias))
    weight, bias = (None if x is None else _Averaged.apply(x, processes) for x in (weight, bias))
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


def _why_whole(spec: DivergenceSpec, same_rows: bool) -> str | None:
    """Return why heads are joined, or None."""
    if spec.support != "full":
        return f"joined, for the divergence over the entries of {spec.support!r}"
    return None if same_rows else "joined, since student and teacher are cut at other entries"


def split_heads(student: Signal, teacher: Signal, spec: DivergenceSpec) -> Heads:
    """Return the heads of two signals with hidden states: this process's rows, or as they are.

    Args:
        student: with a head.
        teacher: with a head. It is cut as the student's is, where it is whole.
        spec: of the divergence that is to be computed.
    """
    assert student.head is not None
    assert teacher.head is not None
    own = student.head.own_rows()
    if own is None:
        return Heads(student.head, teacher.head, {})
    shared = teacher.head.same_as(student.head)
    other = own if shared else teacher.head.own_rows(student.head)
    why = _why_whole(spec, other is not None and other.rows == own.rows)
    if why is not None or other is None:
        _say(why or "joined")
        return Heads(student.head, teacher.head, {})
    _say("in pieces; sums over the vocabulary are exchanged")
    options = {"group": own.group, "own_tokens": student.own_tokens}
    if not student.own_tokens:
        return Heads(own.head, own.head if shared else other.head, options)
    sides = [(own.head, student.hidden)] + [(other.head, teacher.hidden)] * (not shared)
    heads = [_averaged(head, cast(Tensor, x), own.group.size()) for head, x in sides]
    return Heads(heads[0], heads[-1], options)


def joined(head: Head) -> Head:
    """Return the head whole, for a loss that reads the logits of a token; a log line says so."""
    if head.own_rows() is not None:
        _say("joined, for what reads whole logits of a token")
    return head.gathered()
