"""What a signal without gradient keeps of its head: the parameter, its value now, or a copy."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from hf_distill.models.signals import Signal
from metal_ops.functional import is_dtensor


def same(signal: Signal) -> Signal:
    """Return the signal with the parameter itself."""
    return signal


def headless(signal: Signal) -> Signal:
    """Return the signal without its head, which is whole inside of the head's call only."""
    return replace(signal, head=None)


def _value(x: Tensor) -> Tensor:
    """Return the value that a parameter has now; of one in pieces the memory is written to."""
    return x.detach().clone() if is_dtensor(x) else x.detach()


def frozen(signal: Signal, keep: Callable[[Tensor], Tensor] = _value) -> Signal:
    """Return the signal with the values that its head has now."""
    head = signal.head
    if head is None:
        return signal
    bias = None if head.bias is None else keep(head.bias)
    return replace(signal, head=replace(head, weight=keep(head.weight), bias=bias))


def copied(signal: Signal) -> Signal:
    """Return the signal with a copy of its head: the engine uses the memory again."""
    return frozen(signal, lambda x: x.detach().clone())
