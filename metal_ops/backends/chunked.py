"""Computes the ops in PyTorch, a block of tokens at a time, on every device torch has.

Shapes: N tokens, V vocabulary, H hidden, K kept entries. Arithmetic is float32 for every input
dtype (float64 for float64 input). Gradients are formed while a block is in cache.
"""

from functools import partial

import torch
from torch import Tensor

from metal_ops.backends.blocks import split
from metal_ops.backends.blocks.block import BlockDivergence, block_divergence
from metal_ops.backends.blocks.columns import COLUMNS
from metal_ops.backends.blocks.hidden import compare_hidden_states
from metal_ops.backends.blocks.linear import linear
from metal_ops.backends.blocks.rows import NUM_STATS, Buffers, LoadedRows, accumulator, load_rows
from metal_ops.backends.blocks.sizes import RowBlocks
from metal_ops.backends.blocks.support import KeptEntries, category_divergence
from metal_ops.spec import DivergenceSpec

__all__ = [
    "backward",
    "forward",
    "hidden_states",
    "linear",
    "sparse",
    "split_linear",
    "unsupported",
]

split_linear = partial(split.linear, COLUMNS)


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Say why this backend cannot take these tensors, or None when it can."""
    for tensor in (student, teacher):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            return f"needs float16, bfloat16, float32 or float64, got {tensor.dtype}"
    return None


def forward(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
    want_stats: bool,
    block: BlockDivergence = block_divergence,
    num_blocks: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute loss per token, statistics, and the gradient of the weighted loss.

    Args:
        student: [N, V].
        teacher: [N, V].
        weights: [N] or None for ones; they weigh the gradient, and a row of weight 0 is skipped.
        spec: resolved.
        want_grad: whether the gradient is wanted.
        want_stats: whether the statistics are.
        block: what computes a block of rows.
        num_blocks: how many it takes at a time of the rows whose buffers fit into the caches.

    Returns:
        loss [N], unweighted; stats [NUM_STATS, N or 0]; gradient for the student logits [N, V] in
        the dtype of `student`, or None. All are zero where the weight is.
    """
    dtype, vocab = accumulator(student), student.shape[-1]
    blocks = RowBlocks(student, weights, vocab, num_blocks)
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
        loss[at], found = block(
            student[at], teacher[at], spec, scratch, weights[at], out, want_stats
        )
        if found is not None:
            stats[:, at] = found
        if grad is not None and out is not None and isinstance(at, Tensor):
            grad[at] = out
    return loss, stats, grad


def backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    block: BlockDivergence = block_divergence,
    num_blocks: int = 1,
) -> Tensor:
    """Compute the gradient for the student logits, [N, V] in the dtype of `student`."""
    grad = forward(student, teacher, upstream, spec, True, False, block, num_blocks)[2]
    assert grad is not None
    return grad


def sparse(
    student: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (loss [N], gradient [N, V] or None) to a teacher known at a few entries.

    As `forward`, but for the teacher: ids [N, K], log-probabilities [N, K] at the spec's
    temperature, and the log of the rest's mass [N].
    """
    vocab = student.shape[-1]
    blocks = RowBlocks(student, weights, vocab)
    loss = student.new_zeros(len(student), dtype=accumulator(student))
    weights = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    grad = blocks.gradient_like(student) if want_grad else None
    all_buffers = Buffers.of(student, min(blocks.step, blocks.num_rows), vocab)
    for at in blocks:
        logits, out = student[at], None if grad is None else grad[at]
        buffers = all_buffers.first(len(logits))
        log_q, q_sum = load_rows(logits, spec.temperature, buffers.log_q, buffers.q, True)
        ids, log_probs, log_tail = (x[at] for x in teacher)
        kept = KeptEntries(ids, vocab)
        inside = log_probs.to(loss.dtype).masked_fill(~kept.valid, -torch.inf)
        value, _ = category_divergence(
            (inside, log_tail.to(loss.dtype)[:, None]),
            kept,
            LoadedRows(buffers, log_q, q_sum, log_q, q_sum),
            spec,
            weights[at] * (spec.scale / spec.temperature),
            out,
        )
        loss[at] = value * spec.scale
        if grad is not None and out is not None and isinstance(at, Tensor):
            grad[at] = out
    return loss, grad


def hidden_states(
    student: Tensor, teacher: Tensor, kind: str, weights: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (loss [N], gradient of the weighted losses [N, H] or None) of hidden states [N, H].

    As `forward`, for the kinds of `reference.hidden_divergence`.
    """
    # a difference must not be rounded before it is formed: float64 if one side has it
    wide = torch.float64 in (student.dtype, teacher.dtype)
    inside = torch.float64 if wide else torch.float32
    blocks = RowBlocks(student, weights, student.shape[-1])
    loss = student.new_zeros(len(student), dtype=accumulator(student))
    grad = blocks.gradient_like(student) if want_grad else None
    if want_grad:
        weights = loss.new_ones(len(student)) if weights is None else weights
    for at in blocks:
        factor = None if grad is None or weights is None else weights[at].to(inside)
        value, block = compare_hidden_states(
            student[at].to(inside), teacher[at].to(inside), kind, factor
        )
        loss[at] = value.to(loss.dtype)
        if grad is not None and block is not None:
            grad[at] = block.to(grad.dtype)
    return loss, grad
