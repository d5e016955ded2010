"""The ops in PyTorch, a block of tokens at a time: runs on every device torch has.

Shapes: N tokens, V vocabulary, H hidden, K kept entries. Arithmetic is float32 for every input
dtype (float64 for float64 input). Gradients are formed while a block is in cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends import _full, _support
from metal_ops.backends._chunks import rows_per_block, tokens_per_chunk
from metal_ops.backends._rows import (
    NUM_STATS,
    Buffers,
    Loaded,
    accumulator,
    load,
    statistics,
)
from metal_ops.backends._terms import MIXTURES
from metal_ops.spec import DivergenceSpec


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Why this backend cannot take these tensors, or None when it can."""
    for tensor in (student, teacher):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            return f"needs float16, bfloat16, float32 or float64, got {tensor.dtype}"
    return None


def _rows(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    buffers: Buffers,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    want_stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(loss [rows], stats [NUM_STATS, rows] or None) of one block of logits [rows, V].

    The gradient of weight * loss, weight [rows], goes to `out`, which may be `student` itself.
    """
    buffers = buffers.first(len(student))
    full, temperature = spec.support == "full", spec.temperature
    bare = full and spec.kind in MIXTURES and not want_stats  # the logs are not needed
    log_q, log_p = (buffers.q, buffers.p) if bare else (buffers.log_q, buffers.log_p)
    shift = not full or spec.kind == "soft_ce"  # the logs themselves are summed, not differences
    loaded = Loaded(
        buffers,
        *load(student, temperature, log_q, buffers.q, shift),
        *load(teacher, temperature, log_p, buffers.p, shift),
    )
    stats = statistics(loaded) if want_stats else None
    factor = None if weight is None else weight * (spec.scale / temperature)
    if full:
        loss, clipped = _full.divergence(loaded, spec, factor, out)
    else:
        loss, clipped = _support.divergence(student, teacher, loaded, spec, factor, out)
    if stats is not None and clipped is not None:
        stats[3] = clipped
    return loss * spec.scale, stats


class _Blocks:
    """The rows to compute, a block at a time: those whose weight is not zero."""

    def __init__(self, like: Tensor, weights: Tensor | None, vocab: int) -> None:
        self.step = rows_per_block(like, vocab)
        self.index = None if weights is None else weights.nonzero().squeeze(-1)
        if self.index is not None and len(self.index) == len(like):
            self.index = None
        self.num_rows = len(like) if self.index is None else len(self.index)

    def __iter__(self):
        """A slice where the rows follow each other, else an index."""
        for start in range(0, self.num_rows, self.step):
            stop = min(start + self.step, self.num_rows)
            if self.index is None:
                yield slice(start, stop)
                continue
            at = self.index[start:stop]
            first, last = int(at[0]), int(at[-1])
            yield slice(first, last + 1) if last - first + 1 == len(at) else at

    def gradient_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x) if self.index is None else torch.zeros_like(x)


def forward(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss per token, statistics, and the gradient of the weighted loss.

    Args:
        student: [N, V].
        teacher: [N, V].
        weights: [N] or None for ones; they weigh the gradient, and a row of weight 0 is skipped.
        spec: resolved.
        want_grad: whether the gradient is wanted.
        want_stats: whether the statistics are.

    Returns:
        loss [N], unweighted; stats [NUM_STATS, N or 0]; gradient for the student logits [N, V] in
        the dtype of `student`, or None. All are zero where the weight is.
    """
    dtype, vocab = accumulator(student), student.shape[-1]
    blocks = _Blocks(student, weights, vocab)
    loss = student.new_zeros(len(student), dtype=dtype)
    stats = student.new_zeros(NUM_STATS, len(student) if want_stats else 0, dtype=dtype)
    weights = torch.ones_like(loss) if weights is None else weights.to(dtype)
    grad = blocks.gradient_like(student) if want_grad else None
    buffers = Buffers.of(student, min(blocks.step, blocks.num_rows), vocab)
    for at in blocks:
        out = None if grad is None else grad[at]  # a view, or a copy that is put back
        scratch = buffers
        if out is not None and out.dtype == dtype:
            scratch = buffers._replace(q=out)  # in cache when the gradient is written
        loss[at], block = _rows(
            student[at], teacher[at], spec, scratch, weights[at], out, want_stats
        )
        if block is not None:
            stats[:, at] = block
        if grad is not None and out is not None and isinstance(at, Tensor):
            grad[at] = out
    return loss, stats, grad


def backward(upstream: Tensor, student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """Gradient for the student logits, [N, V] in the dtype of `student`."""
    grad = forward(student, teacher, upstream, spec, True, False)[2]
    assert grad is not None
    return grad


def sparse(
    student: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(loss [N], gradient [N, V] or None) to a teacher known at a few entries.

    As `forward`, but for the teacher: ids [N, K], log-probabilities [N, K] at the spec's
    temperature, and the log of the rest's mass [N].
    """
    vocab = student.shape[-1]
    blocks = _Blocks(student, weights, vocab)
    loss = student.new_zeros(len(student), dtype=accumulator(student))
    weights = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    grad = blocks.gradient_like(student) if want_grad else None
    all_buffers = Buffers.of(student, min(blocks.step, blocks.num_rows), vocab)
    for at in blocks:
        logits, out = student[at], None if grad is None else grad[at]
        buffers = all_buffers.first(len(logits))
        log_q, q_sum = load(logits, spec.temperature, buffers.log_q, buffers.q, True)
        ids, log_probs, log_tail = (x[at] for x in teacher)
        kept = _support.Kept(ids, vocab)
        inside = log_probs.to(loss.dtype).masked_fill(~kept.valid, -torch.inf)
        value, _ = _support.categories(
            (inside, log_tail.to(loss.dtype)[:, None]),
            kept,
            Loaded(buffers, log_q, q_sum, log_q, q_sum),
            spec,
            weights[at] * (spec.scale / spec.temperature),
            out,
        )
        loss[at] = value * spec.scale
        if grad is not None and out is not None and isinstance(at, Tensor):
            grad[at] = out
    return loss, grad


class Head(NamedTuple):
    """Hidden states [N, H] and the head over them: [V, H], [V] or None, scale, softcap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Hidden [n, H] to [n, V], before scale and softcap."""
        torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=out)
        return out if self.bias is None else out.add_(self.bias)

    def finish(self, logits: Tensor) -> Tensor:
        """What the model does to its head's output: scale, then softcap * tanh(. / softcap)."""
        if self.logit_scale == 1.0 and self.softcap is None:
            return logits
        logits = logits.to(accumulator(logits)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Hard(NamedTuple):
    """The other half of the mix: labels [N] int64 or None, and the divergence's share alpha."""

    labels: Tensor | None
    alpha: float

    def at(self, rows: slice) -> "Hard":
        """The same of some tokens."""
        return self if self.labels is None else Hard(self.labels[rows], self.alpha)

    def add(self, logits: Tensor, weight: Tensor, buffers: Buffers, grad: Tensor | None) -> Tensor:
        """Cross-entropy [rows] at temperature 1; its gradient is added to `grad`."""
        assert self.labels is not None
        labels, (log_q, _, q, _, _) = self.labels[:, None], buffers.first(len(logits))
        log_q, q_sum = load(logits, 1.0, log_q, q, True)
        if grad is not None and self.alpha < 1.0:
            share = (weight * (1 - self.alpha))[:, None]
            grad.addcmul_(q, share / q_sum).scatter_add_(-1, labels, -share)
        return (q_sum.log() - log_q.gather(-1, labels)).squeeze(-1)


def _mix(
    logits: tuple[Tensor, Tensor],
    heads: tuple[Head, Head],
    weight: Tensor,
    hard: Hard,
    spec: DivergenceSpec,
    buffers: Buffers,
    want_grad: bool,
) -> Tensor:
    """Values per token [2 + NUM_STATS, rows]: soft, hard, stats.

    With `want_grad` the student's logits are overwritten by the gradient of the weighted mix.
    """
    student, teacher = (head.finish(x) for head, x in zip(heads, logits, strict=True))
    # in place if nothing else needs the logits
    plain = student is logits[0] and hard.labels is None
    out = None
    if want_grad:
        out = logits[0] if plain else buffers.first(len(student)).spare
    soft, stats = _rows(student, teacher, spec, buffers, weight * hard.alpha, out, True)
    assert stats is not None
    if out is not None and hard.alpha == 0.0:
        out.zero_()  # a divergence without a share may be infinite
    cross_entropy = torch.zeros_like(soft)
    if hard.labels is not None:
        cross_entropy = hard.add(student, weight, buffers, out)
    if out is not None and not plain:
        if heads[0].softcap is not None:
            out.mul_(1 - (student / heads[0].softcap).square_())
        logits[0].copy_(out.mul_(heads[0].logit_scale))
    return torch.cat([soft[None], cross_entropy[None], stats])


class _Gradients(NamedTuple):
    """Of hidden states [N, H], head weight [V, H] and bias [V]; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, at: slice, grad: Tensor, head: Head) -> None:
        """Take in the gradient [n, V] of the logits of a chunk of tokens."""
        if self.hidden is not None:
            self.hidden[at] = torch.mm(grad, head.weight)
        if self.weight is not None:
            hidden = head.hidden[at].to(head.weight.dtype)
            if self.weight.dtype == grad.dtype:
                self.weight.addmm_(grad.T, hidden)
            else:
                self.weight.add_(torch.mm(grad.T, hidden))
        if self.bias is not None:
            self.bias.add_(grad.sum(0, dtype=self.bias.dtype))


def _linear(
    student: Head,
    teacher: Head | Tensor,
    weights: Tensor,
    hard: Hard,
    spec: DivergenceSpec,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`linear` where every token counts."""
    weight, dtype, shared = student.weight, accumulator(student.weight), isinstance(teacher, Tensor)
    num_tokens, vocab = len(weights), len(weight)
    values = weight.new_zeros(2 + NUM_STATS, num_tokens, dtype=dtype)
    gradients = _Gradients(
        torch.empty_like(student.hidden) if needs[0] else None,
        torch.zeros_like(weight, dtype=dtype) if needs[1] else None,
        weight.new_zeros(vocab, dtype=dtype) if needs[2] else None,
    )
    heads = (student, student if isinstance(teacher, Tensor) else teacher)
    tokens = max(1, min(tokens_per_chunk(student.hidden, weight), num_tokens))
    memory = [weight.new_empty(tokens * (1 + shared), vocab)]
    if not shared:
        memory.append(heads[1].weight.new_empty(tokens, vocab))
    step = rows_per_block(weight, vocab)
    buffers = Buffers.of(weight, min(step, tokens), vocab)
    for start in range(0, num_tokens, tokens):
        at = slice(start, min(start + tokens, num_tokens))
        count = at.stop - start
        if isinstance(teacher, Tensor):
            both = torch.cat([student.hidden[at], teacher[at].to(student.hidden.dtype)])
            logits = student.logits(both, memory[0][: 2 * count]).split(count)
        else:
            logits = [
                head.logits(head.hidden[at], m[:count])
                for head, m in zip(heads, memory, strict=True)
            ]
        for row in range(0, count, step):
            rows = slice(row, min(row + step, count))
            inside = slice(start + rows.start, start + rows.stop)
            values[:, inside] = _mix(
                (logits[0][rows], logits[1][rows]),
                heads,
                weights[inside],
                hard.at(inside),
                spec,
                buffers,
                any(needs),
            )
        gradients.add(at, logits[0], student)  # which the chunk's logits now hold
    loss = weights.new_zeros((), dtype=dtype)
    for share, per_token in ((hard.alpha, values[0]), (1 - hard.alpha, values[1])):
        if share:  # a side without a share may be infinite
            loss = loss + share * (weights * per_token).sum()
    per_token = values[:2].clone(), values[2:].clone()
    return loss, *per_token, gradients.hidden, gradients.weight, gradients.bias


def linear(
    student: Head,
    teacher: Head | Tensor,
    weights: Tensor,
    hard: Hard,
    spec: DivergenceSpec,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum of weights (alpha soft + (1 - alpha) hard) from hidden states, and its gradients.

    Args:
        student: hidden states and head.
        teacher: the same of the teacher; hidden states [N, H] alone share the student's head, and
            the two products are then one.
        weights: [N] float32; nothing is computed where they are 0.
        hard: labels and alpha.
        spec: resolved.
        needs: whether gradients of hidden states, weight and bias are wanted.

    Returns:
        loss []; soft and hard [2, N]; stats [NUM_STATS, N]; gradients of hidden states, weight and
        bias, or None. The gradient of the weight accumulates in float32.
    """
    index = weights.nonzero().squeeze(-1)
    if len(index) == len(weights):
        return _linear(student, teacher, weights, hard, spec, needs)
    if isinstance(teacher, Tensor):
        teacher = teacher[index]
    else:
        teacher = teacher._replace(hidden=teacher.hidden[index])
    labels = None if hard.labels is None else hard.labels[index]
    loss, *per_token, grad, grad_weight, grad_bias = _linear(
        student._replace(hidden=student.hidden[index]),
        teacher,
        weights[index],
        Hard(labels, hard.alpha),
        spec,
        needs,
    )
    full = [x.new_zeros(len(x), len(weights)).index_copy_(1, index, x) for x in per_token]
    if grad is not None:
        grad = torch.zeros_like(student.hidden).index_copy_(0, index, grad)
    return loss, full[0], full[1], grad, grad_weight, grad_bias
