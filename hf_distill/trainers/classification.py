"""Distilling sequence classifiers: what a `DistillTrainer` does where a row has one class.

Shapes: B rows of a batch, C classes.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.sides import (
    IGNORE_INDEX,
    TEACHER_PREFIX,
    TEACHER_ROUTE,
    Side,
    at_least_one_item,
)
from hf_distill.data.token_weights import KEY
from hf_distill.losses import Loss, Terms, Tokens
from hf_distill.losses.hard_loss import HardLoss
from hf_distill.models.forward import Reader
from hf_distill.models.signals import Signal
from hf_distill.run import Run
from hf_distill.trainers.evaluation import Part
from hf_distill.trainers.opsd_config import OPSDConfig
from hf_distill.trainers.tasks import Ask, Batch, find_label_name

logger = logging.getLogger(__name__)

SINGLE_LABEL = "single_label_classification"
TOKEN_SETTINGS = ("token_weights", "hidden_layers")  # of the config, about scored tokens
LABEL_KEYS = ("labels", "label", "label_ids")  # of collators; not the model's inputs


class Counts(NamedTuple):
    """Holds what sums over an optimizer step are divided by: labelled rows, and all rows."""

    labelled: Tensor | int
    rows: Tensor | int


@dataclasses.dataclass(kw_only=True)
class RowBatch(Batch):
    """Holds a classifier's batch.

    targets: [B] int64, or -100. labelled: how many there are. counts: of the step. hard: set by
    `Classification.run`, the hard part of the loss before its share.
    """

    targets: Tensor
    labelled: int
    counts: Counts
    hard: Tensor | None = None


def _counts(num_items: Tensor | int | None, labelled: int, rows: int) -> Counts:
    if num_items is None:
        return Counts(labelled, rows)
    if isinstance(num_items, Tensor) and num_items.ndim == 1:
        return Counts(num_items[0], num_items[1])
    return Counts(num_items, num_items)


def make_classification(
    run: Run,
    student: Reader,
    hard_loss: HardLoss,
    present_loss: Callable[[], Loss],
) -> "Classification":
    """Make the task of a trainer whose student is a sequence classifier.

    Args:
        run: of the trainer.
        student: reads it.
        hard_loss: the user's, if there is one.
        present_loss: the loss of this step.

    Raises:
        ValueError: something in the set-up has no meaning for classifiers.
    """
    lm: Any = run.language_model
    name = find_label_name(lm, run.args.label_names)
    read = {name for teacher in run.teachers for name in teacher.inputs()}
    columns = sorted(read - set(LABEL_KEYS))
    return Classification(name, columns, student, hard_loss, present_loss)


def check_classifier(run: Run) -> None:
    """Check the set-up of a run whose student is a sequence classifier.

    Raises:
        ValueError: something has no meaning for classifiers.
    """
    lm: Any = run.language_model
    _check_problem(lm.config)
    _check_settings(run)
    for teacher in run.teachers:
        if not teacher.reads_batches:
            raise ValueError(
                "a classifier's teacher must be a model, which reads the batch; a "
                f"{type(teacher).__name__} knows tokens of a vocabulary"
            )


def _problem(config: Any) -> str | None:
    """Return what kind of labels a model's rows have, None if their dtype decides."""
    one = config.problem_type is None and config.num_labels == 1
    return "regression" if one else config.problem_type


def compares_classes(config: Any) -> bool:
    """Return whether a row of a model has one class, as far as its config says."""
    return _problem(config) in (None, SINGLE_LABEL)


def _check_problem(config: Any) -> None:
    problem = _problem(config)
    if not compares_classes(config):
        raise ValueError(
            f"problem_type must be {SINGLE_LABEL!r}: a divergence compares distributions over "
            f"classes, of which a row has one; got {problem!r}"
        )


def _check_settings(run: Run) -> None:
    args = run.args
    if isinstance(args, OPSDConfig):
        raise ValueError(
            "an OPSDTrainer samples completions and needs a causal LM, got a "
            f"{type(run.language_model).__name__}; use DistillTrainer"
        )
    if isinstance(run.collator, HintCollator):
        raise ValueError(
            "a HintCollator makes rows of scored tokens, which a classifier does not have; use "
            "DataCollatorWithPadding"
        )
    if any(loss.of_tokens for loss in run.losses):
        raise ValueError(
            f"divergence {args.divergence!r} is one of tokens, sampled or of two vocabularies, and "
            "a classifier has classes: take a kind of metal_ops.DivergenceSpec"
        )
    fields = {field.name: field for field in dataclasses.fields(args)}
    for name in TOKEN_SETTINGS:
        value = getattr(args, name)
        plain = type(value)() if dataclasses.is_dataclass(value) else fields[name].default
        if value != plain:
            raise ValueError(
                f"{name} are about tokens, of which a classifier scores none, got {value}"
            )


class Classification:
    """Does what a trainer asks of its task for a sequence classifier, see `tasks.Task`.

    The loss of an optimizer step is alpha * soft + (1 - alpha) * hard: soft is the mean divergence
    of all its rows, hard the student's own loss, a mean over its labelled rows (of label smoothing
    or `compute_loss_func`, that one). Nothing is shifted.

    Args:
        label_name: what the student's forward calls its labels.
        columns: of the data, which teachers read.
        student: reads it.
        hard_loss: the user's, if there is one.
        present_loss: the loss of this step.
    """

    shifts_labels: bool = False

    def __init__(
        self,
        label_name: str,
        columns: Sequence[str],
        student: Reader,
        hard_loss: HardLoss,
        present_loss: Callable[[], Loss],
    ) -> None:
        self.label_name = label_name
        self.columns: Sequence[str] = tuple(columns)
        self.student, self.hard_loss, self.present_loss = student, hard_loss, present_loss
        self._warned = False

    def count(
        self,
        batches: Sequence[Any],
        device: torch.device,
        place: Callable[[Any], Any],
        ask: Callable[[Any], Signal],
    ) -> Tensor | None:
        """Return [2]: the labelled rows and all rows of a step; None if there is no batch."""
        if not batches:
            return None
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            labels = batch.get(self.label_name)
            rows = len(next(x for x in batch.values() if isinstance(x, Tensor)))
            labelled = 0 if labels is None else (labels != IGNORE_INDEX).sum().to(device)
            counts += torch.stack([counts.new_tensor(0) + labelled, counts.new_tensor(rows)])
        return counts

    def was_asked(self, inputs: Mapping[str, Any]) -> bool:
        """Return False: rows have no weights that depend on the teacher."""
        return False

    def look(self, model: nn.Module, batch: Batch) -> bool:
        """Return True: the loss of a classifier is known from its config."""
        return True

    def read(
        self, inputs: Mapping[str, Any], num_items: Tensor | int | None, num_averaged: int
    ) -> Batch:
        """Tell inputs and labels apart; both models read the same.

        Args:
            inputs: a batch with [B] labels, or without.
            num_items: of `count`, or one number for both, or None for those of this batch.
            num_averaged: see `Batch`.

        Raises:
            ValueError: the batch is not one of single-label rows, or there are no labels, which
                alpha < 1 needs.
        """
        for key in inputs:
            if key == KEY or (key.startswith(TEACHER_PREFIX) and key != TEACHER_ROUTE):
                raise ValueError(
                    f"a classifier's batch holds rows for student and teacher alike, got {key}, "
                    "which is about tokens"
                )
        left_out = {*LABEL_KEYS, self.label_name, TEACHER_ROUTE}
        own = {key: value for key, value in inputs.items() if key not in left_out}
        first = next(x for x in own.values() if isinstance(x, Tensor))
        predicts = torch.ones(len(first), 1, dtype=torch.bool, device=first.device)
        side = Side(own, predicts, inputs.get(TEACHER_ROUTE))
        targets = self._targets(inputs.get(self.label_name), predicts)
        labelled = int((targets != IGNORE_INDEX).sum())
        counts = _counts(num_items, labelled, len(targets))
        self._check_labels(inputs, counts)
        return RowBatch(
            inputs,
            side,
            side,
            num_items,
            num_averaged,
            targets=targets,
            labelled=labelled,
            counts=counts,
        )

    def signal(self, batch: Batch, ask: Ask) -> Signal:
        """Return what the teacher says."""
        return ask()

    def _targets(self, labels: Tensor | None, predicts: Tensor) -> Tensor:
        """Return [B] int64: the classes of the rows, or -100."""
        if labels is None:
            return torch.full((len(predicts),), IGNORE_INDEX, device=predicts.device)
        self._check_shape(labels, len(predicts))
        return labels.reshape(-1).long()

    def tokens(self, batch: Batch, training: bool) -> Tokens:
        """Return the rows, each of which counts as one."""
        rows = cast(RowBatch, batch)
        counted = rows.counted_tokens
        if counted is not None and rows.num_rows is not None:
            rows.targets = rows.counted_labels(rows.targets)
            rows.labelled = int((rows.targets != IGNORE_INDEX).sum())
            rows.counts = Counts(rows.labelled, rows.num_rows)
        only_labels = self.present_loss().alpha == 0.0
        rows.unscored = only_labels and rows.labelled == 0 and rows.num_rows != 0
        weights = torch.ones_like(rows.targets, dtype=torch.float32)
        if counted is not None:
            weights = torch.where(counted, weights, 0.0)
        share = rows.num_averaged / at_least_one_item(rows.counts.rows)
        return Tokens(rows.targets, weights * share, counted)

    def run(
        self,
        model: nn.Module,
        batch: Batch,
        terms_of: Callable[[Signal], Terms],
        at_head: bool,
        return_outputs: bool,
    ) -> tuple[Terms, Any]:
        """Run the student, with its labels where its own loss is the hard one."""
        rows, labels = cast(RowBatch, batch), batch.inputs.get(self.label_name)
        labels = None if labels is None else rows.counted_labels(labels)
        labelled, count = rows.labelled, at_least_one_item(rows.counts.labelled)
        use_labels = labelled > 0 and self.present_loss().alpha < 1.0
        own = use_labels and not self.hard_loss.replaces
        named = {self.label_name: labels} if own else {}
        outputs = model(**self.student.forward_inputs(model, batch.student.inputs), **named)
        hard = outputs.logits[:0].sum()  # nothing, with a gradient
        if own:
            # without a count it is a mean over the batch's labelled rows, in every model
            hard = outputs.loss * (labelled * batch.num_averaged / count)
        elif use_labels:
            found = self.hard_loss.of(outputs, cast(Tensor, labels), count)
            hard = cast(Tensor, found) * batch.num_averaged
        rows.hard = hard.detach()
        terms = terms_of(Signal(logits=outputs.logits, own_loss=hard))
        if "hard" not in terms.metrics:
            return terms, outputs
        per_row = terms.metrics["hard"].masked_fill(rows.targets == IGNORE_INDEX, torch.nan)
        return terms._replace(metrics={**terms.metrics, "hard": per_row}), outputs

    def parts(self, batch: Batch, loss: Tensor) -> Sequence[Part]:
        """Return the soft part over the rows, the hard part over the labelled ones."""
        rows = cast(RowBatch, batch)
        assert rows.hard is not None
        hard = (1 - self.present_loss().alpha) * rows.hard
        soft, counts = loss - hard, rows.counts
        return [(soft * counts.rows, counts.rows), (hard * counts.labelled, counts.labelled)]

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics with `rows`; `hard` is the mean of the labelled rows."""
        return {("rows" if name == "tokens" else name): x for name, x in metrics.items()}

    def _check_shape(self, labels: Tensor, num_rows: int) -> None:
        if labels.is_floating_point():
            kind = "regression" if labels.numel() == num_rows else "multi_label_classification"
            raise ValueError(
                f"{self.label_name} must be the numbers of classes, one a row ({SINGLE_LABEL}), "
                f"got {labels.dtype} of shape {list(labels.shape)}, which means {kind}"
            )
        if labels.numel() != num_rows:
            raise ValueError(
                f"{self.label_name} of a classifier must have shape [{num_rows}], one a row, got "
                f"{list(labels.shape)}"
            )

    def _check_labels(self, inputs: Mapping[str, Any], counts: Counts) -> None:
        alpha = self.present_loss().alpha
        if alpha == 1.0:
            return
        if inputs.get(self.label_name) is None:
            raise ValueError(
                f"alpha {alpha} < 1 needs labels, got a batch without {self.label_name!r}; set "
                "alpha=1 to learn from the teacher alone"
            )
        if counts.labelled == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "a step has no labelled row: its hard loss is 0, and the soft one counts "
                "alpha = %g times; set alpha=1 if there are no labels",
                alpha,
            )
