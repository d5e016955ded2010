"""The logarithm of a mean of probabilities, of values that come one after another."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_distill.losses.chunks import at_least_float32


class LogMean:
    """Computes log(1/K sum_k exp(x_k)) of K tensors, of which two exist at a time.

    The running maximum is taken off before exp, so that nothing overflows, and K equal values give
    exactly that value. -inf is a probability of 0.
    """

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._sum: Tensor = torch.empty(0)  # of exp(x - largest)
        self._count: Tensor | int = 0

    def add(self, values: Tensor, absent: Tensor | None = None) -> None:
        """Add the next values.

        Args:
            values: of one shape in all calls, [N] or [N, V]; float.
            absent: [N] bool, rows that have none here. The first values have all rows.
        """
        if self._largest is None:
            self._largest, self._sum, self._count = values, torch.ones_like(values), 1
            return
        here: Tensor | int = 1
        if absent is not None:
            rows = absent.view(-1, *[1] * (values.ndim - 1))
            values, here = values.masked_fill(rows, -torch.inf), (~rows).to(values.dtype)
        largest = torch.maximum(self._largest, values)
        scaled = self._sum * _ratio(self._largest, largest)
        self._sum = scaled.add_(_ratio(values, largest))
        self._largest, self._count = largest, self._count + here

    def value(self) -> Tensor:
        """Return the logarithm of the mean, of the shape of the values.

        Raises:
            ValueError: there are no values.
        """
        if self._largest is None:
            raise ValueError("a mean needs values, got none")
        return self._largest + (self._sum / self._count).log_()


def mean_log_probs(contexts: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the log of the mean probability of contexts, which come one by one.

    Args:
        contexts: logits [N, V] of each, and `absent` [N] or None as in `LogMean.add`.

    Returns:
        [N, V] float32 (float64 for float64 logits).
    """
    mean = LogMean()
    for logits, absent in contexts:
        mean.add(at_least_float32(logits).log_softmax(-1), absent)
    return mean.value()


def _ratio(values: Tensor, largest: Tensor) -> Tensor:
    """Return exp(values - largest), which is 1 where they are equal, infinite ones too."""
    return torch.where(values == largest, 0.0, values - largest).exp_()
