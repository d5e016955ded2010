"""Differences of hidden states in exact numbers, for the rule of `numerics`.

By the definition, in fifty decimal digits: no formula is shared with the ops, and near-identical
rows lose nothing. N rows, H hidden.
"""

import decimal
from decimal import Decimal

import torch
from torch import Tensor

from metal_ops.reference import NORM_MIN
from metal_ops.selftest.numerics import C, Exact

DIGITS = 50


def _decimals(row: Tensor) -> list[Decimal]:
    return [Decimal(x) for x in row.double().tolist()]


def _dot(x: list[Decimal], y: list[Decimal]) -> Decimal:
    return sum((a * b for a, b in zip(x, y, strict=True)), Decimal(0))


def _mse(s: list[Decimal], t: list[Decimal]) -> tuple[Decimal, list[Decimal]]:
    d = [a - b for a, b in zip(s, t, strict=True)]
    return _dot(d, d) / len(s), [2 * x / len(s) for x in d]


def _cosine(s: list[Decimal], t: list[Decimal]) -> tuple[Decimal, list[Decimal]]:
    least = Decimal(NORM_MIN)
    length = _dot(s, s).sqrt()
    a, b = max(length, least), max(_dot(t, t).sqrt(), least)
    cosine = _dot(s, t) / (a * b)
    turn = cosine / (a * a) if length >= least else Decimal(0)  # a is constant below
    return 1 - cosine, [turn * x - y / (a * b) for x, y in zip(s, t, strict=True)]


def _sizes(s: Tensor, t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Magnitudes of the cosine distance [N] and of its gradient [N, H]; float64.

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
    """Value and gradient of [N, H] hidden states."""
    rows = []
    with decimal.localcontext(decimal.Context(prec=DIGITS, Emin=-9999, Emax=9999)):
        for s, t in zip(student, teacher, strict=True):
            loss, grad = (_mse if kind == "mse" else _cosine)(_decimals(s), _decimals(t))
            rows.append((float(loss), [float(x) for x in grad]))
    loss = torch.tensor([x for x, _ in rows], dtype=torch.float64)
    grad = torch.tensor([x for _, x in rows], dtype=torch.float64).reshape(student.shape)
    if kind == "mse":
        sizes = loss, grad.abs()
    else:
        wide = torch.float64 in (student.dtype, teacher.dtype)
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
        sizes = _sizes(student.double(), teacher.double(), eps)
    return Exact(loss, grad, *sizes, torch.zeros_like(loss))
