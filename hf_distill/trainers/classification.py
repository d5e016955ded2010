"""Distilling sequence classifiers: what a `DistillTrainer` does where a row has one class.

Shapes: B rows of a batch, C classes.
"""

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from hf_distill import losses
from hf_distill.cache import CachedTeacher
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.sides import IGNORE_INDEX, TEACHER_PREFIX, TEACHER_ROUTE, Side
from hf_distill.data.token_weights import KEY
from hf_distill.models.structure import causal_lm, is_classifier
from hf_distill.teachers import ModelTeacher, RemoteTeacher, Teacher, each_teacher
from hf_distill.trainers.opsd_config import OPSDConfig

if TYPE_CHECKING:
    from hf_distill.trainers.distill_trainer import DistillTrainer

logger = logging.getLogger(__name__)

SINGLE_LABEL = "single_label_classification"
TOKEN_SETTINGS = ("token_weights", "hidden_layers")  # of the config, about scored tokens
LABEL_KEYS = ("labels", "label", "label_ids")  # of collators; not the model's inputs
HARD = "hard_of_labelled"


class Counts(NamedTuple):
    """What the sums over an optimizer step are divided by: its labelled rows, and all its rows."""

    labelled: Tensor | int
    rows: Tensor | int


class Rows(NamedTuple):
    """A batch: one model's inputs, its labels if it has some, and targets [B] int64, or -100."""

    side: Side
    labels: Tensor | None
    targets: Tensor


def for_student(trainer: "DistillTrainer") -> "Classification | None":
    """The `Classification` of a trainer whose student is a sequence classifier, else None.

    Raises:
        ValueError: something in the set-up has no meaning for classifiers.
    """
    student = causal_lm(cast(nn.Module, trainer.model))
    if not is_classifier(student):
        return None
    _check_problem(student.config)
    _check_settings(trainer)
    for teacher in each_teacher(trainer.teacher):
        if isinstance(teacher, CachedTeacher | RemoteTeacher):
            raise ValueError(
                "a classifier's teacher must be a model, which reads the batch; a "
                f"{type(teacher).__name__} knows tokens of a vocabulary"
            )
    names = trainer.args.label_names or find_labels(type(student))
    if len(names) != 1:
        raise ValueError(f"a classifier needs one name of its labels, got label_names {names}")
    return Classification(names[0], _inputs_of(trainer.teacher))


def take_over_counting(trainer: "DistillTrainer") -> None:
    """Tell the `Trainer` that the loss is divided by a count, whatever the model accepts."""
    rows = trainer._classification
    trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = True
    trainer._loss_shifts_labels = rows is None
    # PEFT's forward hides them from the Trainer
    trainer.label_names = ["labels" if rows is None else rows.label_name]


def columns(trainer: "DistillTrainer") -> tuple[str, ...]:
    """Columns of the data that teachers of a classifier read, which the student need not."""
    return () if trainer._classification is None else trainer._classification.columns


def _check_problem(config: Any) -> None:
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    if problem not in (None, SINGLE_LABEL):
        raise ValueError(
            f"problem_type must be {SINGLE_LABEL!r}: a divergence compares distributions over "
            f"classes, of which a row has one; got {problem!r}"
        )


def _check_settings(trainer: "DistillTrainer") -> None:
    args = trainer.args
    if isinstance(args, OPSDConfig):
        raise ValueError(
            "an OPSDTrainer samples completions and needs a causal LM, got a "
            f"{type(causal_lm(cast(nn.Module, trainer.model))).__name__}; use DistillTrainer"
        )
    if isinstance(trainer.data_collator, HintCollator):
        raise ValueError(
            "a HintCollator makes rows of scored tokens, which a classifier does not have; use "
            "DataCollatorWithPadding"
        )
    if not isinstance(trainer.objective, losses.Objective):
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


def _inputs_of(teacher: Teacher | None) -> tuple[str, ...]:
    """Names of the inputs that teachers read, which the student need not read too."""
    models = [each.model for each in each_teacher(teacher) if isinstance(each, ModelTeacher)]
    forwards = [inspect.signature(causal_lm(model).forward) for model in models]
    names = {name for forward in forwards for name in forward.parameters}
    return tuple(sorted(names - set(LABEL_KEYS)))


class Classification:
    """What is scored of a classifier's batch.

    The loss of an optimizer step is alpha * soft + (1 - alpha) * hard: soft is the mean divergence
    of all its rows, hard the student's own loss, a mean over its labelled rows (of label smoothing
    or `compute_loss_func`, that one). Nothing is shifted.

    Args:
        label_name: what the student's forward calls its labels.
        columns: of the data, which teachers read.
    """

    def __init__(self, label_name: str, columns: Sequence[str]) -> None:
        self.label_name, self.columns = label_name, tuple(columns)
        self.metric_names = (HARD,)
        self._warned = False

    def count(
        self, trainer: "DistillTrainer", batches: Sequence[Any], device: torch.device
    ) -> Tensor | None:
        """[2] the labelled rows and all rows of an optimizer step, over all processes if asked.

        None if there is no batch.
        """
        if not batches:
            return None
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            labels = batch.get(self.label_name)
            rows = len(next(x for x in batch.values() if isinstance(x, Tensor)))
            labelled = 0 if labels is None else (labels != IGNORE_INDEX).sum().to(device)
            counts += torch.stack([counts.new_tensor(0) + labelled, counts.new_tensor(rows)])
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            counts = cast(Tensor, trainer.accelerator.gather(counts[None])).sum(0)
        # processes that share rows have counted them several times
        copies = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
        return counts / copies

    def compute_loss(
        self,
        trainer: "DistillTrainer",
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool,
        num_items: Tensor | int | None,
    ) -> Any:
        """As `DistillTrainer.compute_loss`.

        Args:
            trainer: of a classifier.
            model: the student, wrapped or not.
            inputs: a batch with [B] labels, or without.
            return_outputs: whether to return the student's outputs behind the loss.
            num_items: of `count`, or one number for both, or None for those of this batch.

        Raises:
            ValueError: the batch is not one of single-label rows, or there are no labels, which
                alpha < 1 needs.
        """
        rows, objective = self._read(inputs), trainer._present_objective(model.training)
        labelled = int((rows.targets != IGNORE_INDEX).sum())
        counts = _counts(num_items, labelled, len(rows.targets))
        self._check_labels(rows, counts, objective.alpha)
        signal = cast(Teacher, trainer.teacher).signal(model, rows.side)
        use_labels = labelled > 0 and objective.alpha < 1.0
        own = use_labels and not trainer.has_own_hard_loss()
        named = {self.label_name: rows.labels} if own else {}
        outputs = model(**trainer._reader.forward_inputs(model, rows.side.inputs), **named)
        hard = outputs.logits[:0].sum()  # nothing, with a gradient
        averaged = trainer._num_averaged(num_items)
        if own:
            # without a count it is a mean over the batch's labelled rows, in every model
            hard = outputs.loss * (labelled * averaged / counts.labelled)
        elif use_labels:
            given = None if num_items is None else counts.labelled
            hard = trainer._hard_loss.of(outputs, cast(Tensor, rows.labels), given)
        weights = torch.ones_like(rows.targets, dtype=torch.float32) * (averaged / counts.rows)
        student = losses.StudentLogits(outputs.logits, hard)
        scored = losses.Scored(rows.targets, weights)
        terms = losses.step_terms(student, objective, signal, scored)
        if "hard" not in objective.unmeasured:
            per_row = terms.hard.masked_fill(rows.targets == IGNORE_INDEX, torch.nan)
            terms = terms._replace(extra={**terms.extra, HARD: per_row})
        trainer._note(terms, scored, None, model.training)
        return (terms.loss, outputs) if return_outputs else terms.loss

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics under the names of classifiers; `hard` is the mean of the labelled rows."""
        found = {k: v for k, v in metrics.items() if k not in ("hard", "tokens", HARD)}
        if "tokens" in metrics:
            found["rows"] = metrics["tokens"]
        if HARD in metrics:
            found["hard"] = metrics[HARD]
        return found

    def _read(self, batch: Mapping[str, Any]) -> Rows:
        for key in batch:
            if key == KEY or (key.startswith(TEACHER_PREFIX) and key != TEACHER_ROUTE):
                raise ValueError(
                    f"a classifier's batch holds rows for student and teacher alike, got {key}, "
                    "which is about tokens"
                )
        left_out = {*LABEL_KEYS, self.label_name, TEACHER_ROUTE}
        inputs = {key: value for key, value in batch.items() if key not in left_out}
        first = next(x for x in inputs.values() if isinstance(x, Tensor))
        labels, num_rows = batch.get(self.label_name), len(first)
        if labels is None:
            targets = torch.full((num_rows,), IGNORE_INDEX, device=first.device)
        else:
            self._check_shape(labels, num_rows)
            targets = labels.reshape(-1).long()
        predicts = torch.ones(num_rows, 1, dtype=torch.bool, device=first.device)
        return Rows(Side(inputs, predicts, batch.get(TEACHER_ROUTE)), labels, targets)

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

    def _check_labels(self, rows: Rows, counts: Counts, alpha: float) -> None:
        if alpha == 1.0:
            return
        if rows.labels is None:
            raise ValueError(
                f"alpha {alpha} < 1 needs labels, got a batch without {self.label_name!r}; set "
                "alpha=1 to learn from the teacher alone"
            )
        if counts.labelled == 0 and alpha == 0.0:
            raise ValueError(f"alpha 0 needs a labelled row in a step, got {IGNORE_INDEX} in all")
        if counts.labelled == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "a step has no labelled row: its hard loss is 0, and the soft one counts "
                "alpha = %g times; set alpha=1 if there are no labels",
                alpha,
            )


def _counts(num_items: Tensor | int | None, labelled: int, rows: int) -> Counts:
    if num_items is None:
        return Counts(labelled, rows)
    if isinstance(num_items, Tensor) and num_items.ndim == 1:
        return Counts(num_items[0], num_items[1])
    return Counts(num_items, num_items)
