"""Computes sums and gradients of rows of which only some columns are here, in PyTorch.

Implements `split.SplitKernels`, whose docstrings hold: a few rows at a time, by the exact terms.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.rows import (
    CLIPPED,
    LOSS,
    NUM_VALUES,
    HardTerm,
    accumulator,
    bounded_terms,
    scale_gradient,
)
from metal_ops.backends.blocks.sizes import RowBlocks
from metal_ops.backends.blocks.terms import Probabilities
from metal_ops.spec import DivergenceSpec


def _blocks(rows: Tensor) -> RowBlocks:
    return RowBlocks(rows, None, rows.shape[-1])


def _times(e: Tensor, log: Tensor) -> Tensor:
    """Sum e * log over columns, with 0 * -inf = 0."""
    return (e * log).masked_fill_(e == 0, 0.0).sum(-1)


class _Loaded(NamedTuple):
    """Holds a block of rows, normalised, and their terms; [rows, v] each."""

    row: Probabilities
    log_p: Tensor
    f: Tensor
    h: Tensor
    over: Tensor | None  # entries that are cut
    share_largest: Tensor


def _load(x: Tensor, y: Tensor, normalisers: Tensor, spec: DivergenceSpec) -> _Loaded:
    """Normalise logits of a block, relative to each row's largest, so that constants cancel."""
    inv_t, dtype = 1 / spec.temperature, normalisers.dtype
    x_top, x_sum, y_top, y_sum = normalisers[..., None].unbind(0)
    x, y = x.to(dtype), y.to(dtype)
    share_largest = (x == x_top) & (y == y_top)
    x, y = (x - x_top).mul_(inv_t), (y - y_top).mul_(inv_t)
    q, p = x.exp().div_(x_sum), y.exp().div_(y_sum)
    ratio = (y - x).sub_((y_sum / x_sum).log_()).masked_fill_((p == 0) & (q == 0), 0.0)
    log_q, log_p = x.sub_(x_sum.log()), y.sub_(y_sum.log())
    row = Probabilities(p, q, log_q, ratio)
    f, h, over = bounded_terms(row, spec)
    return _Loaded(row, log_p, f, h, over, share_largest)


class _TorchColumns:
    """Implements `split.SplitKernels`."""

    def normalisers(self, student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
        dtype = accumulator(student)
        found = student.new_empty(4, len(student), dtype=dtype)
        for at in _blocks(student):
            for k, side in enumerate((student, teacher)):
                x = side[at].to(dtype)
                top = x.amax(-1).clamp_min_(torch.finfo(dtype).min)
                found[2 * k, at] = top
                e = (x - top[:, None]).mul_(1 / spec.temperature).exp_()
                found[2 * k + 1, at] = e.sum(-1)
        return found

    def log_sum(self, logits: Tensor) -> Tensor:
        found = logits.new_empty(len(logits), dtype=accumulator(logits))
        for at in _blocks(logits):
            found[at] = logits[at].to(found.dtype).logsumexp(-1)
        return found

    def sums(
        self, student: Tensor, teacher: Tensor, normalisers: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        values = normalisers.new_zeros(NUM_VALUES + 4, len(student))
        values[NUM_VALUES:] = normalisers  # for `backward`
        for at in _blocks(student):
            found = _load(student[at], teacher[at], normalisers[:, at], spec)
            row = found.row
            each = [found.f.sum(-1), found.h.sum(-1)]
            each += [torch.zeros_like(each[0])] * 2  # the log-sums
            each += [-_times(row.q, row.log_q), -_times(row.p, found.log_p)]
            each.append(found.share_largest.any(-1))
            if found.over is not None:
                each.append(found.over.any(-1))
            values[LOSS : LOSS + len(each), at] = torch.stack([x.to(values.dtype) for x in each])
        return values

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        factor: Tensor,
        values: Tensor,
        spec: DivergenceSpec,
        hard: HardTerm | None,
        out: Tensor,
    ) -> None:
        for at in _blocks(student):
            x = student[at]
            found = _load(x, teacher[at], values[NUM_VALUES:, at], spec)
            grad = found.h - found.row.q * values[1, at, None]
            grad = scale_gradient(grad, factor[at])
            if hard is not None:
                self._add_hard(grad, x, hard, at)
            out[at] = grad.to(out.dtype)

    def _add_hard(self, grad: Tensor, logits: Tensor, hard: HardTerm, at: slice | Tensor) -> None:
        """Add share * (softmax - 1 at the label) to a block's gradient."""
        share, labels, width = hard.share[at, None], hard.labels[at], logits.shape[-1]
        grad.addcmul_((logits.to(grad.dtype) - hard.log_sum[at, None]).exp_(), share)
        mine = ((labels >= 0) & (labels < width))[:, None]
        places = labels.clamp(0, width - 1)[:, None]
        grad.scatter_add_(-1, places, torch.where(mine, -share, 0.0))


assert CLIPPED == NUM_VALUES - 1
COLUMNS = _TorchColumns()
