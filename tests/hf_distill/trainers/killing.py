"""A training run that starts, or goes on, in a folder; it can wait at a place to be killed there.

python -m tests.hf_distill.trainers.killing FOLDER SETUP STEPS
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_distill import OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import models

DONE, LOG = "done", "log.txt"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


class Stop(NamedTuple):
    """Where a run waits: the optimizer steps it has taken, and what it is at."""

    step: int
    place: str  # loss, or what is half written: weights, teacher, rollout, mark


class Run(OPSDTrainer):
    """Says how far it is, and waits where it is told to."""

    stop: Stop | None = None
    tell: Callable[[str], Any]

    def reach(self, place: str, half_written: Path | None = None) -> None:
        if self.stop != (self.state.global_step, place):
            return
        if half_written is not None:
            half_written.write_bytes(half_written.read_bytes()[: half_written.stat().st_size // 2])
        self.tell(place)
        time.sleep(600)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.reach("loss")
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        (path,) = (
            Path(str(output_dir)) / x for x in WEIGHTS if (Path(str(output_dir)) / x).is_file()
        )
        self.reach("weights", path)

    def _save_extra(self, folder: str) -> None:
        super()._save_extra(folder)
        self.reach("teacher", Path(folder, "teacher.safetensors"))
        self.reach("rollout", Path(folder, "rollout-0.json"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.reach("mark", folder / "trainer_state.json")
        self.tell(f"saved {self.state.global_step}")


def make(setup: str, folder: Path, steps: int) -> Run:
    """LoRA with an averaged teacher, or all weights with one and two steps on each rollout."""
    student: nn.Module = models.llama(attention_dropout=0.2)  # the random state matters
    settings: dict[str, Any] = {"rollout": {"temperature": 1.0}, "save_steps": 2}
    if setup == "lora":
        student = models.lora(student)
    else:
        settings = {"rollout": {"temperature": 1.0, "steps_per_rollout": 2}, "save_steps": 1}
    args = OPSDConfig(
        **models.options(
            folder,
            teacher="ema",
            self_teacher={"ema_decay": 0.5},
            max_completion_length=6,
            max_steps=steps,
            save_strategy="steps",
            save_total_limit=2,
            train_sampling_strategy="random",
            **settings,
        )
    )
    return Run(student, args, train_dataset=models.problems(), processing_class=models.tokenizer())


def run(
    folder: Path, setup: str, steps: int, stop: Stop | None, tell: Callable[[str], Any]
) -> None:
    """Train in the folder, from its last checkpoint if it has one; save what came out."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    logging.basicConfig(filename=folder / LOG, level=logging.WARNING)
    trainer = make(setup, folder, steps)
    trainer.stop, trainer.tell = stop, tell
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    torch.save((models.weights(trainer.model), models.steps(trainer)), folder / "result.pt")
    tell(DONE)


def main() -> None:
    folder, setup, steps = sys.argv[1:]
    run(Path(folder), setup, int(steps), None, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
