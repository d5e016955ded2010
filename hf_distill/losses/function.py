"""A loss from a function of logits."""

from collections.abc import Callable

from torch import Tensor

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


def as_loss(loss: Loss | LossFunction) -> Loss:
    """Return a `Loss` as it is, or make one from a function of logits.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            "loss must be a function of (student_logits, teacher_logits, targets) or an instance "
            f"of a subclass of hf_distill.losses.Loss, got {loss!r}"
        )
    return FunctionLoss(loss)
