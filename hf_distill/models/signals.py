"""What a model says about scored tokens: logits, hidden states or some log-probabilities.

Shapes: N scored tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.models.layers import States
from hf_distill.models.routers import Experts
from hf_distill.models.spans import Spans
from metal_ops import Head, PowerSums, SparseTeacher, TailSamples, reference
from metal_ops.functional import is_dtensor

NO_ENTRY = -1  # padding of a sparse signal's ids


class TailRule(NamedTuple):
    """Says how the loss reads a sparse signal outside the known entries.

    See `tail` and `max_ratio` of `metal_ops.sparse_divergence`.
    """

    tail: str = "auto"
    max_ratio: float | None = 4.0


@dataclass(frozen=True)
class Signal:
    """Holds what a model says about the N scored tokens, in one of three forms.

    `logits` [N, V]; `hidden` [N, H] and `head`, which is the student's where it is None; or
    `sparse`, the log-probabilities of a few entries and the mass of the rest, with a rule for that
    rest. Exactly one form is set. `states` are those of the layers that are compared. `own_loss` []
    is the model's own loss of its labels, for the whole optimizer step, where it takes the place of
    the cross-entropy. `own_tokens`: whether processes that hold pieces of the head have tokens of
    their own; else they have the same. `experts` are those that a mixture of experts prefers for
    the tokens, where its config asks for them.

    `paired` [N] bool: the scored tokens that the signal is about, its rows in their order; None is
    all of them. Teachers with another tokenizer have not a token for each of the student's. `spans`
    says which tokens of such a teacher, whose rows these are, belong to which of the student's.

    `contrast` and `base` are what the same teacher, or the student before training, says of the
    tokens behind another context: behind a wrong hint, and behind the student's own.
    `more_contrasts` are those behind further wrong hints; `absent` [N] bool of one of them are the
    tokens of rows that have no such hint.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    sparse: SparseTeacher | None = None
    tail: TailRule = field(default_factory=TailRule)
    states: States = field(default_factory=States)
    paired: Tensor | None = None
    spans: Spans | None = None
    own_loss: Tensor | None = None
    own_tokens: bool = False
    experts: Experts | None = None
    contrast: "Signal | None" = None
    base: "Signal | None" = None
    more_contrasts: "tuple[Signal, ...]" = ()
    absent: Tensor | None = None

    def each(self, change: Callable[["Signal"], "Signal"]) -> "Signal":
        """Change the signal, and what it says behind other contexts, in the same way."""
        if self.contrast is None and self.base is None:
            return change(self)
        contrast, base = (None if x is None else change(x) for x in (self.contrast, self.base))
        more = tuple(change(x) for x in self.more_contrasts)
        return replace(change(self), contrast=contrast, base=base, more_contrasts=more)

    @property
    def contrasts(self) -> "list[Signal]":
        """Return what is said behind all wrong hints."""
        return [] if self.contrast is None else [self.contrast, *self.more_contrasts]

    def __len__(self) -> int:
        """Return the number of rows: N, or how many of the N tokens it is about."""
        said = self.logits if self.hidden is None else self.hidden
        if said is not None:
            return len(said)
        return 0 if self.sparse is None else len(self.sparse.ids)

    @property
    def vocab(self) -> int | None:
        """Return V, or None for a sparse signal, which does not say it."""
        if self.logits is not None:
            return self.logits.shape[-1]
        return None if self.head is None else self.head.vocab

    def dense(self) -> Tensor:
        """Return [N, V] logits, projected now if they were not.

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
        h = self.head.gathered()
        return reference.head(self.hidden, h.weight, h.bias, h.logit_scale, h.softcap)

    def beside(self, student: "Signal") -> "Signal":
        """Return the signal with the student's head, where it has hidden states and no head."""
        return self.each(lambda x: x._beside(student))

    def _beside(self, student: "Signal") -> "Signal":
        if self.hidden is None or self.head is not None:
            return self
        return replace(self, head=student.head)

    def rows(self, at: slice) -> "Signal":
        """Return the signal about some of the scored tokens, one row for each of them.

        Of a signal that is `paired`, tokens that it says nothing of get any of its rows, and
        `paired` tells which these are. With `spans` each gets the row that they name.
        """
        return self.each(lambda x: x._rows(at))

    def _rows(self, at: slice) -> "Signal":
        if self.sparse is not None:
            return replace(self, sparse=self.sparse.rows(at))
        index: Any = at
        if self.paired is not None:
            # a gather needs no waiting for the device to know how many tokens are spoken of
            index = (self.paired.cumsum(0) - 1).clamp_min(0)[at]
        if self.spans is not None:
            index = self.spans.rows[at] if len(self) else slice(0, 0)
        return replace(
            self,
            spans=None if self.spans is None else self.spans.at(at),
            logits=None if self.logits is None else self.logits[index],
            hidden=None if self.hidden is None else self.hidden[index],
            paired=None if self.paired is None else self.paired[at],
            absent=None if self.absent is None else self.absent[index],
        )

    def split(self, sizes: Sequence[int]) -> list["Signal"]:
        """Split the signal into groups of so many tokens; the states stay with the first."""
        starts = [0, *accumulate(sizes)]
        places = [slice(a, b) for a, b in pairwise(starts)]
        first, *others = [self.rows(at) for at in places]
        return [first, *(replace(each, states=States()) for each in others)]


def without_padding(signal: Signal, size: int) -> Signal:
    """Return a signal about the first `size` vocabulary entries only, renormalised over them.

    Of a sparse signal the known entries from there on are left out, and the others grow by their
    mass; what of the tail's mass lies there is not known and stays, as do its power sums up to that
    factor.
    """
    return signal.each(lambda x: _cut(x, size))


def _cut(signal: Signal, size: int) -> Signal:
    if signal.sparse is not None:
        return replace(signal, sparse=_without_padding(signal.sparse, size))
    if signal.head is not None:
        return replace(signal, head=signal.head.first(size))
    assert signal.logits is not None
    return replace(signal, logits=signal.logits[..., :size])


def _masked(ids: Tensor, size: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Return ids with -1, and values with -inf, at ids from `size` on."""
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


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors are the same memory, as detached views of one parameter are."""
    if one is None or other is None:
        return one is other
    if is_dtensor(one) != is_dtensor(other):
        return False
    views = []
    for x in (one, other):
        here = x.to_local() if is_dtensor(x) else x
        views.append((here.data_ptr(), x.shape, x.stride(), x.dtype, x.device))
    return views[0] == views[1]


def _one_head(signals: Sequence[Signal]) -> Head | None:
    """Return the head that all signals share, or None."""
    heads = [signal.head for signal in signals if signal.head is not None]
    if len(heads) != len(signals):
        return None
    first = heads[0]
    shared = all(
        _same(first.weight, head.weight)
        and _same(first.bias, head.bias)
        and (first.logit_scale, first.softcap, first.vocab)
        == (head.logit_scale, head.softcap, head.vocab)
        for head in heads
    )
    return first if shared else None


def join(signals: Sequence[Signal], order: Tensor) -> Signal:
    """Join signals about some of the tokens into one signal of all tokens.

    Args:
        signals: at least one.
        order: [N] where each token is in the signals one after another.

    Raises:
        ValueError: some are sparse and others not, or they have other rules or temperatures.
    """
    if len(signals) == 1:
        return signals[0]
    sparse = [signal.sparse for signal in signals if signal.sparse is not None]
    if sparse and len(sparse) != len(signals):
        raise ValueError(
            "routed teachers must all give log-probabilities of a few entries, or none of them; "
            f"got {len(sparse)} of {len(signals)} that do"
        )
    if sparse:
        rules = {signal.tail for signal in signals}
        if len(rules) > 1:
            raise ValueError(
                f"routed teachers must have one rule for the tail, got {sorted(map(str, rules))}"
            )
        (rule,) = rules
        if rule.tail == "sampled" and any(s.samples is None for s in sparse):
            raise ValueError("tail 'sampled' needs samples of every routed teacher's tail")
        return Signal(sparse=_joined_sparse(sparse).rows(order), tail=rule)
    hidden = [signal.hidden for signal in signals if signal.hidden is not None]
    head = _one_head(signals)
    if head is not None:
        return Signal(hidden=torch.cat(hidden)[order], head=head)
    return Signal(logits=torch.cat([signal.dense() for signal in signals])[order])


def _padded(parts: Sequence[Tensor], value: float) -> Tensor:
    """Return one tensor of [tokens, width] parts, each widened to the widest."""
    width = max(x.shape[-1] for x in parts)
    pad = F.pad
    return torch.cat([pad(x, (0, width - x.shape[-1]), value=value) for x in parts])


def _joined_samples(signals: Sequence[SparseTeacher]) -> TailSamples | None:
    """Return the draws of all; a teacher without any has no draw: its tail is one category."""
    if all(signal.samples is None for signal in signals):
        return None
    parts = [
        signal.samples
        or TailSamples(signal.ids[:, :0], signal.log_probs[:, :0], signal.log_probs[:, :0])
        for signal in signals
    ]
    ids, log_probs, log_weights = zip(*parts, strict=True)
    return TailSamples(
        _padded(ids, NO_ENTRY), _padded(log_probs, -torch.inf), _padded(log_weights, -torch.inf)
    )


def _joined_powers(signals: Sequence[SparseTeacher]) -> PowerSums | None:
    """Return the power sums, where all have the same and a common range; else None."""
    powers = [signal.powers for signal in signals if signal.powers is not None]
    if len(powers) != len(signals) or len({each.orders for each in powers}) > 1:
        return None
    low = max(each.temperature_range[0] for each in powers)
    high = min(each.temperature_range[1] for each in powers)
    if low > high:
        return None
    log_sums = torch.cat([each.log_sums for each in powers])
    num_tail = torch.cat([each.num_tail for each in powers])
    return PowerSums(powers[0].orders, log_sums, num_tail, (low, high))


def _joined_sparse(signals: Sequence[SparseTeacher]) -> SparseTeacher:
    temperatures = {signal.temperature for signal in signals}
    if len(temperatures) > 1:
        raise ValueError(f"routed teachers must have one temperature, got {sorted(temperatures)}")
    return SparseTeacher(
        _padded([s.ids for s in signals], NO_ENTRY),
        _padded([s.log_probs for s in signals], -torch.inf),
        torch.cat([s.log_tail for s in signals]),
        temperatures.pop(),
        _joined_samples(signals),
        _joined_powers(signals),
    )
