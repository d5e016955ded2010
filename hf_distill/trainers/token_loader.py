"""The data loader of a training whose batches are filled up to a number of tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length, seed_worker

from hf_distill.data.hint_schedule import hint_schedule_of
from hf_distill.data.token_batches import TokenBatchSampler, packs, row_lengths

STRATEGIES = ("random", "sequential")
LOADER = ("num_workers", "pin_memory", "persistent_workers", "multiprocessing_context")
EPOCH_ROUNDING = 1e-6  # of a sum of shares of an epoch
LOADER = (*LOADER, "prefetch_factor", "in_order")  # arguments that are settings too


class EpochCallback(TrainerCallback):
    """Tells the sampler of token batches its epoch, which a resumed run of several processes hides.

    Args:
        sampler: of the batches.
    """

    def __init__(self, sampler: TokenBatchSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch; of a run that is resumed inside of one it is that one."""
        self._sampler.sampler.set_epoch(int((state.epoch or 0) + EPOCH_ROUNDING))


def check_token_budget(dataset: Any, collator: Any, args: TrainingArguments) -> None:
    """Check that rows have lengths that are known before the training.

    Raises:
        ValueError: the data set has no length, the order of rows is another sampler's, or hints
            have other lengths at other steps.
    """
    if not has_length(dataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "max_tokens_per_batch needs a data set with a length, whose rows are measured first, "
            f"got a {type(dataset).__name__}"
        )
    strategy = args.train_sampling_strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            "max_tokens_per_batch decides which rows make a batch: set train_sampling_strategy to "
            f"one of {STRATEGIES}, got {strategy!r}"
        )
    loader: Any = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(loader, name):
            raise ValueError(
                f"{name} cuts batches of one size, and max_tokens_per_batch makes others: set it "
                "to False, got True"
            )
    plan = hint_schedule_of(collator)
    if plan is not None and plan.length_changes:
        raise ValueError(f"max_tokens_per_batch needs rows of fixed lengths: {plan.refusal()}")


def measured(
    given: Any, dataset: Any, collate: Callable[[list[Any]], Any], column: str
) -> tuple[Sequence[int], bool]:
    """Return the tokens of each row, and whether the collator packs them.

    Args:
        given: the data set, which may have a column of lengths.
        dataset: without the columns that nothing reads.
        collate: makes batches of its rows.
        column: the name of a column of lengths.
    """
    names = getattr(given, "column_names", None)
    known = isinstance(names, list) and column in names
    lengths = [int(x) for x in given[column]] if known else row_lengths(dataset, collate)
    return lengths, packs(dataset, collate)


def token_loader(
    dataset: Any,
    collate: Any,
    lengths: Sequence[int],
    packed: bool,
    args: Any,
    max_rows: int,
    num_processes: int,
) -> DataLoader:
    """Return a loader like the Trainer's, with batches of at most `max_tokens_per_batch` tokens.

    Args:
        dataset: without columns that nothing reads.
        collate: what the loader's workers do.
        lengths: of its rows.
        packed: whether a batch is one sequence.
        args: of the training.
        max_rows: of a batch.
        num_processes: with rows of their own.
    """
    sampler = TokenBatchSampler(
        lengths,
        args.max_tokens_per_batch,
        max_rows,
        packed,
        num_processes,
        args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy == "random",
        drop_last=args.dataloader_drop_last,
    )
    settings = {name: getattr(args, f"dataloader_{name}", None) for name in LOADER}
    settings = {name: value for name, value in settings.items() if value is not None}
    seeded = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, worker_init_fn=seeded, **settings
    )
