"""Compares hidden states, a block of rows at a time, exactly also where both sides agree.

Shapes: n rows, H hidden. With d = s - t the mean square is sum(d^2) / H. The cosine distance is
1 - u.v with u = s / a, v = t / b, a = max(|s|, NORM_MIN), b = max(|t|, NORM_MIN), which is

    (|u - v|^2 + (1 - |u|^2) + (1 - |v|^2)) / 2,

where the last two terms are zero but for rows shorter than NORM_MIN: a sum of what is not negative.
u - v = w / a, where lengths within a factor of two of each other give w = d - k t, with
k = (a - b) / b and a - b = d.(s + t) / (a + b): every error is then one of d, not of s. Otherwise
w = s - (a / b) t. The gradient is (w - loss s) / a^2; for a shorter s, whose a is constant, it is
-t / (a b).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.reference import NORM_MIN


class _Mix(NamedTuple):
    """Stands for a row made of s, d and t: s * of_s + d * of_d + t * of_t, the factors [n, 1]."""

    of_s: Tensor
    of_d: Tensor
    of_t: Tensor

    def of(self, s: Tensor, d: Tensor, t: Tensor) -> Tensor:
        return (s * self.of_s).addcmul_(d, self.of_d).addcmul_(t, self.of_t)


def _mse(s: Tensor, t: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    d = s - t
    loss = d.square().mean(-1)
    if factor is None:
        return loss, None
    return loss, d.mul_((factor * (2.0 / s.shape[-1]))[:, None])


def _short(norm: Tensor) -> Tensor:
    """Compute 1 - |u|^2 of rows of length `norm`."""
    ratio = norm / NORM_MIN
    return torch.where(norm < NORM_MIN, (1 - ratio) * (1 + ratio), 0.0)


def _cosine(s: Tensor, t: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    d = s - t
    s_norm, t_norm = (x.square().sum(-1, keepdim=True).sqrt_() for x in (s, t))
    a, b = s_norm.clamp_min(NORM_MIN), t_norm.clamp_min(NORM_MIN)
    # of clamped lengths the difference is that of numbers, not of rows
    longer = (s_norm >= NORM_MIN) & (t_norm >= NORM_MIN)
    apart = torch.where(longer, (d * (s + t)).sum(-1, keepdim=True) / (a + b), a - b)
    near = (a <= 2 * b) & (b <= 2 * a)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    w = _Mix(
        torch.where(near, zero, one),
        torch.where(near, one, zero),
        torch.where(near, -apart / b, -a / b),
    )
    square = w.of(s, d, t).div_(a).square_().sum(-1, keepdim=True)
    loss = (square + _short(s_norm) + _short(t_norm)) / 2
    if factor is None:
        return loss[:, 0], None
    constant = s_norm < NORM_MIN
    slope = _Mix(
        torch.where(constant, 0.0, w.of_s - loss),
        torch.where(constant, 0.0, w.of_d),
        torch.where(constant, -a / b, w.of_t),
    )
    # one division after the other: a^2 may be too small or too large for its type
    scale = factor[:, None] / a
    return loss[:, 0], slope.of(s / a, d / a, t / a).mul_(scale)


def compare_hidden_states(
    s: Tensor, t: Tensor, kind: str, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the loss [n], and factor [n] * its gradient for s [n, H] if given; one dtype."""
    return (_mse if kind == "mse" else _cosine)(s, t, factor)
