"""Log-probabilities of single tokens, and losses of them, a chunk of tokens at a time.

Shapes: N tokens, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.split_heads import joined
from hf_distill.models.signals import Head, Signal
from metal_ops import reference
from metal_ops.functional import forbid_second_derivative

CHUNK_ENTRIES = 2**24
"""Logits of a chunk: 64 MiB in float32."""

COPIES_ON_CPU = 4
"""On a CPU a chunk is divided by this where a loss makes a dozen copies of its logits.

The fused operations hold up to 48 MiB of logits of each side on a CPU, 512 MiB elsewhere.
"""

MOST_TOKENS = 128
"""A chunk of such a loss has no more: a larger product is hardly faster, but needs more memory."""

Piece = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Goes from the logits [n, V] of the tokens of a slice to their loss [] and values [k, n]."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of logits [..., V], in float32, or in float64 if they are."""
    return torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)


def token_chunks(num_tokens: int, vocab: int) -> Iterator[slice]:
    """Yield the tokens, some at a time: their logits have about CHUNK_ENTRIES entries.

    If there are no tokens, it yields one empty chunk, so that the metrics have their names.
    """
    step = max(1, CHUNK_ENTRIES // vocab)
    for start in range(0, max(num_tokens, 1), step):
        yield slice(start, min(start + step, num_tokens))


def width_of_copies(vocab: int, device: torch.device) -> int:
    """Return a chunk's entries for a token, for a loss that copies its logits many times."""
    copies = COPIES_ON_CPU if device.type == "cpu" else 1
    return max(vocab * copies, CHUNK_ENTRIES // MOST_TOKENS)


def target_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities [n] of the targets under softmax(logits [n, V] / temperature)."""
    log_probs = log_softmax(logits, temperature)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1)


@torch.no_grad()
def log_probs(student: Signal, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities of one token each, without gradient.

    Args:
        student: hidden states [N, H] with a head of V entries, or logits [N, V].
        targets: [N] int64.
        temperature: of the softmax, > 0.

    Returns:
        [N] float32 (float64 for float64 logits), in nats, at most 0.
    """
    if student.hidden is None or student.head is None:
        return target_log_probs(student.dense(), targets, temperature)
    hidden, head = student.hidden, student.head
    parts = [
        target_log_probs(logits, targets[at], temperature)
        for logits, at in projected_chunks(hidden, head)
    ]
    return torch.cat(parts)


def projected_chunks(hidden: Tensor, head: Head) -> Iterator[tuple[Tensor, slice]]:
    """Yield logits [n, V] of hidden states [N, H], a chunk of tokens at a time, and its slice."""
    whole = joined(head)
    weight, bias = whole.weight, whole.bias
    for at in token_chunks(len(hidden), len(weight)):
        yield reference.head(hidden[at], weight, bias, head.logit_scale, head.softcap), at


class _Sum(torch.autograd.Function):
    """Sums a loss over chunks, and forms its gradients while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        size: Tensor,
        head: Head | None,
        piece: Piece,
        width: int,
        want_grad: bool,
    ) -> tuple[Tensor, ...]:
        inputs = (hidden, weight, bias)
        needs = [want_grad and x is not None and x.requires_grad for x in inputs]
        sums = [  # over chunks: in float32
            torch.zeros_like(x, dtype=at_least_float32(x[:0]).dtype)
            if x is not None and need
            else None
            for x, need in zip(inputs, needs, strict=True)
        ]
        weight, bias = _leaf(weight, needs[1]), _leaf(bias, needs[2])
        total, values = size.new_zeros(()), []
        for at in token_chunks(len(hidden), width):
            part = hidden[at].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                logits = part if head is None else _projected(part, weight, bias, head)
                loss, value = piece(logits, at)
                _add_gradients(loss / size, [part, weight, bias], sums, at)
            total = total + loss.detach()
            values.append(value.detach())
        grads = zip(inputs, sums, strict=True)
        kept = (x if x is None or y is None else y.to(x.dtype) for x, y in grads)
        ctx.save_for_backward(size, *kept)
        joined = torch.cat(values, dim=-1)
        ctx.mark_non_differentiable(joined)
        ctx.needs = needs
        return total, joined

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        size, *kept = ctx.saved_tensors
        factor = upstream[0] * size
        pairs = zip(kept, ctx.needs, strict=True)
        grads = [grad * factor.to(grad.dtype) if need else None for grad, need in pairs]
        return *grads, None, None, None, None, None


def _leaf(x: Tensor | None, needs_grad: bool) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_(needs_grad)


def _projected(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, head: Head) -> Tensor:
    assert weight is not None
    return reference.head(hidden, weight, bias, head.logit_scale, head.softcap)


def _add_gradients(
    loss: Tensor, leaves: list[Tensor | None], sums: list[Tensor | None], at: slice
) -> None:
    """Add d loss / d leaves; the first leaf is the slice `at` of its tensor."""
    places = [None if sums[0] is None else sums[0][at], *sums[1:]]
    pairs = [
        (leaf, place)
        for leaf, place in zip(leaves, places, strict=True)
        if leaf is not None and place is not None
    ]
    if not pairs:
        return
    grads = torch.autograd.grad(loss, [leaf for leaf, _ in pairs])
    for grad, (_, place) in zip(grads, pairs, strict=True):
        place.add_(grad)


def sum_over_chunks(
    hidden: Tensor, head: Head | None, piece: Piece, weights: Tensor, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum a loss over all tokens, without the logits of all of them in memory.

    Args:
        hidden: [N, H], the input of the head.
        head: of V entries; or None, and hidden are the logits, [N, V], of which the loss then needs
            no second tensor but their gradient.
        piece: from the logits of a chunk of tokens, in the dtype of the head (of autocast, if it
            is on), to its loss and to values per token. Called once a chunk.
        weights: [N], of about the size of the loss's gradient for a token's log-probability.
            Gradients are formed in units of the largest, so that they fit into float16.
        width: entries that a chunk is to hold for each token; None is V.

    Returns:
        The loss, [], with a gradient for hidden states and head; the values [k, N], without.

    Numerics:
        Each chunk is projected once; its gradients are formed at once, and those of the head are
        summed in float32. A second derivative is an error.
    """
    size = (
        at_least_float32(weights.detach()).abs().amax()
        if len(weights)
        else at_least_float32(weights).new_ones(())
    )
    size = torch.where(size > 0, size, 1.0)
    whole = None if head is None else joined(head)
    weight, bias = (None, None) if whole is None else (whole.weight, whole.bias)
    width = width or (hidden.shape[1] if weight is None else len(weight))
    trained = (None if x is None else forbid_second_derivative(x) for x in (hidden, weight, bias))
    settings = (size, head, piece, width, torch.is_grad_enabled())
    return cast("tuple[Tensor, Tensor]", _Sum.apply(*trained, *settings))


def cross_entropy(student: Signal, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the weighted cross-entropies at temperature 1.

    Args:
        student: hidden states [N, H] with a head of V entries, read a chunk of tokens at a time, or
            logits [N, V].
        targets: [N] int64.
        weights: [N]; no gradient.

    Returns:
        The sum, [], with a gradient; the cross-entropies [N] in nats, without.
    """
    if student.hidden is None or student.head is None:
        hard = F.cross_entropy(at_least_float32(student.dense()), targets, reduction="none")
        return (weights * hard).sum(), hard.detach()

    def piece(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        per_token = -target_log_probs(logits, targets[at])
        return (weights[at] * per_token).sum(), per_token[None]

    loss, values = sum_over_chunks(student.hidden, student.head, piece, weights)
    return loss, values.reshape(-1)
