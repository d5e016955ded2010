"""Tiny deterministic runs by name: models, data, teachers, and trainers made of them.

For `tests.same_weights` and `tests.one_loss`, which compare the code before a change with the code
behind it. So this reads names of `hf_distill` itself only, and nothing of the other tests.
"""

import atexit
import gc
import hashlib
import json
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # the Hugging Face libraries read it when imported

import torch
from transformers import PrinterCallback, TrainerCallback

import hf_distill
from hf_distill import (
    Attempt,
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    Feedback,
    Hint,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    RoutedTeacher,
    cache_teacher,
)
from tests.tiny_models import (
    MODELS,
    Pad,
    class_rows,
    id_rows,
    letters,
    llama,
    problems,
    words,
)

ROWS, EVAL_ROWS = 80, 6
SELF_TEACHERS = ("base", "ema", "live", "lora_scale")


def silence() -> None:
    """At exit Triton's binding lists what it did not free, thirty lines."""
    if "triton" in sys.modules:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def prepare() -> None:
    """One thread, deterministic operations, no log lines and warnings of names; once a process."""
    atexit.register(silence)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    gc.collect()
    gc.freeze()  # the Trainer collects before each run, mostly what was imported


def judge(attempts: Sequence[Attempt]) -> list[Feedback]:
    """An environment: odd lengths are right; a wrong first reply is asked for again."""
    said = []
    for attempt in attempts:
        right = len(attempt.text.split()) % 2 == 1
        again = [] if right or attempt.turn else [{"role": "user", "content": "no , think first"}]
        wrong = None if right else "no , then add"
        said.append(Feedback(again, {"score": float(right), "wrong": wrong}))
    return said


class Data(NamedTuple):
    """Rows by (number, seed), what makes batches of them, and what reads them."""

    rows: Callable[[int, int], list[dict[str, Any]]]
    collator: Any
    tokenizer: Any = None
    environment: Any = None


def data_of(name: str) -> Data:
    """The data of that name.

    Raises:
        KeyError: there is none.
    """
    one = words()
    cross = getattr(hf_distill, "CrossTokenizerCollator", None) or hf_distill.CrossTokenizerCollator
    attempted = [
        Hint("no : {attempt} , {wrong}", optional=True),
        Hint("Hint : {sibling}", optional=True),
    ]
    dropping = {"hint_dropout": "linear:0.0->0.8@20", "max_hint_length": "linear:8->3@20"}

    def chats(count: int, seed: int) -> list[dict[str, Any]]:
        return problems(count, seed, chat=True)

    def weighted(count: int, seed: int) -> list[dict[str, Any]]:
        return id_rows(count, seed, weighted=True)

    return {
        "ids": Data(id_rows, Pad()),
        "ids-and-tokenizer": Data(id_rows, Pad(), one),
        "ids-weighted": Data(weighted, Pad(), one),
        "classes": Data(class_rows, Pad()),
        "text": Data(problems, HintCollator(one, ()), one),
        "letters": Data(problems, cross(one, letters()), one),
        "hints": Data(problems, HintCollator(one, "hint"), one),
        "dropped-hints": Data(
            problems, HintCollator(one, "hint", truncation="hint", **dropping), one
        ),
        "chats": Data(chats, HintCollator(one, Hint("{hint}", where="system")), one),
        "environment": Data(chats, HintCollator(one, attempted), one, judge),
    }[name]


def _cached(folder: Path, data: Data, codec: str) -> CachedTeacher:
    """Writes a cache: with the defaults from Python, with another codec on the command line."""
    path, rows = folder / "cache", data.rows(ROWS, 0)
    with redirect_stderr(StringIO()):  # bars of progress
        if codec == "default":
            cache_teacher(llama(1), rows, path, data_collator=data.collator)
        else:
            _write_cache(folder, rows, str(path), codec)
    return CachedTeacher(path)


def _write_cache(folder: Path, rows: list[dict[str, Any]], path: str, codec: str) -> None:
    model, lines = folder / "model", folder / "rows.jsonl"
    llama(1).save_pretrained(model)
    words().save_pretrained(model)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["hf_distill", "cache", "write", str(model), str(lines), path, "--codec", codec]
    try:
        with mock.patch.object(sys, "argv", argv):
            runpy.run_module("hf_distill", run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise RuntimeError(f"the cache was not written: {done.code}") from done


def _teacher(name: str, folder: Path, data: Data) -> Any:
    if name.startswith("cached-"):
        return _cached(folder, data, name.removeprefix("cached-"))
    if name == "routed":
        return RoutedTeacher({"even": llama(1), "odd": llama(2)}, "domain")
    return MODELS[name]()


def make(
    folder: Path,
    student: str = "llama",
    teacher: str | None = "other",
    data: str = "ids",
    opsd: bool = False,
    **settings: Any,
) -> DistillTrainer:
    """A trainer of one of the runs.

    Args:
        folder: for what the run writes.
        student: name of one of `MODELS`.
        teacher: the same, or "routed", "cached-default" or another codec's, or None; of an
            `OPSDTrainer` also a kind of self-teacher.
        data: name of the data, see `data_of`.
        opsd: whether it is an `OPSDTrainer`.
        **settings: of its config.
    """
    chosen = data_of(data)
    kind, config = (OPSDTrainer, OPSDConfig) if opsd else (DistillTrainer, DistillConfig)
    if teacher in SELF_TEACHERS:
        settings, teacher = settings | {"teacher": teacher}, None
    given = None if teacher is None else _teacher(teacher, folder, chosen)
    collator = chosen.collator
    if teacher == "routed" and hasattr(hf_distill, "routed"):  # else the trainer does it
        collator = hf_distill.routed(collator, given)
    more = {} if chosen.environment is None else {"environment": chosen.environment}
    defaults = {
        "output_dir": str(folder / "out"),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "seed": 3,
    }
    return kind(
        MODELS[student](),
        config(**defaults | ({"max_completion_length": 8} if opsd else {}) | settings),
        collator,
        chosen.rows(ROWS, 0),
        chosen.rows(EVAL_ROWS, 1),
        chosen.tokenizer,
        teacher=given,
        **more,
    )


class Trained(NamedTuple):
    """What a run has come to.

    digest: of the student's values and of all else that the optimizer has, whatever its names are.
    total: the sum of their absolute values.
    logs: what was logged, without times, as text that has all digits.
    """

    digest: str
    total: float
    logs: list[dict[str, str]]


class _Keep(TrainerCallback):
    """Reads all weights behind the last step, while what is trained beside the student is there."""

    digest, total = "", 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the Trainer."""
        if state.global_step < state.max_steps:
            return
        seen = dict.fromkeys(given["model"].parameters())
        seen |= dict.fromkeys(x for g in given["optimizer"].param_groups for x in g["params"])
        made = hashlib.sha256()
        for parameter in seen:
            value = parameter.detach().contiguous()
            made.update(f"{value.dtype} {tuple(value.shape)}".encode())
            made.update(value.view(torch.uint8).numpy().tobytes())
            self.total += value.double().abs().sum().item()
        self.digest = made.hexdigest()[:16]


def train(trainer: DistillTrainer) -> Trained:
    """Run a trainer to its end."""
    keep = _Keep()
    trainer.add_callback(keep)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [
        {k: repr(float(v)) for k, v in log.items() if not k.endswith(("_runtime", "_per_second"))}
        for log in trainer.state.log_history
    ]
    if not keep.digest:
        raise RuntimeError(f"the training ended at step {trainer.state.global_step} already")
    return Trained(keep.digest, keep.total, logs)
