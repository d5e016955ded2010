"""Moves tokens and rows of heads between the processes that share a vocabulary.

P processes, N tokens of one of them, H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from metal_ops.backends.blocks.split import sizes_of


def _padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, rows - len(x)]).contiguous()


def gather_padded(x: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
    """Return all processes' rows, each padded with zeros to `most`: [P * most, ...]."""
    every = x.new_empty(dist.get_world_size(group) * most, *x.shape[1:])
    dist.all_gather_single(every, _padded(x, most), group=group)
    return every


class _GatherTokens(torch.autograd.Function):
    """Gathers rows; the gradient is the sum of all processes' for a process's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
        ctx.size, ctx.most, ctx.group = len(x), most, group
        return gather_padded(x, most, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = grad.new_empty(ctx.most, *grad.shape[1:])
        dist.reduce_scatter_single(own, grad.contiguous(), group=ctx.group)
        return own[: ctx.size], None, None


class _GatherRows(torch.autograd.Function):
    """Gathers rows of a head; each process keeps of the gradient that of its own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup, add: bool) -> Any:
        ctx.sizes, ctx.group, ctx.add = sizes, group, add
        parts = gather_padded(x, max(sizes), group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.add:  # each process has formed the part of its tokens
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.sizes[:rank])
        return grad[first : first + ctx.sizes[rank]], None, None, None


def gather_rows(x: Tensor, group: dist.ProcessGroup, own_tokens: bool) -> Tensor:
    """Return the whole [V, ...] of which each process has some rows, with a gradient for these.

    Args:
        x: this process's rows.
        group: all of its processes must call this, and the backward.
        own_tokens: whether processes have other tokens than each other; their gradients are added.
    """
    return _GatherRows.apply(x, sizes_of(x, group), group, own_tokens)


class AllIds(NamedTuple):
    """Holds ids of all processes, one process after the other; padding is -1."""

    ids: Tensor  # [P * most]
    most: int  # of one process

    @staticmethod
    def of(ids: Tensor, group: dist.ProcessGroup) -> "AllIds":
        """Gather what each process has, [n] int64. All processes of the group must call it."""
        most = max(1, *sizes_of(ids, group))
        return AllIds(gather_padded(ids + 1, most, group) - 1, most)

    def gather(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return what all processes have of their ids, [P * most, ...]."""
        return gather_padded(x, self.most, group)


class AllTokens(NamedTuple):
    """Holds the tokens of all processes, one process after the other; padding has no weight."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    weights: Tensor
    labels: Tensor | None
    own: slice  # this process's

    @staticmethod
    def of(
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        weights: Tensor,
        labels: Tensor | None,
        group: dist.ProcessGroup,
    ) -> "AllTokens":
        """Gather what each process has. All processes of the group must call it."""
        most = max(1, *sizes_of(weights, group))
        first = dist.get_rank(group) * most
        return AllTokens(
            _GatherTokens.apply(student_hidden, most, group),
            gather_padded(teacher_hidden.detach(), most, group),
            gather_padded(weights.detach(), most, group),
            None if labels is None else gather_padded(labels, most, group),
            slice(first, first + len(weights)),
        )
