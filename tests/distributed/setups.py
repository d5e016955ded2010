"""Training runs for one process or several, of as many rows a step; run as a script, it saves them.

accelerate launch --multi_gpu --num_processes 2 -m tests.distributed.setups FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_distill import DistillConfig, DistillTrainer, OPSDConfig, OPSDTrainer
from tests.trainers import models

ROWS_PER_STEP = 4
Result = tuple[dict[str, Tensor], list[dict[str, float]]]


def _options(folder: Path, num_processes: int, **changes: Any) -> dict[str, Any]:
    per_process = ROWS_PER_STEP // num_processes
    return models.options(folder, per_device_train_batch_size=per_process, **changes)


def distill(folder: Path, num_processes: int, **changes: Any) -> DistillTrainer:
    """All weights; rows of uneven lengths, two micro-batches a step."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2} | changes
    args = DistillConfig(**_options(folder, num_processes, **settings))
    return DistillTrainer(
        models.llama(), args, models.Pad(), models.rows(longest=30), teacher=models.llama(1)
    )


def distill_local_mean(folder: Path, num_processes: int) -> DistillTrainer:
    """The bug: every process divides by its own number of tokens."""
    return distill(folder, num_processes, average_tokens_across_devices=False)


def distill_logits(folder: Path, num_processes: int) -> DistillTrainer:
    """Label smoothing reads logits and has a hard loss of its own."""
    return distill(folder, num_processes, label_smoothing_factor=0.1)


def distill_nothing_to_score(folder: Path, num_processes: int) -> DistillTrainer:
    """The second of two processes has no labelled token in the first step."""
    trainer = distill(folder, num_processes, gradient_accumulation_steps=1)
    for row in trainer.train_dataset[2:4]:
        row["labels"] = [-100] * len(row["labels"])
    return trainer


def stopped_by_one(folder: Path, num_processes: int) -> DistillTrainer:
    """The teacher of the second of two processes has the student's head."""
    watchdog = {"action": "stop", "teacher_uniform": None}  # random models are nearly uniform
    settings = {"watchdog": watchdog, "learning_rate": 0.01}
    trainer = distill(folder, num_processes, **settings)
    if trainer.accelerator.process_index == 1:
        trainer.teacher.model.lm_head = trainer.model.lm_head
    return trainer


def _opsd(folder: Path, num_processes: int, model: Any, **changes: Any) -> OPSDTrainer:
    settings = {"max_completion_length": 8, "rollout": {"temperature": 0.0}} | changes
    args = OPSDConfig(**_options(folder, num_processes, **settings))
    data, tokenizer = models.problems(), models.tokenizer()
    return OPSDTrainer(model, args, train_dataset=data, processing_class=tokenizer)


def opsd_off_policy(folder: Path, num_processes: int) -> OPSDTrainer:
    return _opsd(folder, num_processes, models.lora(models.llama()), on_policy=False)


def opsd_on_policy(folder: Path, num_processes: int) -> OPSDTrainer:
    """Greedy, for samples depend on the rows that share a process."""
    return _opsd(folder, num_processes, models.lora(models.llama()))


def opsd_repeated(folder: Path, num_processes: int) -> OPSDTrainer:
    """Two steps per rollout, shuffled, into a second epoch, with a moving average as teacher."""
    return _opsd(
        folder,
        num_processes,
        models.llama(),
        teacher="ema",
        self_teacher={"ema_decay": 0.5},
        rollout={"temperature": 0.0, "steps_per_rollout": 2},
        max_steps=10,
        train_sampling_strategy="random",
    )


SETUPS = (
    distill,
    distill_local_mean,
    distill_logits,
    distill_nothing_to_score,
    stopped_by_one,
    opsd_off_policy,
    opsd_on_policy,
    opsd_repeated,
)


def train(setup: Any, folder: Path, num_processes: int) -> Result:
    """Final weights, and the logs of all steps."""
    trainer = setup(folder, num_processes)
    assert trainer.accelerator.num_processes == num_processes
    trainer.train()
    steps = [logs for logs in trainer.state.log_history if "loss" in logs]
    return models.weights(trainer.accelerator.unwrap_model(trainer.model)), steps


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for setup in SETUPS:
        result = train(setup, folder, 2)
        if torch.distributed.get_rank() == 0:
            torch.save(result, folder / f"{setup.__name__}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
