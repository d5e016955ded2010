"""What a model says about scored tokens: logits, hidden states or some log-probabilities.

Shapes: N scored tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.models.layers import States
from metal_ops import SparseTeacher, reference
from metal_ops.functional.linear import local


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * linear(hidden) / softcap), or no softcap."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None

    def first(self, size: int) -> "Head":
        """The head of the first `size` entries of the vocabulary; its tensors are views."""
        bias = None if self.bias is None else local(self.bias)[:size]
        return replace(self, weight=local(self.weight)[:size], bias=bias)


class TailRule(NamedTuple):
    """How the loss reads a sparse signal outside the known entries.

    See `tail` and `max_ratio` of `metal_ops.sparse_divergence`.
    """

    tail: str = "auto"
    max_ratio: float | None = 4.0


@dataclass(frozen=True)
class Signal:
    """What a model says about the N scored tokens, in one of three forms.

    `logits` [N, V]; `hidden` [N, H] and `head`; or `sparse`, the log-probabilities of a few entries
    and the mass of the rest, with a rule for that rest. Exactly one form is set. `states` are
    those of the layers that are compared.

    `paired` [N] bool: the scored tokens that the signal is about, its rows in their order; None is
    all of them. Teachers with another tokenizer have not a token for each of the student's.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    sparse: SparseTeacher | None = None
    tail: TailRule = field(default_factory=TailRule)
    states: States = field(default_factory=States)
    paired: Tensor | None = None

    def dense(self) -> Tensor:
        """[N, V] logits, projected now if they were not.

        Raises:
            ValueError: the signal is sparse.
        """
        if self.logits is not None:
            return self.logits
        if self.sparse is not None:
            raise ValueError(
                f"a sparse signal has no logits: it knows {self.sparse.ids.shape[-1]} entries of "
                "the vocabulary"
            )
        assert self.hidden is not None
        assert self.head is not None
        h = self.head
        return reference.head(self.hidden, h.weight, h.bias, h.logit_scale, h.softcap)


def without_padding(signal: Signal, size: int) -> Signal:
    """A signal about the first `size` entries of the vocabulary only, renormalised over them.

    Of a sparse signal the known entries from there on are left out, and the others grow by their
    mass; what of the tail's mass lies there is not known and stays, as do its power sums up to that
    factor.
    """
    if signal.sparse is not None:
        return replace(signal, sparse=_without_padding(signal.sparse, size))
    if signal.head is not None:
        return replace(signal, head=signal.head.first(size))
    assert signal.logits is not None
    return replace(signal, logits=signal.logits[..., :size])


def _masked(ids: Tensor, size: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Ids with -1, and values with -inf, at ids from `size` on."""
    beyond = ids >= size
    return ids.masked_fill(beyond, -1), *(x.masked_fill(beyond, -torch.inf) for x in values)


def _without_padding(known: SparseTeacher, size: int) -> SparseTeacher:
    beyond = (known.ids >= size).any(-1)
    ids, log_probs = _masked(known.ids, size, known.log_probs)
    log_probs = log_probs.masked_fill(ids < 0, -torch.inf)
    kept = torch.cat([log_probs, known.log_tail[..., None]], dim=-1).logsumexp(-1)
    # a sum that rounds to something else than 1 is no reason to change what loses no entry
    kept = torch.where(beyond, kept, 0.0)
    samples, powers = known.samples, known.powers
    if samples is not None:
        drawn, drawn_probs, log_weights = _masked(
            samples.ids, size, samples.log_probs, samples.log_weights
        )
        samples = samples._replace(
            ids=drawn, log_probs=drawn_probs - kept[..., None], log_weights=log_weights
        )
    if powers is not None:
        orders = torch.tensor(powers.orders, dtype=kept.dtype, device=kept.device)
        powers = powers._replace(log_sums=powers.log_sums - orders * kept[..., None])
    return known._replace(
        ids=ids,
        log_probs=log_probs - kept[..., None],
        log_tail=known.log_tail - kept,
        samples=samples,
        powers=powers,
    )
