"""Causal LMs: what of their batches is scored, and how much each token counts.

The mean over an optimizer step divides by the sum of the weights of all its micro-batches. Weights
that depend on the teacher's entropies are known only once the teacher has seen them all, so it is
asked when the step's tokens are counted, and what it said is kept with each micro-batch.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_distill.data import anchor_rows, packed_rows, sides, token_weights
from hf_distill.data.token_weights import KEY, TokenWeights, TokenWeightsConfig
from hf_distill.losses import (
    Anchor,
    Drift,
    Importance,
    LossSettings,
    Terms,
    Tokens,
    entropy_share,
)
from hf_distill.losses.hard_loss import HardLoss
from hf_distill.models.forward import Reader
from hf_distill.models.routers import silent_routers
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm, vocab_size
from hf_distill.run import Run
from hf_distill.trainers.checks import check_anchor, check_unweighted
from hf_distill.trainers.evaluation import Part
from hf_distill.trainers.tasks import LABELS, Ask, Batch, find_label_name

BEHAVIOUR = "behaviour_log_probs"


class CausalLM:
    """Does what a trainer asks of its task for a causal LM, see `tasks.Task`.

    Args:
        run: of the trainer.
        settings: of reused completions and the anchor.
        student: reads it.
        hard_loss: what takes the place of the cross-entropy.
        vocab: entries of the vocabulary that are read, or None for all.
        num_ranks: processes with rows of their own, whose gradients are averaged.
    """

    columns: Sequence[str] = ()
    shifts_labels: bool = True

    def __init__(
        self,
        run: Run,
        settings: LossSettings,
        student: Reader,
        hard_loss: HardLoss,
        vocab: int | None,
        num_ranks: int,
    ) -> None:
        self.settings, self.student, self.hard_loss = settings, student, hard_loss
        self._vocab, self._num_ranks = vocab, num_ranks
        lm, given = run.language_model, run.args.label_names
        self.label_name: str = find_label_name(lm, given)
        read = inspect.signature(lm.forward).parameters
        self._unread = {self.label_name, *(x for x in given or () if x not in read)} - {LABELS}
        config = cast(TokenWeightsConfig, run.args.token_weights)
        words = run.tokenizer or run.processing_class
        around = config.by_class(), words, config.reasoning
        weigh = TokenWeights(*around, config.around_reasoning(), config.by_position())
        size = vocab or vocab_size(run.language_model)
        self.weighing = TokenWeighing(weigh, config.entropy, size, config.entropy_floor)
        self._drift = config.drift
        check_anchor(settings.anchor_weight, hard_loss.replaces)

    def read(
        self, inputs: Mapping[str, Any], num_items: Tensor | int | None, num_averaged: int
    ) -> Batch:
        """Tell the two sides of a batch with labels [B, T] apart."""
        read = {key: value for key, value in inputs.items() if key not in self._unread}
        student = sides.student_side(read)
        teacher = sides.teacher_side(inputs, student)
        wrong = tuple(sides.teacher_side(x, student) for x in sides.contrast_batches(inputs))
        return Batch(inputs, student, teacher, num_items, num_averaged, contrasts=wrong)

    def was_asked(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether the teacher has seen the batch and its signal waits there."""
        return self.weighing.was_asked(inputs)

    def look(self, model: nn.Module, batch: Batch) -> bool:
        """Look at the first batch for a loss of the model's own.

        Raises:
            ValueError: its loss is its own, and this run needs the cross-entropy of each token.
        """
        labels = batch.inputs["labels"]
        with silent_routers(causal_lm(model)):  # theirs is no loss of labels
            is_own = self.hard_loss.look(model, batch.student.inputs, labels)
        if is_own:
            check_anchor(self.settings.anchor_weight, True)
            check_unweighted([self.weighing.known(batch.inputs)])
        return not self.hard_loss.to_probe

    def signal(self, batch: Batch, ask: Ask) -> Signal:
        """Return what the teacher says, and set the weights that depend on it."""
        if not self.weighing.weighs(batch.inputs):
            return ask()
        weighed, signal = self.weighing.of(batch.inputs, ask)
        batch.weights, batch.logged = weighed.weights, weighed.logged
        return signal

    def tokens(self, batch: Batch, training: bool) -> Tokens:
        """Return the scored tokens; the anchor is a part of the training loss only.

        Raises:
            ValueError: the shape of `behaviour_log_probs` is not the labels'.
        """
        inputs, predicts = batch.inputs, batch.student.predicts
        targets = sides.targets(inputs["labels"], predicts)
        weights, counted = self._weights(batch, targets)
        batch.shares = weights
        tokens = Tokens(targets, weights, counted, self._importance(batch))
        if training and self._drift > 0:
            drift = Drift(self._drift, predicts, packed_rows.row_numbers(inputs))
            tokens = tokens._replace(drift=drift)
        if not training or self.settings.anchor_weight == 0.0:
            return tokens
        if not anchor_rows.has_anchor(inputs):
            return tokens
        labels = inputs["anchor_labels"]
        anchor_targets = sides.targets(labels, sides.predicts_from_labels(labels))
        factor = self.settings.anchor_weight * self._num_ranks / inputs["anchor_count"]
        batch.student = anchor_rows.join_anchor_rows(batch.student, inputs)
        anchor = Anchor(anchor_targets, torch.ones_like(anchor_targets) * factor)
        return tokens._replace(anchor=anchor)

    def _weights(self, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return [N] float32 weights that make a sum over tokens the mean over an optimizer step.

        Where nothing of a step is scored they are 0, or there are none.
        """
        counted = None if batch.num_rows is None else batch.counted_tokens
        if batch.weights is None:
            own = torch.ones(len(targets), device=targets.device)
        else:
            own = sides.targets(batch.weights, batch.student.predicts)
            counted = own != 0 if counted is None else counted & (own != 0)
        if counted is None:
            batch.unscored = not len(targets)
        else:
            own = torch.where(counted, own, 0.0)
            batch.unscored = batch.num_rows != 0 and ~counted.any()
        batch.count = own.sum()
        num_items = batch.count if batch.num_items is None else batch.num_items
        if isinstance(num_items, Tensor):
            num_items = num_items.to(own.device)
        divisor = batch.num_items = sides.at_least_one_item(num_items)
        return own * (batch.num_averaged / divisor), counted

    def _importance(self, batch: Batch) -> Importance | None:
        clip, behaviour = self.settings.importance_clip, batch.inputs.get(BEHAVIOUR)
        if clip is None or behaviour is None:
            return None
        predicts = batch.student.predicts
        if behaviour.shape != predicts.shape:
            raise ValueError(
                f"{BEHAVIOUR} must have the labels' shape {list(predicts.shape)}, got "
                f"{list(behaviour.shape)}"
            )
        return Importance(sides.targets(behaviour, predicts), clip)

    def run(
        self,
        model: nn.Module,
        batch: Batch,
        terms_of: Callable[[Signal], Terms],
        at_head: bool,
        return_outputs: bool,
    ) -> tuple[Terms, Any]:
        """Run the student; its outputs are formed only for who needs them."""
        self.student.look(model, batch.student)
        own = self.hard_loss.is_models
        if not (return_outputs or own or batch.wants_outputs):
            terms = self.student.run(model, batch.student, terms_of, at_head)
            return self._with_added(terms, batch), None
        labels, side = batch.counted_labels(self.own_labels(batch)), batch.student
        asked = self.hard_loss.arguments(labels, batch.num_items)
        kwargs = self.student.forward_inputs(model, side.inputs)
        with self.student.watching(model, side) as states:
            outputs = self.student.outputs(model, kwargs, **asked)
            if self._vocab is not None:
                outputs.logits = outputs.logits[..., : self._vocab]
            own_loss = self.hard_loss.of(outputs, labels, batch.num_items)
            if own_loss is not None:
                own_loss = own_loss * batch.num_averaged
            logits = sides.scored(outputs.logits, side.predicts)
            signal = Signal(logits=logits, states=states(), own_loss=own_loss)
            return self._with_added(terms_of(signal), batch), outputs

    def own_labels(self, batch: Batch) -> Tensor:
        """Return the labels [B, T] as the model itself takes them."""
        return batch.inputs["labels"]

    def _with_added(self, terms: Terms, batch: Batch) -> Terms:
        """Add what adapters add to the loss of their outputs, once an optimizer step."""
        added = self.student.added
        if added is None or batch.shares is None:
            return terms
        return terms._replace(loss=terms.loss + added * batch.shares.sum())

    def count(
        self,
        batches: Sequence[Any],
        device: torch.device,
        place: Callable[[Any], Any],
        ask: Callable[[Any], Signal],
    ) -> Tensor | None:
        """Return the sum of the weights of a step's tokens; None if none of them has weights.

        Raises:
            ValueError: there are weights, and a hard loss that cannot read them.
        """
        weights = self.weighing.ahead(batches, place, ask)
        if all(each is None for each in weights):
            return None
        if self.hard_loss.replaces:
            check_unweighted(weights)
        return token_weights.total_weight(batches, weights).to(device)

    def parts(self, batch: Batch, loss: Tensor) -> Sequence[Part]:
        """Return the loss of all its tokens together, over the sum of their weights."""
        return [(loss * batch.count, batch.count)]

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics as they are."""
        return dict(metrics)


KEPT = f"{sides.TEACHER_PREFIX}weighed"  # in a batch; the prefix hides it from the student

REASONING_SHARE, POSITION_FACTOR = "reasoning_share", "position_factor"
ENTROPY_FACTOR = "entropy_factor"


@dataclass
class WeighedBatch:
    """Holds what is known of a micro-batch.

    weights: [B, T] float32 aligned with the labels, or None if every token counts as one. logged:
    by name, values of the N scored tokens. signal: the teacher's, or None if it was not asked or
    its signal was taken.
    """

    weights: Tensor | None
    logged: dict[str, Tensor]
    signal: Signal | None = None

    def take(self) -> Signal | None:
        """Return the signal, which is not kept any longer."""
        signal, self.signal = self.signal, None
        return signal


class TokenWeighing:
    """Computes weights that need nothing but the batch, and those that need the teacher.

    Args:
        weigh: the weights of a batch without the teacher.
        entropy: a token counts 1 + entropy * H / ln V times, see `losses.entropy_share`.
        vocab: V of sparse signals, or None if it is not known.
        entropy_floor: the least that it counts then.

    Source:
        With entropy < 0 it is the confidence gate of EGRSD (arXiv:2605.13255): unsure tokens count
        less, and none counts nothing. That the weight falls in a straight line, and that ln V is
        the unit of the entropy, are choices made here.

    Memory:
        With an entropy other than 0 the signals of all micro-batches of a step are kept until each
        one's loss: of N scored tokens [N, H] hidden states, or [N, V] logits of a teacher that is
        read by them, or a sparse teacher's entries.
    """

    def __init__(
        self, weigh: TokenWeights, entropy: float, vocab: int | None, entropy_floor: float = 0.1
    ) -> None:
        self.weigh, self.entropy, self.vocab = weigh, entropy, vocab
        self._floor = entropy_floor

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names under which means are logged."""
        asked = {
            REASONING_SHARE: self.weigh.reads_rows,
            POSITION_FACTOR: self.weigh.positions.active,
            ENTROPY_FACTOR: self.entropy != 0,
        }
        return tuple(name for name, is_logged in asked.items() if is_logged)

    def ahead(
        self,
        batches: Sequence[Any],
        place: Callable[[Any], Any],
        ask: Callable[[Any], Signal],
    ) -> list[Tensor | None]:
        """Return the weights of a step's micro-batches; what was costly to find is kept in each.

        Args:
            batches: of a step. One that is given again, say of completions that are used for
                several steps, is weighed again.
            place: moves a batch to the teacher's device.
            ask: the teacher's signal of a placed batch.
        """
        found: list[Tensor | None] = []
        for batch in batches:
            if not self.names or not isinstance(batch, Mapping) or batch.get("labels") is None:
                found.append(self.weigh(batch))
                continue
            placed = place({name: value for name, value in batch.items() if name != KEPT})
            weighed = self._weighed(placed, ask(placed) if self.entropy != 0 else None)
            batch[KEPT] = weighed  # pyright: ignore[reportIndexIssue]
            found.append(weighed.weights)
        return found

    def known(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the weights that `ahead` has found, or those that need no teacher."""
        kept = batch.get(KEPT)
        return self.weigh(batch) if kept is None else kept.weights

    def weighs(self, batch: Mapping[str, Any]) -> bool:
        """Return whether some of a batch's tokens count more than others."""
        return self.weigh.weighs_places or self.entropy != 0 or KEY in batch

    @staticmethod
    def was_asked(batch: Mapping[str, Any]) -> bool:
        """Return whether the teacher has seen the batch and its signal waits there."""
        kept = batch.get(KEPT)
        return kept is not None and kept.signal is not None

    def of(self, batch: Mapping[str, Any], ask: Ask) -> tuple[WeighedBatch, Signal]:
        """Return what is known of a placed batch; the teacher is asked now if it was not."""
        kept = batch.get(KEPT)
        signal = None if kept is None else kept.take()
        if signal is None:
            signal = ask()
            kept = None if self.entropy != 0 else kept
        return self._weighed(batch, signal) if kept is None else kept, signal

    def _weighed(self, batch: Mapping[str, Any], signal: Signal | None) -> WeighedBatch:
        inside = self.weigh.in_reasoning(batch)
        weights = self.weigh(batch, inside)
        predicts = sides.predicts_from_labels(batch["labels"])
        logged: dict[str, Tensor] = {}
        if inside is not None:
            logged[REASONING_SHARE] = sides.targets(inside, predicts).float()
        if self.weigh.positions.active:
            factors = self.weigh.by_position(batch, batch["labels"])
            logged[POSITION_FACTOR] = sides.targets(factors, predicts)
        made = WeighedBatch(weights, logged, signal)
        if signal is None or self.entropy == 0:
            return made
        rows, columns = sides.places(predicts)
        factor = self._entropy_factor(signal, len(rows))
        if weights is None:
            weights = (batch["labels"] != sides.IGNORE_INDEX).float()
        weights = weights.clone()
        weights[rows, columns + 1] *= factor
        return replace(made, weights=weights, logged=logged | {ENTROPY_FACTOR: factor})

    @torch.no_grad()
    def _entropy_factor(self, signal: Signal, num_tokens: int) -> Tensor:
        share = entropy_share(signal, self.vocab)
        if signal.paired is not None:  # where the teacher says nothing a token counts once
            everywhere = share.new_zeros(signal.paired.shape)
            share = everywhere.masked_scatter(signal.paired, share)
        if len(share) != num_tokens:
            raise ValueError(
                "token_weights.entropy needs the teacher's entropy at each of the student's "
                f"{num_tokens} scored tokens, got {len(share)}"
            )
        factor = 1.0 + self.entropy * share
        return (factor if self.entropy > 0 else factor.clamp_min(self._floor)).float()
