"""Asks a teacher about all the contexts that a batch has for it, in one forward where it can be."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from hf_distill.data import sides
from hf_distill.data.sides import Side
from hf_distill.losses import ContrastConfig, ContrastWeights
from hf_distill.losses.log_mean import mean_log_probs
from hf_distill.models.layers import States
from hf_distill.models.signals import Signal, without_padding
from hf_distill.run import Run
from hf_distill.trainers import config_schedules
from hf_distill.trainers.tasks import Batch

logger = logging.getLogger(__name__)


class Views:
    """Asks the teacher of a run.

    Args:
        run: of the trainer.
    """

    def __init__(self, run: Run) -> None:
        self._teacher, self._args = run.teacher, run.args
        self._joins = run.args.hidden_layers is None  # states are of one context
        self._has_said = False

    def signal(
        self, model: nn.Module, batch: Batch, training: bool, vocab: int | None = None
    ) -> Signal:
        """Return what the teacher says of the batch, with what it says behind other contexts.

        Args:
            model: the student.
            batch: read by the task.
            training: whether it is no evaluation. The model's own mode does not tell: a step's
                batches may be asked about before it is set.
            vocab: entries of the logits that are used; None is all. Logits behind several wrong
                hints are cut to them before their mean is taken.
        """
        contexts = [batch.teacher, *batch.contrasts[:1]]
        # the student's own context, which the base reads as well
        stays = self.base_kl_weight > 0 and training
        reads_own = stays and batch.teacher is not batch.student
        found = self._each(model, [*contexts, batch.student] if reads_own else contexts)
        first = found[0]
        base = (found[-1] if reads_own else first) if stays else None
        if not batch.contrasts:
            return first if base is None else replace(first, base=base)
        contrast, *more = self._contrasts(model, batch, first, found[1], vocab)
        return replace(first, base=base, contrast=contrast, more_contrasts=tuple(more))

    def _contrasts(
        self, model: nn.Module, batch: Batch, first: Signal, second: Signal, vocab: int | None
    ) -> list[Signal]:
        """Return what is said behind the wrong hints, of which the first has been asked for."""
        rows = sides.places(batch.teacher.predicts)[0]
        same, absent, none = (
            None if x is None else x[rows]
            for x in map(
                batch.inputs.get, (sides.CONTRAST_SAME, sides.CONTRAST_ABSENT, sides.UNCONTRASTED)
            )
        )
        if len(batch.contrasts) == 1:
            return [second if none is None else _with(second, first, none)]
        others = batch.contrasts[1:]
        if first.hidden is None:  # of logits the mean alone is kept
            each = (self._asked(model, side) for side in others)
            mean = _mean(chain([second], each), absent, vocab)
            return [mean if none is None else _with(mean, _cut(first, vocab), none)]
        found = [second, *(replace(x, states=States()) for x in self._each(model, others))]
        if same is not None:
            found = [_with(x, first, same[:, k]) for k, x in enumerate(found)]
        if absent is not None:
            found = [replace(x, absent=absent[:, k]) for k, x in enumerate(found)]
        return found

    def _asked(self, model: nn.Module, side: Side) -> Signal:
        signal = self._teacher.signal(model, side)
        if not isinstance(signal, Signal):
            whose, kind = (type(x).__name__ for x in (self._teacher, signal))
            raise TypeError(f"{whose}.signal must return a Signal, got a {kind}")
        return signal

    def _each(self, model: nn.Module, contexts: Sequence[Side]) -> list[Signal]:
        """Return the signal of each context."""
        if len(contexts) == 1:
            return [self._asked(model, contexts[0])]
        joined = sides.stacked(contexts) if self._joins else None
        if not self._has_said:
            self._has_said = True
            how = "one forward" if joined is not None else f"{len(contexts)} forwards"
            logger.info("the teacher reads %d contexts of each row in %s", len(contexts), how)
        if joined is None:
            return [self._asked(model, side) for side in contexts]
        counts = [len(sides.places(side.predicts)[0]) for side in contexts]
        signal = self._asked(model, joined)
        if signal.experts is not None:  # those of the first context are compared
            chosen = signal.experts.chosen[:, : counts[0]]
            signal = replace(signal, experts=signal.experts._replace(chosen=chosen))
        return signal.split(counts)

    def weights(self, step: int) -> ContrastWeights | None:
        """Return how the contrast weighs tokens at a step; None if it does not."""
        config: ContrastConfig | None = getattr(self._args, "contrast", None)
        if config is None or config.kind != "weight":
            return None
        share = config_schedules.value_at(self._args, "contrast_weight", step)
        return ContrastWeights(share, config) if share > 0 else None

    @property
    def base_kl_weight(self) -> float:
        """Return the weight of the divergence to the student before training."""
        return getattr(self._args, "base_kl_weight", 0.0)


def _cut(signal: Signal, vocab: int | None) -> Signal:
    return signal if vocab is None else without_padding(signal, vocab)


def _mean(signals: Iterable[Signal], absent: Tensor | None, vocab: int | None) -> Signal:
    """Return the log of the mean probability of signals with logits, which come one by one."""
    columns = repeat(None) if absent is None else absent.unbind(1)
    contexts = ((_cut(x, vocab).dense(), at) for x, at in zip(signals, columns, strict=False))
    return Signal(logits=mean_log_probs(contexts))


def _with(signal: Signal, other: Signal, at: Tensor) -> Signal:
    """Return a signal with another one's rows at some tokens, [N] bool.

    Two rows of a batch with the same ids may differ by rounding; the same row does not.
    """
    if signal.hidden is not None and other.hidden is not None:
        hidden = torch.where(at[:, None], other.hidden, signal.hidden)
        return replace(signal, hidden=hidden)
    assert signal.logits is not None
    assert other.logits is not None
    return replace(signal, logits=torch.where(at[:, None], other.logits, signal.logits))
