"""Every field of TrainingArguments, beside the Trainer: alpha 0, with a teacher and without one.

A few deterministic steps, then weights and logs are compared. Where the numbers differ from the
Trainer's they are the documented ones, see docs/pages/differences.md.
"""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_distill import DistillConfig, DistillTrainer
from tests.hf_distill.trainers import models

FIELDS = {x.name for x in dataclasses.fields(TrainingArguments)}  # of this Transformers
ROUNDING = 2e-6  # see test_equivalence.py
# relative, of means of float32 losses that are summed in another order; measured: 3e-7
SUM_ERROR = 1e-5
# what a machine needs for a run, and the operations: a teacher's are not counted
COSTS = ("runtime", "_per_second", "preparation_time", "_flos", "_mem_", "_delta")

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
# one batch: its mean is that of the tokens, so that the best model is the Trainer's
WHOLE = EVALUATED | {"per_device_eval_batch_size": 6}
SAVED = {"save_strategy": "steps", "save_steps": 1}
LENGTHS = {"train_sampling_strategy": "group_by_length"}
WORKERS = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
# What is tried of a field, with what it needs beside it
TRIED: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "num_train_epochs": {"num_train_epochs": 0.5, "max_steps": -1},
    "max_steps": {"max_steps": 1},
    "learning_rate": {"learning_rate": 5e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
    },
    "warmup_steps": {"lr_scheduler_type": "linear", "warmup_steps": 2},
    "optim": {"optim": "sgd"},
    "optim_args": {"optim": "rmsprop", "optim_args": "alpha=0.9"},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "label_smoothing_factor": {"label_smoothing_factor": 0.2},
    "bf16": {"bf16": True},
    "bf16_full_eval": {"bf16_full_eval": True, **EVALUATED},
    "activation_checkpointing": {"activation_checkpointing": True},
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "use_cache": {"use_cache": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "logging_strategy": {"logging_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1},
    "logging_steps": {"logging_steps": 2},
    "logging_first_step": {"logging_steps": 3, "logging_first_step": True},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "non_padding"},
    "eval_strategy": {"eval_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1},
    "eval_steps": EVALUATED,
    "eval_delay": {**EVALUATED, "eval_delay": 2},
    "per_device_eval_batch_size": {**EVALUATED, "per_device_eval_batch_size": 6},
    "prediction_loss_only": {**EVALUATED, "prediction_loss_only": True},
    "eval_on_start": {**EVALUATED, "eval_on_start": True},
    "eval_do_concat_batches": {**EVALUATED, "eval_do_concat_batches": False},
    "eval_accumulation_steps": {**EVALUATED, "eval_accumulation_steps": 1},
    "include_for_metrics": {**EVALUATED, "include_for_metrics": ["inputs", "loss"]},
    "batch_eval_metrics": {**EVALUATED, "batch_eval_metrics": True},
    "save_only_model": {**SAVED, "save_only_model": True},
    "save_strategy": {**WHOLE, "save_strategy": "best", "metric_for_best_model": "loss"},
    "save_steps": {**SAVED, "save_steps": 2},
    "save_total_limit": {**SAVED, "save_total_limit": 1},
    "load_best_model_at_end": {
        **WHOLE,
        **SAVED,
        "load_best_model_at_end": True,
        "learning_rate": 1e-2,
    },
    "metric_for_best_model": {
        **WHOLE,
        **SAVED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    },
    "greater_is_better": {
        **WHOLE,
        **SAVED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    },
    "full_determinism": {"full_determinism": True},
    "seed": {"seed": 4, "train_sampling_strategy": "random"},
    "data_seed": {"data_seed": 9, "train_sampling_strategy": "random"},
    "accelerator_config": {"accelerator_config": {"even_batches": False}},
    "dataloader_drop_last": {
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "max_steps": -1,
    },
    "dataloader_num_workers": WORKERS,
    "remove_unused_columns": {"remove_unused_columns": False},
    "label_names": {"label_names": ["labels"], **EVALUATED},
    "train_sampling_strategy": LENGTHS,
    "length_column_name": {**LENGTHS, "length_column_name": "size", "remove_unused_columns": False},
    "do_eval": {"do_eval": True},
    "skip_memory_metrics": {"skip_memory_metrics": False},
}

DEVICE = "needs an accelerator"
SEVERAL = "needs several processes, see tests/hf_distill/distributed"
NETWORK = "reaches a server"
RECORDS = "changes what is printed or reported, no number"
OTHERS = "is of other arguments, which are tried"
# What is not tried, and why
UNTRIED: dict[str, str] = {
    "output_dir": "is given to every run",
    "optim_target_modules": "is of optimizers of packages that are not installed",
    "average_tokens_across_devices": SEVERAL,
    "fp16": DEVICE,
    "fp16_full_eval": "has no float16 kernels on every CPU",
    "tf32": DEVICE,
    "gradient_checkpointing": "is the old name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "is the old name of activation_checkpointing_kwargs",
    "torch_compile": "takes a compiler and a minute; see tests/hf_distill/trainers",
    "torch_compile_backend": "takes a compiler and a minute",
    "torch_compile_mode": "takes a compiler and a minute",
    "use_liger_kernel": "needs a package that is not installed, and an accelerator",
    "liger_kernel_config": "needs a package that is not installed, and an accelerator",
    "log_on_each_node": SEVERAL,
    "log_level": RECORDS,
    "log_level_replica": RECORDS,
    "disable_tqdm": RECORDS,
    "report_to": RECORDS,
    "run_name": RECORDS,
    "project": RECORDS,
    "trackio_space_id": NETWORK,
    "trackio_bucket_id": NETWORK,
    "trackio_static_space_id": NETWORK,
    "eval_use_gather_object": SEVERAL,
    "save_on_each_node": SEVERAL,
    "enable_jit_checkpoint": "answers a signal",
    "push_to_hub": NETWORK,
    "hub_token": NETWORK,
    "hub_private_repo": NETWORK,
    "hub_model_id": NETWORK,
    "hub_strategy": NETWORK,
    "hub_always_push": NETWORK,
    "hub_revision": NETWORK,
    "ignore_data_skip": "is of resumed runs, see test_resume.py",
    "restore_callback_states_from_checkpoint": "is of resumed runs, see test_resume.py",
    "use_cpu": "is given to every run",
    "parallelism_config": SEVERAL,
    "dataloader_pin_memory": DEVICE,
    "dataloader_persistent_workers": "keeps workers, which are tried, and changes no number",
    "dataloader_prefetch_factor": "is of workers, which are tried, and changes no number",
    "dataloader_in_order": "is of several workers, and changes no number of one",
    "dataloader_multiprocessing_context": OTHERS,
    "ddp_find_unused_parameters": SEVERAL,
    "ddp_bucket_cap_mb": SEVERAL,
    "ddp_broadcast_buffers": SEVERAL,
    "ddp_static_graph": SEVERAL,
    "ddp_backend": SEVERAL,
    "ddp_timeout": SEVERAL,
    "fsdp": SEVERAL,
    "fsdp_config": SEVERAL,
    "deepspeed": SEVERAL,
    "debug": "looks for numbers that overflow and changes none",
    "do_train": "is read by scripts",
    "do_predict": "is read by scripts",
    "resume_from_checkpoint": "is read by scripts",
    "local_rank": SEVERAL,
}

# Fields that make no other run on one process, of rows in order on the CPU
WITHOUT_EFFECT = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "use_cache",
    "torch_empty_cache_steps",
    "auto_find_batch_size",
    "logging_nan_inf_filter",
    "save_only_model",
    "save_steps",
    "save_total_limit",
    "full_determinism",
    "accelerator_config",
    "dataloader_num_workers",
    "remove_unused_columns",
    "do_eval",
    "skip_memory_metrics",
}
# bfloat16 has 8 bits: a teacher's run computes the cross-entropy from logits in float32, the model
# itself from the same logits, but their gradients are rounded to bfloat16 at other places
ROUGH = {"bf16": 2e-3, "bf16_full_eval": 1e-2}


def test_every_field_is_tried_or_has_a_reason() -> None:
    missing = FIELDS - TRIED.keys() - UNTRIED.keys()
    assert not missing, f"try these, or say why not: {sorted(missing)}"
    assert not TRIED.keys() & UNTRIED.keys()
    assert TRIED.keys() >= WITHOUT_EFFECT


class Run(NamedTuple):
    """What a run leaves: weights, logs without costs, the best checkpoint and those kept."""

    weights: dict[str, Tensor]
    logs: list[dict[str, float]]
    best: str | None
    kept: set[str]


class Pad(models.Pad):
    """The usual collator, also for rows that have other columns."""


@functools.cache
def rows() -> list[dict[str, Any]]:
    made: Any = models.rows(8, longest=9)
    for row in made:
        row["size"] = len(row["input_ids"])
        row["length"] = len(row["input_ids"])
    return made


def compute(prediction: Any, compute_result: bool = True) -> dict[str, float]:
    """Something of what users are given, which must be the same."""
    listed = isinstance(prediction.predictions, list)
    first = prediction.predictions[0] if listed else prediction.predictions
    return {"size": float(len(first)), "mean": float(abs(first[first != -100]).mean())}


USED = ("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "label_names")


def train(folder: Path, kind: str, field: str | None) -> Run:
    settings = models.options(folder, max_steps=3) | (TRIED[field] if field else {})
    extra: dict[str, Any] = {"compute_metrics": compute} if field in USED else {}
    given: Any = models.llama(num_hidden_layers=1), None, Pad(), rows(), models.rows(6, seed=1)
    if kind == "trainer":
        made: Any = Trainer(given[0], TrainingArguments(**settings), *given[2:], **extra)
    else:
        args = DistillConfig(**settings, alpha=0.0, watchdog={"action": "off"})
        teacher = models.llama(1, num_hidden_layers=1) if kind == "teacher" else None
        made = DistillTrainer(given[0], args, *given[2:], teacher=teacher, **extra)
    made.train()
    logs = [
        {k: v for k, v in log.items() if not any(x in k for x in COSTS)}
        for log in made.state.log_history
    ]
    best = made.state.best_model_checkpoint
    kept = {path.name for path in folder.glob("checkpoint-*")}
    return Run(models.weights(made.model), logs, best and Path(best).name, kept)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The Trainer's run of the defaults."""
    return train(tmp_path_factory.mktemp("plain"), "trainer", None)


@functools.cache
def of_trainer(field: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder), "trainer", field)


def mean_of_evaluation(weights: dict[str, Tensor]) -> float:
    """The mean cross-entropy of the evaluated tokens: not the Trainer's, a mean over batches."""
    model = models.llama(num_hidden_layers=1)
    model.load_state_dict(weights)
    total, count = 0.0, 0
    for row in models.rows(6, seed=1):
        ids, labels = (torch.tensor([row[x]]) for x in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
        total, count = total + float(losses.sum()), count + int((labels[0, 1:] != -100).sum())
    return total / count


def assert_same(found: Run, want: Run, field: str) -> None:
    rough = ROUGH.get(field)
    assert models.difference(found.weights, want.weights) <= (rough or ROUNDING)
    assert (found.best, found.kept) == (want.best, want.kept)
    assert len(found.logs) == len(want.logs)
    for log, other in zip(found.logs, want.logs, strict=True):
        assert log.keys() >= other.keys()
        same = other.keys() - {"eval_loss"}  # a mean over tokens here, over batches there
        assert {x: log[x] for x in same} == pytest.approx(
            {x: other[x] for x in same}, rel=rough or 10 * SUM_ERROR, abs=1e-7
        )


@pytest.mark.parametrize("kind", ["teacher", "none"])
@pytest.mark.parametrize("field", [x for x in TRIED if TRIED[x].keys() <= FIELDS])
def test_a_field_does_what_it_does_in_the_trainer(
    tmp_path: Path, plain: Run, field: str, kind: str
) -> None:
    want, found = of_trainer(field), train(tmp_path, kind, field)
    assert_same(found, want, field)
    losses = [log["eval_loss"] for log in found.logs if "eval_loss" in log]
    if losses and field not in ROUGH and not TRIED[field].get("load_best_model_at_end"):
        assert losses[-1] == pytest.approx(mean_of_evaluation(found.weights), rel=SUM_ERROR)
    changes = models.difference(want.weights, plain.weights) > 0 or want.logs != plain.logs
    assert changes == (field not in WITHOUT_EFFECT), "tries nothing, or has an effect"
    assert all(math.isfinite(x) for x in losses)
