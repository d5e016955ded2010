"""Computes sums and gradients of rows of which only some columns are here, in PyTorch.

Implements `split.SplitKernels`, whose docstrings hold: a few rows at a time, by the short paths of
`full`, and by the exact terms where there is none or a whole row's loss is too small for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.full import ShortPath, doubtful, short_path
from metal_ops.backends.blocks.rows import (
    AGREEMENT,
    CLIPPED,
    H_SUM,
    LOSS,
    NUM_VALUES,
    P_ENTROPY,
    Q_ENTROPY,
    Buffers,
    HardTerm,
    LoadedRows,
    Wanted,
    accumulator,
    bounded_terms,
    scale_gradient,
)
from metal_ops.backends.blocks.sizes import RowBlocks, rows_per_block
from metal_ops.backends.blocks.terms import MIXTURES, Probabilities
from metal_ops.spec import DivergenceSpec

# Behind the values of a row are its normalisers, for `backward`, and how its sums were taken: by
# the short path, by the terms, or by these with h in the place of the teacher's logits.
HOW = NUM_VALUES + 4
SHORT, EXACT, REPLACED = 0.0, 1.0, 2.0


def _blocks(rows: Tensor) -> RowBlocks:
    return RowBlocks(rows, None, rows.shape[-1])


def _times(e: Tensor, log: Tensor) -> Tensor:
    """Sum e * log over columns, with 0 * -inf = 0."""
    return (e * log).masked_fill_(e == 0, 0.0).sum(-1)


class _Loaded(NamedTuple):
    """Holds a block of rows, normalised, and their terms; [rows, v] each."""

    row: Probabilities
    log_p: Tensor  # empty where logs are not wanted, as those of `row`
    f: Tensor
    h: Tensor
    over: Tensor | None  # entries that are cut


def _softmax(x: Tensor, top: Tensor, total: Tensor, inv_t: float) -> tuple[Tensor, Tensor]:
    """Return logits [rows, v] less their row's largest, over the temperature, and the softmax."""
    x = (x.to(top.dtype) - top).mul_(inv_t)
    return x, x.exp().div_(total)


def _load(x: Tensor, y: Tensor, normalisers: Tensor, spec: DivergenceSpec, logs: bool) -> _Loaded:
    """Normalise logits of a block, relative to each row's largest, so that constants cancel."""
    x_top, x_sum, y_top, y_sum = normalisers[..., None].unbind(0)
    x, q = _softmax(x, x_top, x_sum, 1 / spec.temperature)
    y, p = _softmax(y, y_top, y_sum, 1 / spec.temperature)
    log_q, log_p, ratio = q[:0], p[:0], p[:0]
    if spec.kind not in MIXTURES:
        ratio = (y - x).sub_((y_sum / x_sum).log_()).masked_fill_((p == 0) & (q == 0), 0.0)
    if logs or spec.kind == "soft_ce":
        log_q, log_p = x.sub_(x_sum.log()), y.sub_(y_sum.log())
    row = Probabilities(p, q, log_q, ratio)
    return _Loaded(row, log_p, *bounded_terms(row, spec))


def _add_statistics(
    x: Tensor,
    y: Tensor,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    values: Tensor,
    at: slice | Tensor,
) -> None:
    """Write entropies, from (q, log q), and whether the largest are in common, of a block."""
    shared = (x == values[NUM_VALUES, at, None]) & (y == values[NUM_VALUES + 2, at, None])
    values[Q_ENTROPY, at], values[P_ENTROPY, at] = -_times(*student), -_times(*teacher)
    values[AGREEMENT, at] = shared.any(-1).to(values.dtype)


class _Short:
    """Takes blocks by their short path, on buffers, relative to each row's largest."""

    def __init__(
        self, student: Tensor, teacher: Tensor, normalisers: Tensor, spec: DivergenceSpec
    ) -> None:
        path, self.spec, (rows, vocab) = short_path(spec), spec, student.shape
        assert path is not None
        self.path, self.pair = path, (student, teacher)
        self.buffers = Buffers.of(student, min(rows_per_block(student, vocab), rows), vocab)
        self.normalisers = normalisers[..., None]

    def load(self, at: slice | Tensor, logs: bool) -> LoadedRows:
        """Load rows, and keep the logs where the path, or the caller, needs them."""
        x_top, x_sum, y_top, y_sum = self.normalisers[:, at]
        x, y = (side[at] for side in self.pair)
        log_q, log_p, q, p, _ = buffers = self.buffers.first(len(x))
        if not logs and self.spec.kind in MIXTURES:
            log_q, log_p = q, p
        for side, top, log, e in ((x, x_top, log_q, q), (y, y_top, log_p, p)):
            torch.sub(side, top, out=log)
            if self.spec.temperature != 1.0:
                log.mul_(1 / self.spec.temperature)
            torch.exp(log, out=e)
        if self.spec.kind == "soft_ce":  # whose path adds the log of the sum, once a row
            log_q.sub_(x_sum.log())
            q.div_(x_sum)
            x_sum = torch.ones_like(x_sum)
        return LoadedRows(buffers, log_q, x_sum, log_p, y_sum)

    def loss(self, loaded: LoadedRows) -> ShortPath:
        """Take the sums of loaded rows, with as much of the offset as they have of p."""
        p, offset = loaded.buffers.p, (loaded.p_sum / loaded.q_sum).log_()
        return self.path(loaded, offset * p.sum(-1, keepdim=True) / loaded.p_sum, self.spec)

    def gradient(self, at: slice | Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of rows, and a buffer of as many."""
        loaded = self.load(at, False)
        out = loaded.buffers.spare
        found = self.path(loaded, torch.zeros_like(loaded.q_sum), self.spec, want_loss=False)
        found.gradient(mean, factor, out)
        return out, loaded.buffers.q


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
        self,
        student: Tensor,
        teacher: Tensor,
        normalisers: Tensor,
        spec: DivergenceSpec,
        wanted: Wanted,
    ) -> Tensor:
        values = normalisers.new_zeros(HOW + 1, len(student))
        values[NUM_VALUES:HOW] = normalisers  # for `backward`
        if wanted.exact or short_path(spec) is None:
            # h is not rounded to 16 bits
            replace = wanted.gradient and teacher.dtype == normalisers.dtype
            values[HOW] = REPLACED if replace else EXACT
            self._exact_sums(student, teacher, values, spec, wanted.stats)
            return values
        short = _Short(student, teacher, normalisers, spec)
        for at in _blocks(student):
            loaded = short.load(at, wanted.stats)
            if wanted.stats:
                (_, _, q, p, _), log_q, q_sum, log_p, p_sum = loaded
                own, other = (q / q_sum, log_q - q_sum.log()), (p / p_sum, log_p - p_sum.log())
                _add_statistics(student[at], teacher[at], own, other, values, at)
            found = short.loss(loaded)
            values[LOSS, at], values[H_SUM, at] = found.loss[:, 0], found.mean[:, 0]
        return values

    def _exact_sums(
        self, student: Tensor, teacher: Tensor, values: Tensor, spec: DivergenceSpec, stats: bool
    ) -> None:
        for at in _blocks(student):
            x, y = student[at], teacher[at]
            found = _load(x, y, values[NUM_VALUES:HOW, at], spec, stats)
            values[LOSS, at], values[H_SUM, at] = found.f.sum(-1), found.h.sum(-1)
            if stats:
                row = found.row
                _add_statistics(x, y, (row.q, row.log_q), (row.p, found.log_p), values, at)
            if found.over is not None:
                values[CLIPPED, at] = found.over.any(-1).to(values.dtype)
            if values[HOW, 0] == REPLACED:
                teacher[at] = found.h

    def again(self, values: Tensor, normalisers: Tensor, spec: DivergenceSpec) -> Tensor | None:
        if short_path(spec) is None or not values.shape[1]:
            return None
        offset = (normalisers[3] / normalisers[1]).log_()
        return doubtful(values[LOSS, :, None], offset[:, None])

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
        exact = values[HOW] != SHORT
        for at in RowBlocks(student, exact, student.shape[-1]):
            grad = self._exact_gradient(student[at], teacher[at], values[:, at], spec)
            grad = scale_gradient(grad, factor[at])
            _add_hard(grad, student[at], hard, at, torch.empty_like(grad))
            out[at] = grad.to(out.dtype)
        if exact.all():
            return
        short = _Short(student, teacher, values[NUM_VALUES:HOW], spec)
        for at in RowBlocks(student, ~exact, student.shape[-1]):
            grad, spare = short.gradient(at, values[H_SUM, at, None], factor[at, None])
            _add_hard(grad, student[at], hard, at, spare)
            out[at] = grad.to(out.dtype)

    def _exact_gradient(self, x: Tensor, y: Tensor, values: Tensor, spec: DivergenceSpec) -> Tensor:
        """Form h - q H_SUM; `y` may be h."""
        if values[HOW, 0] == REPLACED:
            top, total = values[NUM_VALUES : NUM_VALUES + 2, :, None]
            q, h = _softmax(x, top, total, 1 / spec.temperature)[1], y
        else:
            found = _load(x, y, values[NUM_VALUES:HOW], spec, False)
            q, h = found.row.q, found.h
        return h - q.mul_(values[H_SUM, :, None])


def _add_hard(
    grad: Tensor, logits: Tensor, hard: HardTerm | None, at: slice | Tensor, spare: Tensor
) -> None:
    """Add share * (softmax - 1 at the label) to a block's gradient."""
    if hard is None:
        return
    share, labels, width = hard.share[at, None], hard.labels[at], logits.shape[-1]
    torch.sub(logits, hard.log_sum[at, None], out=spare)
    grad.addcmul_(spare.exp_(), share)
    mine = ((labels >= 0) & (labels < width))[:, None]
    places = labels.clamp(0, width - 1)[:, None]
    grad.scatter_add_(-1, places, torch.where(mine, -share, 0.0))


assert CLIPPED == NUM_VALUES - 1
COLUMNS = _TorchColumns()
