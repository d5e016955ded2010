"""A loss from a function of logits."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_distill.losses.base import Loss, PerToken

LossFunction = Callable[[Tensor, Tensor, Tensor], PerToken]


class FunctionLoss(Loss):
    """Computes a function of (student_logits, teacher_logits, targets), see `Loss.per_token`."""

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def per_token(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
    ) -> PerToken:
        """Return what the function returns."""
        return self.function(student_logits, teacher_logits, targets)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _takes_three(function: Callable[..., Any]) -> bool:
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)
    except ValueError:
        return True  # it is not known
    try:
        signature.bind(None, None, None)
    except TypeError:
        return False
    return True


def as_loss(loss: Loss | LossFunction) -> Loss:
    """Return a `Loss` as it is, or make one from a function of logits.

    Raises:
        TypeError: it is neither, or the function does not take these three.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type) or not callable(loss) or not _takes_three(loss):
        raise TypeError(
            "loss must be a function f(student_logits, teacher_logits, targets) -> [n], of logits "
            "[n, V] twice and ids [n], or an instance of a subclass of hf_distill.losses.Loss, got "
            f"{loss!r}"
        )
    return FunctionLoss(loss)
