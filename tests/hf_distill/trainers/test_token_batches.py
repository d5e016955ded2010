"""Batches filled up to a number of tokens: their rows, on several processes, and in trainings."""

import logging
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.token_batches import TokenBatchSampler
from hf_distill.trainers.token_loader import EpochCallback
from tests.hf_distill.trainers import models

ROWS = models.rows(19)
LENGTHS = [len(row["input_ids"]) for row in ROWS]


def sampler(max_tokens: int = 30, max_rows: int = 5, packed: bool = True, **changes: Any) -> Any:
    return TokenBatchSampler(LENGTHS, max_tokens, max_rows, packed, **changes)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_batches_hold_all_rows_within_the_budget(packed: bool, num_processes: int) -> None:
    made = sampler(packed=packed, num_processes=num_processes, seed=5)
    batches = list(made)
    assert len(batches) == len(made)
    assert len(batches) % num_processes == 0
    assert sorted(row for batch in batches for row in batch) == list(range(len(ROWS)))
    for batch in batches:
        lengths = [LENGTHS[i] for i in batch]
        assert (sum(lengths) if packed else max(lengths) * len(batch)) <= 30
        assert len(batch) <= 5
    shards = [list(BatchSamplerShard(made, num_processes, rank)) for rank in range(num_processes)]
    assert [x for turn in zip(*shards, strict=True) for x in turn] == batches


def test_batches_are_filled_as_far_as_they_go() -> None:
    for packed in (False, True):
        batches = list(sampler(packed=packed, max_rows=19, shuffle=False))
        for batch, following in pairwise(batches):
            lengths = [LENGTHS[i] for i in (*batch, following[0])]
            assert (sum(lengths) if packed else max(lengths) * len(lengths)) > 30
    assert max(map(len, sampler(max_tokens=10**6, max_rows=4))) == 4


def test_each_epoch_has_the_batches_in_another_order() -> None:
    made = sampler(seed=1)
    first = list(made)
    assert list(made) == first
    made.sampler.set_epoch(1)
    assert list(made) != first
    assert sorted(made) == sorted(first)
    assert sorted(sampler(seed=2)) != sorted(first)
    in_order = sampler(shuffle=False)
    in_order.sampler.set_epoch(1)
    assert [i for batch in in_order for i in batch] == list(range(len(ROWS)))


@pytest.mark.parametrize(("told", "epoch"), [(None, 0), (0.9, 0), (1.0, 1), (2.9999999, 3)])
def test_a_callback_says_the_epoch(told: float | None, epoch: int) -> None:
    """Accelerate does not reach the sampler of several processes that skip batches."""
    batches = sampler()
    state: Any = SimpleNamespace(epoch=told)
    EpochCallback(batches).on_epoch_begin(None, state, None)
    assert batches.sampler.epoch == epoch


def test_drop_last_leaves_out_what_not_all_processes_have() -> None:
    whole = list(sampler())
    dropped = list(sampler(num_processes=3, drop_last=True))
    assert dropped == whole[: len(whole) // 3 * 3]
    assert len(dropped) < len(whole)


def test_a_row_longer_than_the_budget_is_an_error() -> None:
    longest = LENGTHS.index(max(LENGTHS))
    with pytest.raises(ValueError, match=rf"got 14 in row {longest} .* max_tokens_per_batch=13"):
        sampler(13)


def trainer(folder: Path, collator: Any = None, rows: Any = None, **changes: Any) -> DistillTrainer:
    settings = {"max_tokens_per_batch": 40, "per_device_train_batch_size": 8} | changes
    args = DistillConfig(**models.options(folder, **settings))
    collator = DataCollatorWithFlattening() if collator is None else collator
    rows = ROWS if rows is None else rows
    return DistillTrainer(models.llama(), args, collator, rows, teacher=models.llama(1))


def sizes(run: DistillTrainer) -> list[int]:
    return [batch["input_ids"].numel() for batch in run.get_train_dataloader()]


def test_loaders_keep_the_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        packed = sizes(trainer(tmp_path))
    assert sum(packed) == sum(LENGTHS)
    assert max(packed) <= 40 < 2 * max(packed)
    assert f"{len(packed)} batches of at most 40 tokens and 8 rows" in caplog.text
    padded = sizes(trainer(tmp_path, models.Pad()))
    assert max(padded) <= 40
    assert len(padded) > len(packed)
    data = Dataset.from_list([row | {"text": "unread"} for row in ROWS])
    assert sizes(trainer(tmp_path, rows=data)) == packed
    known = data.add_column("length", [20] * len(ROWS), new_fingerprint="known")
    assert (
        max(len(x) for x in trainer(tmp_path, rows=known).get_train_dataloader().batch_sampler) == 2
    )


def test_hinted_rows_are_measured_on_their_longer_side(tmp_path: Path) -> None:
    rows, tokenizer = models.problems(12), models.tokenizer()
    collator = HintCollator(tokenizer, packing=True, hint_dropout=0.5)
    settings = {"on_policy": False, "max_tokens_per_batch": 70, "per_device_train_batch_size": 12}
    run = OPSDTrainer(
        models.llama(), OPSDConfig(**models.options(tmp_path, **settings)), collator, rows,
        processing_class=tokenizer, teacher=models.llama(1),
    )  # fmt: skip
    batches = list(run.get_train_dataloader().batch_sampler)
    whole = HintCollator(tokenizer, packing=True)
    each = [whole([row])["teacher_input_ids"].shape[1] for row in rows]
    totals = [sum(each[i] for i in batch) for batch in batches]
    assert max(totals) <= 70 < min(a + min(each) for a in totals[:-1]) + max(each)
    run.train()


def test_a_step_of_several_batches_is_one_of_their_rows(tmp_path: Path) -> None:
    """Four batches accumulated are the same rows in one batch."""
    run = trainer(tmp_path, gradient_accumulation_steps=4, max_steps=1)
    first = list(run.get_train_dataloader().batch_sampler)[:4]
    run.train()
    together = [ROWS[i] for batch in first for i in batch]
    whole = trainer(
        tmp_path, rows=together, max_steps=1, max_tokens_per_batch=None,
        per_device_train_batch_size=len(together),
    )  # fmt: skip
    whole.train()
    assert models.difference(models.weights(run.model), models.weights(whole.model)) <= 2e-6


def test_a_resumed_run_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    options = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "random",
    }
    whole = trainer(tmp_path, **options)
    assert len(whole.get_train_dataloader()) < 7  # it ends in the second epoch
    whole.train()
    for step in (2, 8):
        resumed = trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert models.difference(models.weights(resumed.model), models.weights(whole.model)) == 0.0


def test_what_has_no_lengths_is_refused(tmp_path: Path) -> None:
    endless = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="needs a data set with a length"):
        trainer(tmp_path, rows=endless).train()
    with pytest.raises(ValueError, match="set train_sampling_strategy to one of"):
        trainer(tmp_path, train_sampling_strategy="group_by_length").train()
    with pytest.raises(ValueError, match="max_tokens_per_batch must be at least 1, got 0"):
        trainer(tmp_path, max_tokens_per_batch=0)
    with pytest.raises(ValueError, match="max_tokens_per_batch=13: raise it"):
        trainer(tmp_path, max_tokens_per_batch=13).train()
    with pytest.raises(ValueError, match="split_batches cuts batches of one size"):
        trainer(tmp_path, accelerator_config={"split_batches": True}).train()
    tokenizer = models.tokenizer()
    faded = HintCollator(tokenizer, max_hint_length="linear:8->2@5", truncation="hint")
    settings = {"on_policy": False, "max_tokens_per_batch": 90}
    args = OPSDConfig(**models.options(tmp_path, **settings))
    run = OPSDTrainer(models.llama(), args, faded, models.problems(8), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"needs rows of fixed lengths: .*max_hint_length"):
        run.train()
    args = OPSDConfig(**models.options(tmp_path, max_tokens_per_batch=90))
    with pytest.raises(ValueError, match="lengths are known before they are sampled"):
        OPSDTrainer(models.llama(), args, HintCollator(tokenizer), models.problems(8))


def test_steps_of_several_processes_hold_the_rows_of_one() -> None:
    alone, both = list(sampler(seed=3)), list(sampler(seed=3, num_processes=3))
    assert len(alone) % 3
    steps = [[sorted(chain(*x[i : i + 3])) for i in range(0, len(x), 3)] for x in (alone, both)]
    assert steps[0] == steps[1]
