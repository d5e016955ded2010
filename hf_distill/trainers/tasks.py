"""Tasks: how the batches of causal LMs and of classifiers are read, counted and named.

A `DistillTrainer` has one task. A new kind of model is a new task: it says what is scored of a
batch, how the student is run, and what the sums of an optimizer step are divided by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from hf_distill.data.sides import IGNORE_INDEX, Side, places
from hf_distill.losses import Terms, Tokens
from hf_distill.losses.hard_loss import HardLoss
from hf_distill.models.signals import Signal
from hf_distill.models.structure import Kind
from hf_distill.run import Run
from hf_distill.trainers.evaluation import Part

LABELS = "labels"


@dataclass
class Batch:
    """Holds a micro-batch on its device, as a task has read it.

    Attributes:
        inputs: the batch itself.
        student: what of it the student reads.
        teacher: what of it the teacher reads.
        contrast: what it reads in its second context, or None.
        num_items: what the sums over the step's scored tokens or rows are divided by, or None for
            what this batch alone has.
        num_averaged: processes whose gradients are averaged though num_items is of all of them.
        weights: [B, T] of the tokens, if some count more than others.
        logged: by name, values of the scored tokens that are logged beside the loss's metrics.
        num_rows: how many of the first rows count, or None for all: in an evaluation by several
            processes the others fill the last batch.
        wants_outputs: whether the caller, or a loss of the user's, reads the student's outputs.
        count: set by `Task.tokens`: what the sums over this batch alone are divided by.
        unscored: set by `Task.tokens`: whether there is nothing to score.
        shares: [N] each token's share of the optimizer step, which sums to num_averaged over it.
    """

    inputs: Mapping[str, Any]
    student: Side
    teacher: Side
    num_items: Tensor | int | None = None
    num_averaged: int = 1
    weights: Tensor | None = None
    logged: Mapping[str, Tensor] | None = None
    num_rows: int | None = None
    wants_outputs: bool = False
    count: Tensor | int = 0
    unscored: Tensor | bool = False
    shares: Tensor | None = None
    contrasts: tuple[Side, ...] = ()

    def read_as_logits(self) -> None:
        """Have both sides read by their logits."""
        self.student = self.student._replace(as_logits=True)
        self.teacher = self.teacher._replace(as_logits=True)
        self.contrasts = tuple(x._replace(as_logits=True) for x in self.contrasts)

    @property
    def counted_tokens(self) -> Tensor | None:
        """Return [N] bool: which scored tokens stand in rows that count, or None for all."""
        if self.num_rows is None:
            return None
        at, rows = places(self.student.predicts), self.student.rows
        return (at[0] if rows is None else rows[at]) < self.num_rows

    def counted_labels(self, labels: Tensor) -> Tensor:
        """Return the labels [B, ...], ignored in rows that do not count."""
        return ignore_rows_from(self.num_rows, labels, self.student.rows)


def ignore_rows_from(num_rows: int | None, labels: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the labels [B, ...], ignored behind the first rows; None keeps all.

    Args:
        num_rows: how many rows are kept.
        labels: of the batch.
        rows: [B, T] the row of each token, where sequences hold several.
    """
    if num_rows is None:
        return labels
    if rows is not None:
        return labels.masked_fill(rows >= num_rows, IGNORE_INDEX)
    labels = labels.clone()
    labels[num_rows:] = IGNORE_INDEX
    return labels


def find_label_name(lm: nn.Module, given: Sequence[str] | None) -> str:
    """Find the batch's key of the labels that the loss is computed from.

    Args:
        lm: the student without wrappers.
        given: `TrainingArguments.label_names`: what `compute_metrics` is given, the labels of the
            loss among them or not.

    Raises:
        ValueError: several may be meant, and none is "labels".
    """
    own = find_labels(type(lm)) or [LABELS]
    names = own if given is None else [x for x in given if x in own] or given
    if LABELS in names or not names:
        return LABELS
    if len(names) > 1:
        raise ValueError(
            f"a batch needs one key of the labels that are learnt, {LABELS!r} or another, got "
            f"label_names {names}"
        )
    return names[0]


def make_hard_loss(run: Run, users: Callable[[], tuple[Any, Any]], accepts_count: bool) -> HardLoss:
    """Make what knows the hard loss of a run.

    Args:
        run: of the trainer.
        users: see `HardLoss`.
        accepts_count: see `HardLoss`.
    """
    return HardLoss(
        run.language_model,
        wanted=run.args.measures_hard and run.kind == Kind.CAUSAL,
        sharded=run.sharded,
        users=users,
        shifts_labels=run.kind == Kind.CAUSAL,
        accepts_count=accepts_count,
    )


Ask = Callable[[], Signal]
"""Asks the teacher about a batch."""


class Task(Protocol):
    """Says what a trainer asks of its task.

    Attributes:
        label_name: the data's key of the labels.
        columns: of the data, which teachers read besides what the student reads.
        shifts_labels: whether labels are those of the next tokens.
    """

    label_name: str
    columns: Sequence[str]
    shifts_labels: bool

    def read(
        self, inputs: Mapping[str, Any], num_items: Tensor | int | None, num_averaged: int
    ) -> Batch:
        """Check a batch and tell its sides apart.

        Args:
            inputs: on the device.
            num_items: the count of the whole optimizer step, see `count`, or None.
            num_averaged: see `Batch`.
        """
        ...

    def was_asked(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether `count` has asked the teacher about a batch; it was checked for that."""
        ...

    def look(self, model: nn.Module, batch: Batch) -> bool:
        """Look closely at one of the first batches; return whether no more need be looked at."""
        ...

    def signal(self, batch: Batch, ask: Ask) -> Signal:
        """Return what the teacher says of the batch, asking now unless `count` has asked it."""
        ...

    def tokens(self, batch: Batch, training: bool) -> Tokens:
        """Return what is scored, and how much each token (or row) counts."""
        ...

    def run(
        self,
        model: nn.Module,
        batch: Batch,
        terms_of: Callable[[Signal], Terms],
        at_head: bool,
        return_outputs: bool,
    ) -> tuple[Terms, Any]:
        """Run the student.

        Args:
            model: the student, wrapped or not.
            batch: as `read` made it.
            terms_of: the loss of what the student says; called once.
            at_head: whether hidden states may be read instead of logits.
            return_outputs: whether the caller needs the model's outputs.

        Returns:
            The terms, and the outputs or None.
        """
        ...

    def count(
        self,
        batches: Sequence[Any],
        device: torch.device,
        place: Callable[[Any], Any],
        ask: Callable[[Any], Signal],
    ) -> Tensor | None:
        """Return what this process's sums over an optimizer step are divided by.

        Args:
            batches: of the step.
            device: of the result.
            place: moves a batch to the device.
            ask: asks the teacher about a placed batch.

        Returns:
            None if it is the number of labelled tokens, which the `Trainer` counts itself.
        """
        ...

    def parts(self, batch: Batch, loss: Tensor) -> Sequence[Part]:
        """Return what an evaluation sums of a batch, which was read without a count of a step.

        Args:
            batch: whose loss was computed.
            loss: [], that loss.

        Returns:
            Sums, each with what it is to be divided by; the loss of an evaluation is the sum of
            their quotients. At most `evaluation.NUM_PARTS`.
        """
        ...

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics under the names that this kind of model has for them."""
        ...
