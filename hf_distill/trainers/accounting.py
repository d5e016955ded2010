"""What losses are divided by: in an optimizer step, and in an evaluation."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_distill.data import token_weights
from hf_distill.data.hint_collator import hint_collator_behind
from hf_distill.losses import Loss, behaviour_log_probs
from hf_distill.models.forward import Reader
from hf_distill.models.shared_images import SharedImages
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm
from hf_distill.monitoring.forgetting import Forgetting
from hf_distill.monitoring.metrics import UnscoredMeter
from hf_distill.trainers import config_schedules
from hf_distill.trainers.distill_config import DistillConfig
from hf_distill.trainers.evaluation import Evaluation, perplexity, rows_that_count
from hf_distill.trainers.step_collation import StepCollatingTrainer, given_collator
from hf_distill.trainers.tasks import LABELS, Task
from hf_distill.trainers.without_teacher import ModelLoss, find_counted_labels

logger = logging.getLogger(__name__)


class AccountingTrainer(StepCollatingTrainer):
    """Trains with losses that are means over scored tokens, or rows of a classifier.

    The mean of an optimizer step is over all its micro-batches and processes, that of an evaluation
    over all its batches and processes, with the schedules' last values.
    """

    args: DistillConfig
    task: Task
    _model_loss: ModelLoss | None = None  # without a teacher
    _told: bool = False  # whether a log line said which values an evaluation has
    _own_loss: Loss | None = None
    _forgetting: Forgetting | None = None
    _reader: Reader  # of the student
    _images: SharedImages | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluation = Evaluation()
        super().__init__(*args, **kwargs)
        self._num_copies = self.get_tp_size()  # processes that share the same rows
        copies = self._num_copies
        self._unscored = {training: UnscoredMeter(copies) for training in (True, False)}
        self._num_parts = self.get_cp_size() * self.get_sp_size()  # that a row is split over

    def compute_loss_context_manager(self) -> ExitStack:
        """Do as `Trainer` does; the features of images are made once for all who read them."""
        stack = super().compute_loss_context_manager()
        if self._images is not None:
            stack.enter_context(self._images.kept())
        return stack

    def _count_without_teacher(self) -> None:
        """Without a teacher the loss is the same mean, of what the model computes."""
        model = cast(nn.Module, self.model)
        label_name = find_counted_labels(causal_lm(model), self.label_names)
        if label_name is None:
            return
        self._model_loss = ModelLoss(
            model,
            label_name,
            accepts_count=self.model_accepts_loss_kwargs,
            has_users_loss=lambda: bool(self.compute_loss_func or self.label_smoother),
            sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )
        self.loss_is_scaled_for_ga = True

    def _without_teacher(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items: Tensor | int | None,
    ) -> Any:
        def compute(given: Any, count: Any) -> tuple[Tensor, Any]:
            found = Trainer.compute_loss(self, model, dict(given), True, count)
            loss, outputs = cast("tuple[Tensor, Any]", found)
            multiplies = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
            done = self._num_averaged(count) if multiplies else 1
            wanted = 1 if self._evaluation.active else self._num_averaged(num_items)
            return (loss if done == wanted else loss * (wanted / done)), outputs

        of_model = self._model_loss
        if of_model is None:
            loss, outputs = compute(inputs, num_items)
        else:
            loss, outputs = of_model(compute, inputs, num_items, self._evaluation)
        return (loss, outputs) if return_outputs else loss

    def _with_labels(self, batch: Any) -> Any:
        """Return the batch with its labels under the name that the loss reads them by."""
        name = self.task.label_name
        if not self.task.shifts_labels or name == LABELS or not isinstance(batch, Mapping):
            return batch
        return batch if LABELS in batch or name not in batch else {**batch, LABELS: batch[name]}

    def _set_signature_columns_if_needed(self) -> None:
        """Do as `Trainer` does; add the columns that this class and its collators read."""
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        read = []
        if self.teacher is not None:
            read = [token_weights.KEY, self.task.label_name, *self.task.columns]
        read += getattr(self.data_collator, "columns", ())
        columns.extend(name for name in read if name not in columns)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Do as `Trainer` does, with the labels under their usual name."""
        named = epoch_iterator if self.teacher is None else map(self._with_labels, epoch_iterator)
        return super().get_batch_samples(named, num_batches, device)

    def _num_ranks(self) -> int:
        """Return how many processes have rows of their own; their gradients are averaged."""
        return self.accelerator.num_processes // self._num_copies

    def _num_averaged(self, num_items_in_batch: Tensor | int | None) -> int:
        """Return how many processes' gradients will be averaged though the count is of all."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return 1
        return self._num_ranks()

    def _count(self, batches: list[Any], device: torch.device) -> Tensor | None:
        """Return what this process's sums are divided by; None if the Trainer counts."""
        if self.teacher is not None:
            return self.task.count(batches, device, self._prepare_inputs, self._ask)
        return None if self._model_loss is None else self._model_loss.count(batches, device)

    def _watch_forgetting(self, dataset: Any) -> None:
        """Measure the cross-entropy of other rows in each evaluation, from now on; None: do not.

        Raises:
            ValueError: the dataset has no rows, or the student no tokens or no teacher.
        """
        if dataset is None:
            return
        if self.teacher is None or not self.task.shifts_labels:
            raise ValueError(
                "forgetting_dataset is measured of causal LMs, in runs with a teacher, got "
                f"{'none' if self.teacher is None else 'a classifier'}"
            )
        size = self.args.per_device_eval_batch_size
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, "forgetting")
        self._forgetting = Forgetting(dataset, self._collate_references, size)

    def _collate_references(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Make a batch of rows with the data's own completions, or of what the collator reads."""
        given = given_collator(self._wrapped[0] or self.data_collator)  # no teacher is asked
        collator = hint_collator_behind(given)
        batch = given(rows) if collator is None else collator.references(rows)
        return self._with_labels(batch)

    def _measure_forgetting(self) -> dict[str, float]:
        """Return what is left of what the student knew; every process must call it."""
        if self._forgetting is None:
            return {}
        model, reader = cast(nn.Module, self.model_wrapped), self._reader
        with self.compute_loss_context_manager():
            return self._forgetting.measure(
                lambda batch: behaviour_log_probs(reader, model, batch),
                self._prepare_inputs,
                self.accelerator,
                self._num_ranks(),
            )

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        """Count as `Trainer` does; token weights are summed, and a classifier's rows counted."""
        count = self._count(batch_samples, device)
        if self._evaluation.active and (self.teacher is not None or self._model_loss is not None):
            return None  # a batch of an evaluation has its own
        if count is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = cast(Tensor, self.accelerator.gather(count[None])).sum(0)
        # processes that share rows have counted them several times
        return count / (self._num_copies * self._num_parts)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer` does, without what an attempt that did not end has measured."""
        self._read_metrics(training=True)
        filters = self.args.logging_nan_inf_filter
        # with a teacher a loss that is not finite has raised an error before; the filter would
        # look for it again behind each backward, and wait for its end
        self.args.logging_nan_inf_filter = filters and self.teacher is None
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = filters

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss; logits and labels only for who computes metrics from them."""
        inputs = inputs if self.teacher is None else self._with_labels(inputs)
        found: tuple[Any, Any, Any]
        with self._evaluation.batch(rows_that_count(self.accelerator, inputs)):
            if self.teacher is None or not prediction_loss_only:
                given = model, inputs, prediction_loss_only, ignore_keys
                found = super().prediction_step(*given)
            else:
                found = self._loss_alone(model, inputs), None, None
            loss, logits, labels = found
            return None if loss is None else self._evaluation.add(loss), logits, labels

    def _loss_alone(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Return the loss of a batch, without its logits."""
        inputs = self._prepare_inputs(inputs)
        self._get_num_items_in_batch([inputs], self.args.device)  # may ask the teacher
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Do as `Trainer` does, with metrics of scored tokens; the loss is the mean over all."""
        self._start_evaluation()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = self._read_metrics(training=False) | self._measure_forgetting()
        of_text = self.teacher is not None and self.task.shifts_labels and self._scores_data()
        if of_text and "hard" in metrics:
            metrics["perplexity"] = perplexity(metrics["hard"])
        loss = self._evaluation.read(self.accelerator)
        if loss is not None:
            metrics["loss"] = loss
        found = cast(dict, output.metrics)
        of_user = f"{metric_key_prefix}_perplexity" in found
        for name, value in metrics.items():
            if not (of_user and name == "perplexity"):
                found[f"{metric_key_prefix}_{name}"] = value
        return output

    def _start_evaluation(self) -> None:
        """Forget what an evaluation has left that did not end, and say what is evaluated."""
        self._evaluation.start()
        self._read_metrics(training=False)
        own_loss = self._own_loss is not None
        moving = config_schedules.moving_schedules(self.args, own_loss)
        if moving and not self._told:
            values = config_schedules.values_at(self.args, config_schedules.LAST_STEP)
            shown = ", ".join(f"{name} {values[name]:g}" for name in moving)
            logger.info("evaluation: its losses are those of the schedules' last values, %s", shown)
        self._told = True

    def _read_metrics(self, training: bool) -> dict[str, float]:
        """Return what was measured since the last reading; every process must call it."""
        raise NotImplementedError

    def _ask(self, inputs: dict[str, Any]) -> Signal:
        """Return the teacher's signal of a batch on its device."""
        raise NotImplementedError
