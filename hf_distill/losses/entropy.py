"""How unsure a teacher is of each token."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.sparse_teacher import known_entropy
from hf_distill.models.signals import Signal


def _logits(signal: Signal) -> Iterator[Tensor]:
    """Yield the logits [n, V] of some tokens at a time."""
    if signal.logits is not None:
        for at in chunks.token_chunks(*signal.logits.shape):
            yield signal.logits[at]
        return
    assert signal.hidden is not None
    assert signal.head is not None
    for logits, _ in chunks.projected_chunks(signal.hidden, signal.head):
        yield logits


def entropies(log_probs: Tensor) -> Tensor:
    """Return the entropies [n] in nats of log-probabilities [n, V], without gradient.

    An entry of probability 0 adds nothing.
    """
    log_probs = log_probs.detach()
    probs = log_probs.exp()
    return -(probs * torch.where(probs > 0, log_probs, probs)).sum(-1)


@torch.no_grad()
def teacher_entropy(signal: Signal) -> Tensor:
    """Return the entropy of a teacher's distributions at temperature 1.

    Args:
        signal: of N tokens. Hidden states are projected a chunk of tokens at a time, which costs
            one product with the head more than the loss does.

    Returns:
        [N] float32 (float64 for float64 signals), in nats. Of a sparse signal it is
        `losses.sparse_teacher.known_entropy`.

    Raises:
        ValueError: a sparse signal cannot be taken at temperature 1.
    """
    if signal.sparse is not None:
        known = signal.sparse.at(1.0)
        return known_entropy(known, chunks.at_least_float32(known.log_probs[:0]).dtype)
    parts = [
        torch.special.entr(chunks.at_least_float32(x).softmax(-1)).sum(-1) for x in _logits(signal)
    ]
    return torch.cat(parts)


def entropy_share(signal: Signal, vocab: int | None = None) -> Tensor:
    """Return the entropy of each token as a share of the largest there is, ln V: H / ln V.

    A token's share depends on its own distribution only. (Where entropies are divided by the
    largest of the batch instead, it also depends on the tokens beside it, on the size of the
    micro-batch and on the number of processes.)

    Args:
        signal: of N tokens at the vocabulary of V logits.
        vocab: V of a sparse signal, which does not say it; the others do.

    Returns:
        [N] in [0, 1]; what samples of a tail estimate is cut to that.

    Raises:
        ValueError: the signal is sparse and vocab is not given; or as `teacher_entropy`.
    """
    if signal.logits is not None:
        vocab = signal.logits.shape[-1]
    elif signal.head is not None:
        vocab = signal.head.vocab
    if vocab is None:
        raise ValueError("the entropy of a sparse teacher needs the size of the vocabulary")
    return (teacher_entropy(signal) / math.log(max(vocab, 2))).clamp(0.0, 1.0)
