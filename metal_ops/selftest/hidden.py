"""Compares hidden states in exact numbers, for the rule of `numerics`.

The cosine distance is one less a product: by this definition, which the ops avoid, with the
products and their sums exact and the rest in fifty digits. N rows, H hidden.
"""

import decimal
import math
from decimal import Decimal

import torch
from torch import Tensor

from metal_ops.reference import NORM_MIN
from metal_ops.selftest.numerics import C, Exact

DIGITS = 50
Two = tuple[Tensor, Tensor]  # a number as the sum of two


def _two_sum(a: Tensor, b: Tensor) -> Two:
    """Compute a + b exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _halves(a: Tensor) -> Two:
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high


def _two_product(a: Tensor, b: Tensor) -> Two:
    """Compute a * b exactly (Dekker)."""
    product, (a1, a2), (b1, b2) = a * b, _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _dot(x: Tensor, y: Tensor) -> Decimal:
    """Compute the product of two rows, to twice float64's digits."""
    terms = torch.cat(_two_product(x, y)).tolist()
    total = math.fsum(terms)
    return Decimal(total) + Decimal(math.fsum([*terms, -total]))


def _scaled(x: Tensor, factor: Decimal) -> Two:
    high = float(factor)
    low = float(factor - Decimal(high))
    product, rest = _two_product(x, torch.full_like(x, high))
    return product, rest + low * x


def _cosine(s: Tensor, t: Tensor) -> tuple[float, Tensor]:
    """Compute the distance of a row [H], and its gradient [H] for s."""
    least = Decimal(NORM_MIN)
    length = _dot(s, s).sqrt()
    a, b = max(length, least), max(_dot(t, t).sqrt(), least)
    cosine = _dot(s, t) / (a * b)
    turn = cosine / (a * a) if length >= least else Decimal(0)  # a is constant below
    (x, x_rest), (y, y_rest) = _scaled(s, turn), _scaled(t, -1 / (a * b))
    total, rest = _two_sum(x, y)
    return float(1 - cosine), total + (rest + (x_rest + y_rest))


def _sizes(s: Tensor, t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute magnitudes of the cosine distance [N] and of its gradient [N, H]; float64.

    s / a - t / b = w / a; of lengths within a factor of two an entry of w is a difference d = s - t
    and a multiple of t by at most |d| / b, of others it is s less (a / b) t.
    """
    d, lengths = s - t, [x.norm(dim=-1, keepdim=True) for x in (s, t)]
    a, b = (x.clamp_min(NORM_MIN) for x in lengths)
    short = [x < NORM_MIN for x in lengths]
    near = (a <= 2 * b) & (b <= 2 * a) & (short[0] == short[1])
    w = (s - a / b * t).abs()
    size = torch.where(
        near,
        d.abs() + d.norm(dim=-1, keepdim=True) / b * t.abs(),
        s.abs() + a / b * t.abs(),
    )
    # w may be all rounding, where its square is what is left
    loss = ((w + C * eps * size) * size / a / a).sum(-1, keepdim=True)
    loss = loss + short[0].double() + short[1].double()
    gradient = torch.where(short[0], t.abs() / b / a, (size + loss * s.abs()) / a / a)
    return loss[:, 0], gradient


def exact_hidden(student: Tensor, teacher: Tensor, kind: str) -> Exact:
    """Compute value and gradient of [N, H] hidden states."""
    s, t = student.detach().double(), teacher.double()
    if kind == "mse":
        d = s - t
        loss, grad = d.square().mean(-1), 2 * d / s.shape[-1]
        return Exact(loss, grad, loss, grad.abs(), torch.zeros_like(loss))
    with decimal.localcontext(decimal.Context(prec=DIGITS)):
        rows = [_cosine(x, y) for x, y in zip(s, t, strict=True)]
    loss = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    grad = torch.stack([row for _, row in rows]) if rows else s
    wide = torch.float64 in (student.dtype, teacher.dtype)
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    return Exact(loss, grad, *_sizes(s, t, eps), torch.zeros_like(loss))
