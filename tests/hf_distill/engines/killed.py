"""A training on an engine, of which one process kills itself at a place.

torchrun --nproc-per-node 3 -m tests.hf_distill.engines.killed ENGINE FOLDER [RANK STEP PLACE]
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hf_distill import OPSDConfig, OPSDTrainer
from tests.hf_distill.engines import cpu
from tests.hf_distill.engines.setups import ENGINES, whole_weights
from tests.hf_distill.trainers import models

STEPS = 6
KINDS: dict[str, Any] = {"ddp": ENGINES["ddp"], "fsdp2": ENGINES["fsdp2"]}
KINDS["fsdp2 in pieces"] = KINDS["fsdp2"] | {
    "fsdp_config": KINDS["fsdp2"]["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}
}


class Stop(NamedTuple):
    """Which process ends, after how many optimizer steps, and what it is at.

    "loss" is in the middle of a step, "extra" before what a checkpoint has besides the `Trainer`'s
    files, and "mark" when half of the last file is written.
    """

    rank: int
    step: int
    place: str


class Run(OPSDTrainer):
    """Ends at its stop as by the system's killer, without a word."""

    stop: Stop | None = None

    def reach(self, place: str, half_written: Path | None = None) -> None:
        if self.stop != (dist.get_rank(), self.state.global_step, place):
            return
        if half_written is not None:
            half_written.write_bytes(half_written.read_bytes()[: half_written.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.reach("loss")
        return loss

    def _save_extra(self, folder: str) -> None:
        self.reach("extra")
        super()._save_extra(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.reach("mark", folder / "trainer_state.json")


def make(engine: str, folder: Path) -> Run:
    """LoRA, taught by its average on completions that it samples: all that a checkpoint holds."""
    rollout = {"temperature": 1.0, "steps_per_rollout": 2}
    options = models.options(
        folder,
        per_device_train_batch_size=2,
        teacher="ema",
        self_teacher={"ema_decay": 0.5},
        rollout=rollout,
        max_completion_length=6,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        train_sampling_strategy="random",
    )
    options.pop("use_cpu")
    student = models.lora(models.llama(attention_dropout=0.2))  # the random state matters
    args = OPSDConfig(**options | KINDS[engine])
    given = {"train_dataset": models.problems(48), "processing_class": models.tokenizer()}
    return Run(student, args, **given)


def main() -> None:
    engine, name, *stop = sys.argv[1:]
    folder = Path(name)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    cpu.take_processes_for_devices()
    trainer = make(engine, folder)
    if stop:
        trainer.stop = Stop(int(stop[0]), int(stop[1]), stop[2])
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    weights = whole_weights(trainer)
    if dist.get_rank() == 0:
        torch.save((weights, models.steps(trainer)), folder / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
