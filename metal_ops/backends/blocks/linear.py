"""Projects hidden states a chunk of tokens at a time, and forms gradients while logits exist."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.block import BlockDivergence, block_divergence
from metal_ops.backends.blocks.rows import NUM_STATS, Buffers, accumulator, load_rows
from metal_ops.backends.blocks.sizes import (
    head_slices,
    product_dtype,
    rows_per_block,
    tokens_per_chunk,
)
from metal_ops.spec import DivergenceSpec


class Projection(NamedTuple):
    """Holds hidden states [N, H] and the head over them: [V, H], [V] or None, scale, softcap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Project hidden [n, H] to [n, V], before scale and softcap."""
        hidden = hidden.to(out.dtype)
        for rows, weight in head_slices(self.weight, out.dtype):
            torch.mm(hidden, weight.T, out=out[:, rows])
        return out if self.bias is None else out.add_(self.bias)

    def finish(self, logits: Tensor) -> Tensor:
        """Do what the model does to its head's output: scale, then softcap * tanh(. / softcap)."""
        if self.logit_scale == 1.0 and self.softcap is None:
            return logits
        logits = logits.to(accumulator(logits)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def unfinish(self, grad: Tensor, finished: Tensor, out: Tensor) -> None:
        """Write the gradient for what `finish` was given, from that for what it returned, to `out`.

        `grad` and `finished` are overwritten.
        """
        if self.softcap is not None:
            grad.mul_(1 - (finished / self.softcap).square_())
        out.copy_(grad.mul_(self.logit_scale))


class HardLabels(NamedTuple):
    """Holds labels [N] int64 or None, and alpha, the share that they leave to the divergence."""

    labels: Tensor | None
    alpha: float

    def at(self, rows: slice) -> "HardLabels":
        """Take the labels of some tokens."""
        return self if self.labels is None else HardLabels(self.labels[rows], self.alpha)

    def add_cross_entropy(
        self, logits: Tensor, weight: Tensor, buffers: Buffers, grad: Tensor | None
    ) -> Tensor:
        """Compute the cross-entropy [rows] at temperature 1; add its gradient to `grad`."""
        assert self.labels is not None
        labels, (log_q, _, q, _, _) = self.labels[:, None], buffers.first(len(logits))
        log_q, q_sum = load_rows(logits, 1.0, log_q, q, True)
        if grad is not None and self.alpha < 1.0:
            share = (weight * (1 - self.alpha))[:, None]
            grad.addcmul_(q, share / q_sum).scatter_add_(-1, labels, -share)
        return (q_sum.log() - log_q.gather(-1, labels)).squeeze(-1)


# From the logits of a block of tokens, student and teacher, and their weights [rows] and labels, to
# values per token [2 or 2 + NUM_STATS, rows]: soft, hard, stats if wanted. Where a gradient is
# wanted the student's logits are overwritten by that of weights (alpha soft + (1 - alpha) hard).
BlockLoss = Callable[[tuple[Tensor, Tensor], Tensor, HardLabels], Tensor]


class LossSettings(NamedTuple):
    """Holds what is the same for all tokens, as a backend needs to know it."""

    heads: tuple[Projection, Projection]
    spec: DivergenceSpec
    want_grad: bool
    want_stats: bool


def torch_block_loss(
    settings: LossSettings,
    tokens: int,
    block: BlockDivergence = block_divergence,
    num_blocks: int = 1,
) -> tuple[int, BlockLoss]:
    """Return the rows of a block, and its loss in PyTorch on buffers that stay in cache."""
    heads, spec, want_grad, want_stats = settings
    weight = heads[0].weight
    step = num_blocks * rows_per_block(weight, len(weight))
    buffers = Buffers.of(weight, min(step, tokens), len(weight))

    def block_loss(logits: tuple[Tensor, Tensor], weight: Tensor, hard: HardLabels) -> Tensor:
        student, teacher = (head.finish(x) for head, x in zip(heads, logits, strict=True))
        # in place if nothing else needs the logits
        plain = student is logits[0] and hard.labels is None
        out = None
        if want_grad:
            out = logits[0] if plain else buffers.first(len(student)).spare
        soft, stats = block(student, teacher, spec, buffers, weight * hard.alpha, out, want_stats)
        if out is not None and hard.alpha == 0.0:
            out.zero_()  # a divergence without a share may be infinite
        cross_entropy = torch.zeros_like(soft)
        if hard.labels is not None:
            cross_entropy = hard.add_cross_entropy(student, weight, buffers, out)
        if out is not None and not plain:
            heads[0].unfinish(out, student, logits[0])
        values = torch.stack([soft, cross_entropy])
        return values if stats is None else torch.cat([values, stats])

    return step, block_loss


MakeBlockLoss = Callable[[LossSettings, int], tuple[int, BlockLoss]]


class Needs(NamedTuple):
    """Says which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class LossAndGradients(NamedTuple):
    """Holds what `linear` returns; gradients of the loss are None where they are not wanted."""

    loss: Tensor  # []
    per_token: Tensor  # soft and hard, [2, N]
    stats: Tensor  # [NUM_STATS, N or 0]
    grad_hidden: Tensor | None  # [N, H]
    grad_weight: Tensor | None  # [V, H], accumulated in float32
    grad_bias: Tensor | None  # [V]


class _Gradients(NamedTuple):
    """Holds gradients of hidden states [N, H], weight [V, H], bias [V]; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, at: slice, grad: Tensor, head: Projection) -> None:
        """Take in the gradient [n, V] of the logits of a chunk of tokens."""
        if self.hidden is not None:
            parts = (torch.mm(grad[:, v], w) for v, w in head_slices(head.weight, grad.dtype))
            self.hidden[at] = functools.reduce(Tensor.add_, parts)
        if self.weight is not None:
            hidden = head.hidden[at].to(grad.dtype)
            if self.weight.dtype == grad.dtype:
                self.weight.addmm_(grad.T, hidden)
            else:
                self.weight.add_(torch.mm(grad.T, hidden))
        if self.bias is not None:
            self.bias.add_(grad.sum(0, dtype=self.bias.dtype))


def cleared(
    student: Projection, teacher: Projection | Tensor, weights: Tensor, hard: HardLabels
) -> tuple[Projection, Projection | Tensor, Tensor, HardLabels]:
    """Return what `linear` takes with zeros for hidden states and labels where weights are 0.

    What stands there counts for nothing, and may be infinite.
    """
    absent = weights == 0

    def clear(x: Tensor) -> Tensor:
        return x.masked_fill(absent[:, None], 0.0)

    if isinstance(teacher, Tensor):
        teacher = clear(teacher)
    else:
        teacher = teacher._replace(hidden=clear(teacher.hidden))
    labels = None if hard.labels is None else hard.labels.masked_fill(absent, 0)
    student = student._replace(hidden=clear(student.hidden))
    return student, teacher, weights, HardLabels(labels, hard.alpha)


def linear_of_all(
    student: Projection,
    teacher: Projection | Tensor,
    weights: Tensor,
    hard: HardLabels,
    spec: DivergenceSpec,
    needs: Needs,
    want_stats: bool,
    make_block_loss: MakeBlockLoss,
    at_a_time: int | None = None,
) -> LossAndGradients:
    """Do the work of `linear`, and leave out no token."""
    weight, dtype, shared = student.weight, accumulator(student.weight), isinstance(teacher, Tensor)
    num_tokens, vocab = len(weights), len(weight)
    values = weight.new_zeros(2 + NUM_STATS * want_stats, num_tokens, dtype=dtype)
    gradients = _Gradients(
        # what is a part of a sum over processes is not rounded before
        torch.empty_like(student.hidden, dtype=None if at_a_time is None else dtype)
        if needs.hidden
        else None,
        torch.zeros_like(weight, dtype=dtype) if needs.weight else None,
        weight.new_zeros(vocab, dtype=dtype) if needs.bias else None,
    )
    heads = (student, student if isinstance(teacher, Tensor) else teacher)
    tokens = max(1, min(at_a_time or tokens_per_chunk(student.hidden, weight), num_tokens))
    memory = [weight.new_empty(tokens * (1 + shared), vocab, dtype=product_dtype(weight))]
    if not shared:
        other = heads[1].weight
        memory.append(other.new_empty(tokens, vocab, dtype=product_dtype(other)))
    step, block_loss = make_block_loss(LossSettings(heads, spec, any(needs), want_stats), tokens)
    for start in range(0, num_tokens, tokens):
        at = slice(start, min(start + tokens, num_tokens))
        count = at.stop - start
        if isinstance(teacher, Tensor):
            stacked = torch.cat([student.hidden[at], teacher[at].to(student.hidden.dtype)])
            logits = student.logits(stacked, memory[0][: 2 * count]).split(count)
        else:
            logits = [
                head.logits(head.hidden[at], m[:count])
                for head, m in zip(heads, memory, strict=True)
            ]
        for row in range(0, count, step):
            rows = slice(row, min(row + step, count))
            inside = slice(start + rows.start, start + rows.stop)
            both = (logits[0][rows], logits[1][rows])
            values[:, inside] = block_loss(both, weights[inside], hard.at(inside))
        gradients.add(at, logits[0], student)  # which the chunk's logits now hold
    loss = weights.new_zeros((), dtype=dtype)
    for share, per_token in ((hard.alpha, values[0]), (1 - hard.alpha, values[1])):
        if share:  # a side without a share may be infinite
            loss = loss + share * (weights * per_token).sum()
    stats = values[2:].clone() if want_stats else values.new_empty(NUM_STATS, 0)
    return LossAndGradients(loss, values[:2].clone(), stats, *gradients)


def linear(
    student: Projection,
    teacher: Projection | Tensor,
    weights: Tensor,
    hard: HardLabels,
    spec: DivergenceSpec,
    needs: Needs,
    want_stats: bool,
    make_block_loss: MakeBlockLoss = torch_block_loss,
    at_a_time: int | None = None,
) -> LossAndGradients:
    """Sum weights (alpha soft + (1 - alpha) hard) from hidden states, and form its gradients.

    Args:
        student: hidden states and head.
        teacher: the same of the teacher; hidden states [N, H] alone share the student's head, and
            the two products are then one.
        weights: [N] float32; nothing is computed where they are 0.
        hard: labels and alpha.
        spec: resolved.
        needs: whether gradients of hidden states, weight and bias are wanted.
        want_stats: whether the statistics are.
        make_block_loss: how a backend makes values and gradients of a chunk's logits.
        at_a_time: tokens of a chunk, where several processes, each with some rows of the heads,
            take them together; the gradient of hidden states is then in float32 at least.

    Returns:
        The loss, values of every token and the gradients.
    """
    index, how = weights.nonzero().squeeze(-1), (make_block_loss, at_a_time)
    if len(index) == len(weights):
        return linear_of_all(student, teacher, weights, hard, spec, needs, want_stats, *how)
    if isinstance(teacher, Tensor):
        teacher = teacher[index]
    else:
        teacher = teacher._replace(hidden=teacher.hidden[index])
    labels = None if hard.labels is None else hard.labels[index]
    found = linear_of_all(
        student._replace(hidden=student.hidden[index]),
        teacher,
        weights[index],
        HardLabels(labels, hard.alpha),
        spec,
        needs,
        want_stats,
        *how,
    )
    per_token, stats, grad = found.per_token, found.stats, found.grad_hidden
    per_token = per_token.new_zeros(2, len(weights)).index_copy_(1, index, per_token)
    if want_stats:
        stats = stats.new_zeros(NUM_STATS, len(weights)).index_copy_(1, index, stats)
    if grad is not None:
        grad = grad.new_zeros(student.hidden.shape).index_copy_(0, index, grad)
    return found._replace(per_token=per_token, stats=stats, grad_hidden=grad)
