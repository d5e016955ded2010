"""Holds what every divergence of a block shares: loading, exact terms, clips, statistics."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metal_ops.backends.blocks.terms import MIXTURES, Mix, Probabilities, terms
from metal_ops.spec import DivergenceSpec

NUM_BUFFERS = 5
NUM_STATS = 4  # student entropy, teacher entropy, top-1 agreement, clipped
# What kernels return for each row, in this order.
LOSS, H_SUM, Q_LOG_SUM, P_LOG_SUM, Q_ENTROPY, P_ENTROPY, AGREEMENT, CLIPPED = range(8)
NUM_VALUES = 8
# Between these a sum of exponentials needed no shift by the largest: nothing has overflowed, and
# what underflowed is 15 orders of magnitude below the largest, or more.
MODERATE = (math.exp(-40.0), math.exp(40.0))


class HardTerm(NamedTuple):
    """Holds cross-entropy's part of a gradient: share * (softmax(logits) - 1 at the label)."""

    labels: Tensor  # [N] int64
    log_sum: Tensor  # [N] float32, of the logits at temperature 1
    share: Tensor  # [N] float32, 0 for rows without


class Wanted(NamedTuple):
    """Says what sums over some columns of rows are taken for.

    stats: entropies and agreement are wanted too; else they may be zeros. gradient: the teacher's
    logits may be overwritten by what `backward` takes in their place. exact: by `terms`, where
    otherwise a short path may do.
    """

    stats: bool
    gradient: bool
    exact: bool = False


class RowGradients(Protocol):
    """Is what kernels of whole rows and of some of their columns have in common."""

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
        """Write factor (h - q H_SUM), and the hard term, to `out` [N, V], which may be `student`.

        `values` are those of the same backend's sums, of whole rows. Where factor [N] or the share
        is 0, its part is left out, whatever it would be. Of some columns, V is their number, and a
        label is counted from the first of them: it may be none of them.
        """
        ...


class Buffers(NamedTuple):
    """Holds scratch of [rows, V] each, for one block after the other."""

    log_q: Tensor
    log_p: Tensor
    q: Tensor
    p: Tensor
    spare: Tensor

    @staticmethod
    def of(like: Tensor, rows: int, vocab: int) -> "Buffers":
        """Allocate for blocks of up to `rows` rows, in the precision the op computes `like` in."""
        dtype = accumulator(like)
        return Buffers(*like.new_empty(NUM_BUFFERS, rows, vocab, dtype=dtype).unbind(0))

    def first(self, rows: int) -> "Buffers":
        """Use the same memory for a block of `rows` rows."""
        return Buffers(*(x[:rows] for x in self))


def accumulator(x: Tensor) -> torch.dtype:
    """Return what sums are kept in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class LoadedRows(NamedTuple):
    """Holds both sides: softmax is e / sum, log-softmax log - log(sum); the sums are [rows, 1].

    The logs are [rows, V], off by a constant a row; a log may be the logits themselves and is not
    to be written to. buffers.q and buffers.p hold the exponentials.
    """

    buffers: Buffers
    log_q: Tensor
    q_sum: Tensor
    log_p: Tensor
    p_sum: Tensor

    def pick(self, index: Tensor, kind: str) -> Probabilities:
        """Normalise the rows of `index` ([n] int64), without logs for kinds that need none."""
        if kind in MIXTURES:
            q, p = self.buffers.q[index], self.buffers.p[index]
            return Probabilities(p.div_(self.p_sum[index]), q.div_(self.q_sum[index]), p[:0], q[:0])
        # relative to each row's largest, so that the large parts cancel first
        log_q, q, q_sum = _shifted(self.log_q[index])
        ratio, p, p_sum = _shifted(self.log_p[index])
        ratio.sub_(log_q).sub_((p_sum / q_sum).log_())
        ratio.masked_fill_((p == 0) & (q == 0), 0.0)
        return Probabilities(p.div_(p_sum), q.div_(q_sum), log_q.sub_(q_sum.log()), ratio)


def _shifted(log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log, exp(log), sum) with log shifted in place to 0 at the largest."""
    log.sub_(log.amax(-1, keepdim=True))
    e = log.exp()
    return log, e, e.sum(-1, keepdim=True)


def load_rows(
    x: Tensor, temperature: float, log_e: Tensor, e: Tensor, shift: bool
) -> tuple[Tensor, Tensor]:
    """Write e = exp(log), return (log, sum of e [rows, 1]); log is x / temperature less a constant.

    The constant is the row's largest with `shift`, and where without it the sum would not be far
    from overflow or from the small numbers; otherwise it is zero, for two passes less. The log is
    in `log_e` (which may be `e`) or `x` itself.
    """
    moderate = None
    if not shift:
        log = log_e
        if x.dtype != e.dtype:
            log.copy_(x)
            if temperature != 1.0:
                log.mul_(1 / temperature)
        elif temperature != 1.0:
            torch.mul(x, 1 / temperature, out=log)
        else:
            log = x
        total = torch.exp(log, out=e).sum(-1, keepdim=True)
        low, high = torch.aminmax(total)
        if float(low) > MODERATE[0] and float(high) < MODERATE[1]:
            return log, total
        moderate = (total > MODERATE[0]) & (total < MODERATE[1])
    largest = x.amax(-1, keepdim=True)
    if moderate is not None:
        largest.masked_fill_(moderate, 0.0)  # a row's result is the same in any company
    if x.dtype != e.dtype:
        e.copy_(x)
        x, largest = e, largest.to(e.dtype)
    torch.sub(x, largest, out=log_e)
    if temperature != 1.0:
        log_e.mul_(1 / temperature)
    return log_e, torch.exp(log_e, out=e).sum(-1, keepdim=True)


class ExactLoss(NamedTuple):
    """Holds a block by `terms`: loss, whether an entry was clipped, [rows]; sum of h [rows, 1]."""

    loss: Tensor
    clipped: Tensor | None
    h_sum: Tensor
    gradient: Tensor  # h - q h_sum, [rows, V]


def bounded_terms(
    row: Probabilities, spec: DivergenceSpec, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return f, h and which entries were clipped, [rows, V] each, as sums take them.

    With `whole` the entries are as they are defined, although they need not add up to one.
    """
    bound = spec.clip if spec.clip_level == "vocab_entry" else None
    whole = whole or bound is not None
    f, zero, h = terms(row, spec.kind, Mix.of(spec), whole)
    if zero is not None and not whole:
        f = f + zero  # not in place: f may be h too
    if bound is None:
        return f, h, None
    over = f > bound
    return f.clamp(max=bound), h.masked_fill(over, 0.0), over


def exact_loss(row: Probabilities, spec: DivergenceSpec, whole: bool = False) -> ExactLoss:
    """Compute loss and gradient for the student's scaled logits, before token clips and scaling.

    With `whole` the entries are summed as they are defined, although they need not add up to one.
    """
    f, h, over = bounded_terms(row, spec, whole)
    h_sum = h.sum(-1, keepdim=True)
    clipped = None if over is None else over.any(-1)
    return ExactLoss(f.sum(-1), clipped, h_sum, h - row.q * h_sum)


def clip_tokens(loss: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Clip whole tokens: (loss, factor of its gradient, whether it was clipped), each [rows]."""
    if spec.clip is None or spec.clip_level == "vocab_entry":
        return loss, None, None
    over = loss > spec.clip
    factor = 0.0 if spec.clip_level == "token" else spec.clip / loss
    return loss.clamp(max=spec.clip), torch.where(over, factor, 1.0), over


def scale_gradient(gradient: Tensor, factor: Tensor, clips: bool = True) -> Tensor:
    """Multiply a gradient [rows, n] in place by a factor [rows].

    With `clips` 0 times infinity or NaN is 0: a clipped token's loss may be infinite, and its
    gradient before the clip too.
    """
    gradient.mul_(factor[:, None])
    return gradient.masked_fill_((factor == 0)[:, None], 0.0) if clips else gradient


def _entropy(log_e: Tensor, e: Tensor, total: Tensor, spare: Tensor) -> Tensor:
    entropy = torch.mul(e, log_e, out=spare).sum(-1)
    if bool(entropy.isnan().any()):  # 0 * -inf
        entropy = spare.masked_fill_(e == 0, 0.0).sum(-1)
    return total.log().squeeze(-1).sub_(entropy / total.squeeze(-1))


def _agreement(log_q: Tensor, log_p: Tensor, spare: Tensor) -> Tensor:
    """Return 1 where both have a largest entry in common, [rows]."""
    # 1 but for the teacher's largest; written as numbers, which is several times faster than bools
    torch.ne(log_p, log_p.amax(-1, keepdim=True), out=spare)
    torch.sub(log_q, spare, alpha=torch.finfo(spare.dtype).max, out=spare)
    return (spare.amax(-1) == log_q.amax(-1)).to(spare.dtype)


def row_statistics(loaded: LoadedRows) -> Tensor:
    """Compute the statistics [NUM_STATS, rows], with nothing clipped yet."""
    (_, _, q, p, spare), log_q, q_sum, log_p, p_sum = loaded
    student = _entropy(log_q, q, q_sum, spare)
    teacher = _entropy(log_p, p, p_sum, spare)
    agreement = _agreement(log_q, log_p, spare)
    return torch.stack([student, teacher, agreement, torch.zeros_like(agreement)])
