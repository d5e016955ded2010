"""Computes a block of rows of which K entries count, and perhaps the mass of the rest.

The kept entries and the tail are categories [rows, K + 1] of which `terms` gives loss and
gradient g. A kept logit's gradient is its category's; a tail logit has its share of the tail's.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.rows import (
    LoadedRows,
    clip_tokens,
    exact_loss,
    scale_gradient,
)
from metal_ops.backends.blocks.terms import Probabilities
from metal_ops.spec import DivergenceSpec


class KeptEntries:
    """Holds the entries that count: ids [rows, K], of which those below 0 are padding."""

    def __init__(self, ids: Tensor, vocab: int) -> None:
        self.vocab, self.valid = vocab, ids >= 0
        self.ids = ids.clamp_min(0)

    @functools.cached_property
    def flat(self) -> Tensor:
        """Return where the kept entries lie in [rows, V]; how many there are is asked for."""
        starts = torch.arange(len(self.ids), device=self.ids.device)[:, None] * self.vocab
        return (self.ids + starts)[self.valid]

    def put(self, out: Tensor, values: Tensor) -> None:
        """Write values [rows, K] at the kept entries of `out` [rows, V], without asking for any.

        Padding repeats the row's first kept entry; where there is none, what is there stays.
        """
        if not self.ids.shape[-1]:
            return
        first = self.valid.int().argmax(-1, keepdim=True)
        ids = self.ids.where(self.valid, self.ids.gather(-1, first))
        values = values.where(self.valid, values.gather(-1, first))
        kept = self.valid.any(-1, keepdim=True)
        out.scatter_(-1, ids, values.where(kept, out.gather(-1, ids)))

    @property
    def ascending(self) -> Tensor:
        """Return the ids as kernels want them: [rows, K] int32 in order, padding last, as V."""
        ids = self.ids.masked_fill(~self.valid, self.vocab).to(torch.int32)
        return ids.sort(dim=-1).values

    def log_mass(
        self, log_e: Tensor, total: Tensor, spare: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the kept [rows, K] and of all others together [rows, 1].

        The others' shares of their mass are `spare` over the third result [rows, 1].
        """
        inside = log_e.gather(-1, self.ids).masked_fill_(~self.valid, -math.inf)
        spare.copy_(log_e).view(-1).index_fill_(0, self.flat, -math.inf)
        # by a sum over the others, never 1 - sum(inside), and relative to their own largest
        largest = spare.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -math.inf, 0.0)
        mass = spare.sub_(largest).exp_().sum(-1, keepdim=True)
        log_total = total.log()
        return inside.sub_(log_total), mass.log().add_(largest).sub_(log_total), mass


def choose_entries(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """Return the ids [rows, K] of the spec's support, -1 where both sides name an entry."""
    k = min(spec.top_k or 0, student.shape[-1])
    if spec.support == "teacher_topk":
        return teacher.topk(k, dim=-1).indices
    ids = student.topk(k, dim=-1).indices
    if spec.support == "student_topk":
        return ids
    other = teacher.topk(k, dim=-1).indices
    ascending = other.sort(dim=-1).values
    at = torch.searchsorted(ascending, ids).clamp_max_(k - 1)
    return torch.cat([other, ids.masked_fill_(ascending.gather(-1, at) == ids, -1)], dim=-1)


def support_divergence(
    student: Tensor,
    teacher: Tensor,
    loaded: LoadedRows,
    spec: DivergenceSpec,
    factor: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return (loss, clipped) [rows] over the support; `out` gets the gradient times factor."""
    buffers = loaded.buffers
    kept = KeptEntries(choose_entries(student, teacher, spec), student.shape[-1])
    log_p = kept.log_mass(loaded.log_p, loaded.p_sum, buffers.spare)
    return category_divergence(log_p[:2], kept, loaded, spec, factor, out)


class CategoryLoss(NamedTuple):
    """Holds the loss of the categories of a block of rows, and its gradient times a factor."""

    loss: Tensor  # [rows]
    clipped: Tensor | None  # [rows]
    inside: Tensor  # [rows, K], gradient of the kept logits
    # [rows, 1] or None for zero: a logit outside gets it times its share of the tail's mass with
    # missing = "tail", times q with "zero"
    outside: Tensor | None


def category_loss(
    log_p: tuple[Tensor, Tensor],
    log_q: tuple[Tensor, Tensor],
    spec: DivergenceSpec,
    factor: Tensor | None,
) -> CategoryLoss:
    """Compute it from both sides' log-probabilities, kept [rows, K] and tail [rows, 1]."""
    if spec.missing == "tail":
        log_q_all, log_p_all = torch.cat(log_q, dim=-1), torch.cat(log_p, dim=-1)
    else:
        log_q_all, log_p_all = log_q[0], log_p[0]
    if spec.missing == "renormalise":
        log_q_all, log_p_all = (x - x.logsumexp(-1, keepdim=True) for x in (log_q_all, log_p_all))
    p, q = log_p_all.exp(), log_q_all.exp()
    ratio = (log_p_all - log_q_all).masked_fill_((p == 0) & (q == 0), 0.0)
    result = exact_loss(Probabilities(p, q, log_q_all, ratio), spec, whole=spec.missing == "zero")
    loss, shrink, clipped = clip_tokens(result.loss, spec)
    if factor is None:
        factor = torch.ones_like(loss)
    factor = factor if shrink is None else factor * shrink
    clips = shrink is not None
    gradient, outside = scale_gradient(result.gradient, factor, clips), None
    if spec.missing == "tail":
        gradient, outside = gradient[:, :-1], gradient[:, -1:]
    elif spec.missing == "zero":
        outside = -scale_gradient(result.h_sum, factor, clips)
    return CategoryLoss(loss, result.clipped if clipped is None else clipped, gradient, outside)


def category_divergence(
    log_p: tuple[Tensor, Tensor],
    kept: KeptEntries,
    loaded: LoadedRows,
    spec: DivergenceSpec,
    factor: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Do `support_divergence` to the teacher's log-probabilities [rows, K] and tail [rows, 1]."""
    buffers, spare = loaded.buffers, loaded.buffers.spare
    inside, tail, mass = kept.log_mass(loaded.log_q, loaded.q_sum, spare)
    weighed = category_loss(log_p, (inside, tail), spec, factor)
    if out is not None:
        if weighed.outside is None:
            spare.zero_()
        elif spec.missing == "tail":
            spare.mul_(torch.where(mass > 0, weighed.outside / mass, 0.0))
        else:
            torch.mul(buffers.q, weighed.outside / loaded.q_sum, out=spare)
        spare.view(-1).index_copy_(0, kept.flat, weighed.inside[kept.valid])
        out.copy_(spare)
    return weighed.loss, weighed.clipped
