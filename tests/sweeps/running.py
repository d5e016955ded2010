"""Trainers of one step whose first loss, gradients and samples are kept."""

import atexit
import copy
import gc
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from transformers import logging as transformers_logging

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from tests.sweeps.reference import TEMPERATURE, gradients, rows
from tests.tiny_models import problems, words
from tests.tiny_runs import silence

NUM_ROWS, REPLY = 3, 6


def prepare() -> None:
    """One thread, and no lines but those of the sweep; once a process."""
    atexit.register(silence)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # the Trainer collects before each run, mostly what was imported


def options(folder: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a run of one step on the CPU, without clipping of gradients."""
    return {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": NUM_ROWS,
        "per_device_eval_batch_size": NUM_ROWS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "watchdog": {"action": "off"},
    } | changes


@contextmanager
def heard() -> Iterator[list[str]]:
    """Inside the block what the project logs is kept, and not shown."""
    said: list[str] = []
    logger = logging.getLogger("hf_distill")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def path_of(said: Sequence[str]) -> str:
    """How the student was read, by the trainer's own words."""
    hidden = any(line.startswith("student: read by its hidden states") for line in said)
    return "hidden" if hidden else "logits"


class First(TrainerCallback):
    """Keeps the loss and the gradients of the first step.

    Attributes:
        loss: the value that `compute_loss` has returned, or None.
        gradients: by the names of the parameters.
    """

    def __init__(self) -> None:
        self.loss: float | None = None
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = self.gradients or gradients(kwargs["model"])

    def listen(self, trainer: Any) -> None:
        """Keep what the trainer computes from now on."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        compute = trainer.compute_loss

        def kept(*args: Any, **kwargs: Any) -> Any:
            found = compute(*args, **kwargs)
            loss = found[0] if isinstance(found, tuple) else found
            self.loss = float(loss) if self.loss is None else self.loss
            return found

        trainer.compute_loss = kept


def train(trainer: Any) -> First:
    """Train, and return what the first step was."""
    first = First()
    first.listen(trainer)
    trainer.train()
    return first


def distill(student: nn.Module, teacher: Any, collator: Any, alpha: float, **changes: Any) -> First:
    """One step of a DistillTrainer on the sweep's rows; `student` is trained."""
    with tempfile.TemporaryDirectory() as folder:
        given = options(folder, temperature=TEMPERATURE, alpha=alpha, **changes)
        data = rows()
        return train(
            DistillTrainer(student, DistillConfig(**given), collator, data, teacher=teacher)
        )


def evaluated(student: nn.Module, teacher: Any, collator: Any, alpha: float) -> float:
    """The loss of a DistillTrainer's evaluation of the sweep's rows."""
    with tempfile.TemporaryDirectory() as folder:
        given = options(folder, temperature=TEMPERATURE, alpha=alpha)
        data = rows()
        trainer = DistillTrainer(
            student, DistillConfig(**given), collator, data, data, teacher=teacher
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.evaluate()["eval_loss"]


def opsd(student: nn.Module, **changes: Any) -> tuple[OPSDTrainer, HintCollator]:
    """An OPSDTrainer of one step on three problems, made in a folder that is not written to."""
    tokenizer = words()
    collator = HintCollator(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        given = options(folder, max_completion_length=REPLY, **changes)
    trainer = OPSDTrainer(
        student, OPSDConfig(**given), collator, problems(NUM_ROWS, 0), None, tokenizer
    )
    return trainer, collator


def sampled(trainer: Any) -> list[tuple[list[int], list[int]]]:
    """Train a step; the prompts and completions of its rollout."""
    kept: list[tuple[list[int], list[int]]] = []
    engine = trainer.rollouts.engine
    sample: Callable[..., Any] = engine.sample

    def noted(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        made = sample(model, prompts, *args, **kwargs)
        kept.extend(zip(map(list, prompts), made, strict=True))
        return made

    engine.sample = noted
    train(trainer)
    return kept


def copied(model: Any) -> Any:
    """A copy with weights of its own."""
    return copy.deepcopy(model)
