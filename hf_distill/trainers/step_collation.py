"""Hints that depend on the optimizer step: rows are collated where the step is known.

A data loader reads ahead, in processes of its own, so a collator does not know the step that its
batch is for. Where what it makes depends on the step, the loader passes the rows on as they are,
and the trainer collates them when it takes a step's batches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from hf_distill.data import row_columns
from hf_distill.data.hint_schedule import collator_at_step, hint_schedule_of
from hf_distill.data.hints import Row
from hf_distill.data.rendering import DROPPED, MASKED, TRUNCATED
from hf_distill.data.sides import UNCONTRASTED
from hf_distill.data.token_batches import TokenBatchSampler
from hf_distill.data.turn_ends import tell_end_tokens
from hf_distill.models.structure import causal_lm, generation_end_ids
from hf_distill.monitoring.metrics import ShareMeter
from hf_distill.trainers.restarts import RestartingTrainer
from hf_distill.trainers.token_loader import (
    EpochCallback,
    check_token_budget,
    measured,
    token_loader,
)

ROWS = "rows_to_collate"  # the only key of a batch that is not made yet


class DeferredCollator:
    """Leaves a data collator's work to the trainer.

    Args:
        collator: makes the batches; a `HintCollator` with a plan, or around one.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.columns = tuple(getattr(collator, "columns", ()))

    def __call__(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Return the rows as they are."""
        return {ROWS: list(rows)}


def defer_collator(collator: Any, args: TrainingArguments) -> Any:
    """Return what a data loader collates with: it passes rows on if they need the step.

    Raises:
        ValueError: `dispatch_batches` is set, which cuts tensors, and rows are passed on.
    """
    if hint_schedule_of(collator) is None:
        return collator
    loader: Any = args.accelerator_config
    if loader.dispatch_batches:
        raise ValueError(
            "dispatch_batches cuts tensors only, and hints that depend on the step pass rows "
            "through the data loader: set it to False, got True"
        )
    loader.dispatch_batches = False  # None would be True for an iterable dataset
    return DeferredCollator(collator)


def _is_empty(dataset: Any) -> bool:
    return has_length(dataset) and not len(dataset)


def given_collator(collator: Any) -> Any:
    """Return the data collator that a trainer was given, also where its work is left to it."""
    return collator.collator if isinstance(collator, DeferredCollator) else collator


def wrap_collator(collator: Any, wrap: Callable[[Any], Any]) -> Any:
    """Wrap a collator in another one; a deferred one stays deferred."""
    if isinstance(collator, DeferredCollator):
        return DeferredCollator(wrap(collator.collator))
    return wrap(collator)


def shows_hints(batch: Mapping[str, Any], num_rows: int) -> bool:
    """Return whether one of a batch's first rows kept its hints, as far as the collator says."""
    dropped = batch.get(DROPPED)
    return dropped is None or not bool(dropped[:num_rows].all())


class StepCollation:
    """Collates with the step's hints, and measures them.

    Logged: `hint_dropout` and `max_hint_length`, where they are not fixed, are the values of the
    last step; `hints_dropped` and `hints_truncated` are the shares of rows whose hints were left
    out or cut, over all processes since the last log, `hints_masked` that of rows in whose hints a
    part is hidden, and `uncontrasted` that of rows without a wrong hint where a contrast was asked
    for.

    Args:
        seed: of the training; it and the step decide whose hints are dropped.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._values: dict[bool, dict[str, float]] = {True: {}, False: {}}
        self._shares = {
            training: {
                TRUNCATED: ShareMeter("hints_truncated"),
                DROPPED: ShareMeter("hints_dropped"),
            }
            for training in (True, False)
        }

    def at(self, collator: Any, step: int, training: bool) -> Any:
        """Return the collator as it is at an optimizer step. Evaluation drops no hints."""
        plan = hint_schedule_of(collator)
        if plan is None:
            return collator
        self._values[training] = plan.values(step, training)
        return collator_at_step(collator, step, self.seed if training else None)

    def made(
        self, batches: Iterable[Any], collator: Any, step: int, training: bool
    ) -> Iterator[Any]:
        """Yield batches of a data loader, made if they are rows still, and counted.

        Args:
            batches: read no further than what is taken of the result.
            collator: of the loader.
            step: optimizer steps taken.
            training: else evaluation.
        """
        return (self._made(batch, collator, step, training) for batch in batches)

    def _made(self, batch: Any, collator: Any, step: int, training: bool) -> Any:
        if isinstance(batch, Mapping) and ROWS in batch:
            batch = self.at(collator.collator, step, training)(batch[ROWS])
        self.count(batch, training)
        return batch

    def count(self, batch: Any, training: bool) -> None:
        """Count the rows of a batch whose collator says what became of their hints."""
        for name, metric in ((UNCONTRASTED, "uncontrasted"), (MASKED, "hints_masked")):
            if isinstance(batch, Mapping) and name in batch:  # else nobody waits for its sum
                self._shares[training].setdefault(name, ShareMeter(metric))
        for name, meter in self._shares[training].items():
            flags: Tensor | None = batch.get(name) if isinstance(batch, Mapping) else None
            if flags is not None:
                meter.add(flags)

    def read(self, accelerator: Accelerator, training: bool) -> dict[str, float]:
        """Return the metrics; shares start anew. Every process must call it."""
        metrics = dict(self._values[training])
        for meter in self._shares[training].values():
            metrics |= meter.read(accelerator)
        return metrics


class CollatingLoader:
    """Makes batches as they are read; in all else it is the data loader inside.

    Args:
        loader: of the evaluation.
        hinting: makes the batches.
        collator: of the loader.
        step: optimizer steps taken.
    """

    def __init__(self, loader: Any, hinting: StepCollation, collator: Any, step: int) -> None:
        self._loader, self._hinting = loader, hinting
        self._collator, self._step = collator, step

    def __iter__(self) -> Iterator[Any]:
        return self._hinting.made(self._loader, self._collator, self._step, training=False)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class StepCollatingTrainer(RestartingTrainer):
    """Makes batches of rows where hints depend on the step."""

    def __init__(
        self, model: Any, args: TrainingArguments, data_collator: Any, *others: Any, **kwargs: Any
    ) -> None:
        self._hinting = StepCollation(args.seed)
        self._wrapped: tuple[Any, Any] = None, None  # a collator, and the one around it
        self._has_default_collator = data_collator is None
        self._lengths: tuple[Any, Sequence[int], bool] | None = None  # of the data, once measured
        super().__init__(model, args, defer_collator(data_collator, args), *others, **kwargs)
        self._tell_end_tokens(generation_end_ids(causal_lm(cast(nn.Module, self.model))))

    def _tell_end_tokens(self, ids: list[int]) -> None:
        """Tell collators of replies at which ids the student ends its own."""
        self.data_collator = wrap_collator(self.data_collator, lambda x: tell_end_tokens(x, ids))

    def _set_up_again(self, keeps_teacher: bool) -> None:
        self._hinting = StepCollation(self.args.seed)
        if self.data_collator is self._wrapped[1]:
            self.data_collator = self._wrapped[0]
        super()._set_up_again(keeps_teacher)

    def _wrap_collator(self, wrap: Callable[[Any], Any]) -> None:
        given = self.data_collator
        self.data_collator = wrap_collator(given, wrap)
        self._wrapped = given, self.data_collator

    def _reads_rows(self) -> bool:
        """Return whether the data collator may read any column of the rows."""
        return row_columns.reads_all_columns(self.data_collator)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Do as `Trainer` does; a collator of prompts and hints gets the rows as they are."""
        if self._reads_rows():
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        """Do as `Trainer` does; a collator of prompts and hints gets the rows as they are."""
        if self._reads_rows():
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer` does, for rows that something reads."""
        if description == "Training" and _is_empty(dataset):
            raise ValueError(
                f"train_dataset must have rows, got a {type(dataset).__name__} of none"
            )
        self._check_columns(dataset, description)
        if description == "Training" and getattr(self.args, "max_tokens_per_batch", None):
            return self._token_loader(dataset)
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _token_loader(self, dataset: Any) -> Any:
        """Make the loader of the training where batches are filled up to a number of tokens."""
        check_token_budget(dataset, given_collator(self.data_collator), self.args)
        given, collate, alone = dataset, self.data_collator, self._collator_alone()
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, "Training")
        else:
            without = self._get_collator_with_removed_columns
            collate, alone = (without(x, "Training") for x in (collate, alone))
        if self._lengths is None or self._lengths[0] is not given:
            column = self.args.length_column_name
            self._lengths = given, *measured(given, dataset, alone, column)
        _, lengths, packed = self._lengths
        num_ranks = self.accelerator.num_processes // self.get_tp_size()
        about = lengths, packed, self.args, self._train_batch_size, num_ranks
        loader = token_loader(dataset, collate, *about)
        self._put_callback(EpochCallback(cast(TokenBatchSampler, loader.batch_sampler)))
        return self.accelerator.prepare(loader)

    def _collator_alone(self) -> Any:
        """Return what rows are measured with: the given collator, without what asks a teacher."""
        collator = self._wrapped[0] or self.data_collator
        if isinstance(collator, DeferredCollator):  # measured with all hints
            return collator_at_step(collator.collator, 0, None)
        return collator

    def _check_columns(self, dataset: Any, description: str) -> None:
        """Check that the model and the collator see something of the rows.

        Raises:
            ValueError: naming the columns, and what to do with such rows.
        """
        columns = row_columns.columns_of(dataset)
        if columns is None or self._reads_rows():
            return
        told, read = row_columns.advice(columns), {"input_ids"}
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            labels = {"label", "label_ids", *(self.label_names or ())}
            read |= {*cast("list[str]", self._signature_columns)} - labels
            if not self._has_default_collator:
                told = f" (remove_unused_columns=False keeps them for a collator of your own){told}"
        elif not (self._has_default_collator and told):
            return  # a collator may read what it likes
        if not read & set(columns):
            raise ValueError(
                f"neither the model nor the data collator reads one of the columns {columns} of "
                f"the {description.lower()} set{told}"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Do as `Trainer` does; rows that waited for their step become batches."""
        step = self.state.global_step
        batches = self._hinting.made(epoch_iterator, self.data_collator, step, training=True)
        return super().get_batch_samples(batches, num_batches, device)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer` does; hints are as long as at the present step, and none is dropped."""
        made = CollatingLoader(
            dataloader, self._hinting, self.data_collator, self.state.global_step
        )
        return super().evaluation_loop(cast(DataLoader, made), *args, **kwargs)
