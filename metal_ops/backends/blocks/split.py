"""Projects hidden states on heads whose rows lie on several processes, and compares them.

Every process has the same tokens and V / P rows of both heads. Of a chunk of n tokens processes
exchange what an online softmax needs, [5, n] numbers each, and then seven sums over the vocabulary,
[7, n], these again for rows whose two sides nearly agree; at the end the gradient of the hidden
states [N, H]. Heads, their gradients and logits stay where they are.
"""

from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from metal_ops.backends.blocks import linear as from_hidden
from metal_ops.backends.blocks.linear import (
    BlockLoss,
    HardLabels,
    LossAndGradients,
    LossSettings,
    Needs,
    Projection,
)
from metal_ops.backends.blocks.rows import (
    AGREEMENT,
    CLIPPED,
    H_SUM,
    LOSS,
    NUM_VALUES,
    P_ENTROPY,
    Q_ENTROPY,
    HardTerm,
    RowGradients,
    Wanted,
    accumulator,
    clip_tokens,
)
from metal_ops.backends.blocks.sizes import rows_per_block, tokens_per_chunk
from metal_ops.spec import DivergenceSpec

SUMMED = (LOSS, H_SUM, Q_ENTROPY, P_ENTROPY, AGREEMENT, CLIPPED)  # over columns


class SplitKernels(RowGradients, Protocol):
    """Lists what a backend implements, over rows [N, v] of this process's columns, v > 0."""

    def normalisers(self, student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
        """Return [4, N]: the largest x of a row, sum(exp((. - x) / temperature)); then the teacher.

        The largest of nothing finite is the least finite number.
        """
        ...

    def log_sum(self, logits: Tensor) -> Tensor:
        """Return log-sum-exp of rows at temperature 1, [N]; -inf for a sum of nothing."""
        ...

    def sums(
        self,
        student: Tensor,
        teacher: Tensor,
        normalisers: Tensor,
        spec: DivergenceSpec,
        wanted: Wanted,
    ) -> Tensor:
        """Return [NUM_VALUES or more, N] of these columns, before token clips and scaling.

        As `kernels.Kernels.forward`, but for the normalisers [4, N], which are those of whole rows.
        So are the two log-sums that are returned.
        """
        ...

    def again(self, values: Tensor, normalisers: Tensor, spec: DivergenceSpec) -> Tensor | None:
        """Return the rows [n] whose sums, now of whole rows, must be taken again, exactly.

        The same rows on all processes: sums over these are the same to the last bit on each.
        """
        ...


class Place(NamedTuple):
    """Says which rows of the heads this process has.

    first: the number of its first row. tokens: of a chunk; the same on all processes.
    """

    group: dist.ProcessGroup
    first: int
    tokens: int


def sizes_of(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Return how many rows each process's tensor has. All processes of the group must call it."""
    own = torch.tensor([len(x)], device=x.device)
    every = own.new_empty(dist.get_world_size(group))
    dist.all_gather_single(every, own, group=group)
    return every.tolist()


def _place(student: Projection, group: dist.ProcessGroup) -> Place:
    """Find this process's place. All processes of the group must call it."""
    weight = student.weight
    rows = sizes_of(weight, group)
    # as many as where each process has the whole heads; machines may differ
    tokens = tokens_per_chunk(student.hidden, weight, sum(rows))
    tokens = torch.tensor(tokens, device=weight.device)
    dist.all_reduce(tokens, dist.ReduceOp.MIN, group=group)
    return Place(group, sum(rows[: dist.get_rank(group)]), int(tokens))


def join_normalisers(tops: Tensor, sums: Tensor, inv_t: float) -> tuple[Tensor, Tensor]:
    """Return (largest, sum) of rows from those of their parts, [parts, ...] each."""
    largest = tops.amax(0)
    return largest, (sums * ((tops - largest) * inv_t).exp()).sum(0)


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the [k, n] of all processes, [P, k, n]."""
    every = own.new_empty(dist.get_world_size(group), *own.shape)
    dist.all_gather_single(every.flatten(0, 1), own.contiguous(), group=group)
    return every


def _whole_rows(
    kernels: SplitKernels,
    pair: tuple[Tensor, Tensor],
    spec: DivergenceSpec,
    wants_hard: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Return the normalisers [4, n] of whole rows, and the student's log-sum [n] at 1."""
    student, teacher = pair
    dtype = accumulator(student)
    own = student.new_zeros(4 + wants_hard, len(student), dtype=dtype)
    if student.shape[-1]:
        own[:4] = kernels.normalisers(student, teacher, spec)
        if wants_hard:
            own[4] = kernels.log_sum(student)
    else:
        own[0::2] = torch.finfo(dtype).min
        own[4:] = -torch.inf
    every = _gathered(own, group)
    joined = join_normalisers(every[:, 0:4:2], every[:, 1:4:2], 1 / spec.temperature)
    normalisers = torch.stack(joined, 1).flatten(0, 1)
    return normalisers, every[:, 4:].logsumexp(0)[0] if wants_hard else own[0]


def _add_up(values: Tensor, group: dist.ProcessGroup, more: Tensor | None) -> Tensor | None:
    """Make values of whole rows of those of their parts, in place, and sum `more` [n] with them."""
    sums = values[list(SUMMED)]
    if more is not None:
        sums = torch.cat([sums, more[None]])
    dist.all_reduce(sums, group=group)
    values[list(SUMMED)] = sums[: len(SUMMED)]
    values[AGREEMENT : CLIPPED + 1].clamp_(max=1)
    return None if more is None else sums[-1]


def _sums(
    kernels: SplitKernels,
    pair: tuple[Tensor, Tensor],
    normalisers: Tensor,
    spec: DivergenceSpec,
    wanted: Wanted,
    group: dist.ProcessGroup,
    at_labels: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return values of whole rows, and `at_labels` [n] summed over processes, in one exchange."""
    student, width = pair[0], pair[0].shape[-1]

    def own(sides: tuple[Tensor, Tensor], given: Tensor, wanted: Wanted) -> Tensor:
        if width:
            return kernels.sums(*sides, given, spec, wanted)
        return normalisers.new_zeros(NUM_VALUES, given.shape[1])

    values = own(pair, normalisers, wanted)
    at_labels = _add_up(values, group, at_labels)
    again = kernels.again(values, normalisers, spec)
    if again is not None:
        exactly = Wanted(wanted.stats, False, exact=True)
        # a block at a time, so that there is no second copy of a chunk
        blocks = again.split(rows_per_block(student, max(1, width)))
        parts = [own((pair[0][at], pair[1][at]), normalisers[:, at], exactly) for at in blocks]
        redone = torch.cat(parts, 1)
        _add_up(redone, group, None)
        values[:, again] = redone
    return values, at_labels


def _at_labels(logits: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """Return the logits [n] at labels that are of these columns, 0 for others."""
    width = logits.shape[-1]
    if not width:
        return torch.zeros_like(like)
    mine = (labels >= 0) & (labels < width)
    found = logits.gather(-1, labels.clamp(0, width - 1)[:, None])[:, 0].to(like.dtype)
    return torch.where(mine, found, 0.0)


def _as_computed(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides as they are, or in float64 if one is; others are accumulated alike."""
    if accumulator(student) == accumulator(teacher):
        return student, teacher
    return student.double(), teacher.double()


def _make_block_loss(
    kernels: SplitKernels, place: Place, settings: LossSettings, tokens: int
) -> tuple[int, BlockLoss]:
    """Take a whole chunk at a time: processes exchange twice a chunk, or three times."""
    heads, spec, want_grad, want_stats = settings

    def block_loss(logits: tuple[Tensor, Tensor], weight: Tensor, hard: HardLabels) -> Tensor:
        pair = _as_computed(*(head.finish(x) for head, x in zip(heads, logits, strict=True)))
        student, _ = pair
        normalisers, log_sum = _whole_rows(
            kernels, pair, spec, hard.labels is not None, place.group
        )
        labels = None if hard.labels is None else hard.labels - place.first
        own = None if labels is None else _at_labels(pair[0], labels, log_sum)
        wanted = Wanted(want_stats, want_grad)
        values, at_labels = _sums(kernels, pair, normalisers, spec, wanted, place.group, own)
        soft, shrink, clipped = clip_tokens(values[LOSS], spec)
        if want_grad and pair[0].shape[-1]:
            factor = weight * (hard.alpha * spec.scale / spec.temperature)
            factor = factor if shrink is None else factor * shrink
            term = None
            if labels is not None:
                term = HardTerm(labels, log_sum, weight * (1 - hard.alpha))
            out = logits[0] if pair[0] is logits[0] else torch.empty_like(pair[0])
            kernels.backward(*pair, factor, values, spec, term, out)
            if out is not logits[0]:
                heads[0].unfinish(out, student, logits[0])
        both = [
            soft * spec.scale,
            torch.zeros_like(soft) if at_labels is None else log_sum - at_labels,
        ]
        if want_stats:
            both += [*values[Q_ENTROPY:CLIPPED], values[CLIPPED] if clipped is None else clipped]
        return torch.stack([x.to(soft.dtype) for x in both])

    return tokens, block_loss


def linear(
    kernels: SplitKernels,
    student: Projection,
    teacher: Projection | Tensor,
    weights: Tensor,
    hard: HardLabels,
    spec: DivergenceSpec,
    needs: Needs,
    want_stats: bool,
    group: dist.ProcessGroup,
    sum_hidden: bool,
) -> LossAndGradients:
    """Do `linear.linear` over heads cut over the processes of a group.

    Args:
        kernels: of a backend.
        student: hidden states, the same on all processes, and this process's rows of the head. The
            processes' rows follow each other in the order of their ranks.
        teacher: the same of the teacher, with as many rows; or hidden states alone.
        weights: [N], as all that follows the same on all processes.
        hard: labels, which count all rows, and alpha.
        spec: resolved, of support "full".
        needs: whether gradients of hidden states, weight and bias are wanted.
        want_stats: whether the statistics are.
        group: all of its processes must call this.
        sum_hidden: whether the gradient of the hidden states is summed over the processes; else
            each has the part of its rows.

    Returns:
        As `linear.linear`; gradients of weight and bias are those of this process's rows.
    """
    place = _place(student, group)
    found = from_hidden.linear(
        student,
        teacher,
        weights,
        hard,
        spec,
        needs,
        want_stats,
        partial(_make_block_loss, kernels, place),
        place.tokens,
    )
    if found.grad_hidden is None:
        return found
    # a sum over processes is of as many roundings, if each part is rounded to 16 bits first
    grad = found.grad_hidden
    if sum_hidden:
        dist.all_reduce(grad, group=group)
    return found._replace(grad_hidden=grad.to(student.hidden.dtype))
