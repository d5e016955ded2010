"""A step exchanges what one of a plain `Trainer` does, and a teacher in pieces is gathered once."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.models import forward
from tests.hf_distill.engines import cpu
from tests.hf_distill.engines.exchanged import Exchanged
from tests.hf_distill.engines.setups import WIDE, Place, llama, other
from tests.hf_distill.trainers import models
from tests.processes import run_two

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings(models.PEFT_WARNING)]

GATHERS, SUMS = ("gather",), ("reduce_scatter",)
CASES: Mapping[str, dict[str, Any]] = {
    "teacher": {},
    "evaluation": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1},
    "teacher in pieces": {},
    "projections": {"hidden_layers": "uniform"},
}


class CountingSteps:
    """Counts what each training step exchanges; a part of a trainer."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with Exchanged() as self.exchanged:
            return super().training_step(*args, **kwargs)  # pyright: ignore


class Plain(CountingSteps, Trainer):
    """Learns from labels."""


class Distilling(CountingSteps, DistillTrainer):
    """Learns from a teacher."""


def last_step(trainer: Any) -> list[tuple[int, int]]:
    """Train; bytes and calls of what the last step gathered and summed."""
    trainer.train()
    return [trainer.exchanged.of(*GATHERS), trainer.exchanged.of(*SUMS)]


def of_a_process(engine: str, folder: Path) -> None:
    cpu.take_processes_for_devices()
    if engine.startswith("zero"):
        cpu.without_compiled_ops()
    forward.HEAD_COPIES |= dict.fromkeys(forward.HEAD_COPIES, 0.0)  # batches here are small
    place, rows = Place(folder / "runs", engine, 2), models.rows(48, longest=24)
    names = TrainingArguments.__dataclass_fields__.keys()
    args = {k: v for k, v in place.options().items() if k in names}
    found = {"plain": last_step(Plain(llama(), TrainingArguments(**args), models.Pad(), rows))}
    for name, changes in CASES.items():
        made, teacher = DistillConfig(**place.options(**changes)), llama(1)
        teacher = other() if name == "projections" else teacher
        if name != "teacher in pieces":
            teacher.hf_device_map = {"": "cpu"}  # placed by its owner, so it stays whole
        found[name] = last_step(
            Distilling(llama(), made, models.Pad(), rows, rows[:6], teacher=teacher)
        )
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")


NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


FSDP1 = pytest.param("fsdp1", marks=pytest.mark.slow)
ZERO3 = pytest.param("zero3", marks=NEEDS_DEEPSPEED)


@pytest.mark.parametrize("engine", ["fsdp2", FSDP1, ZERO3])
def test_a_step_gathers_what_a_plain_one_does(engine: str, tmp_path: Path) -> None:
    run_two(tmp_path / "run", of_a_process, engine, tmp_path / "run")
    found = torch.load(tmp_path / "run" / "found.pt")
    plain, in_pieces = found.pop("plain"), found.pop("teacher in pieces")
    projections = found.pop("projections")
    assert plain[0][0] > 0
    assert found == dict.fromkeys(found, plain)
    teacher = sum(p.nbytes for p in llama(1).parameters())
    (gathered, _), summed = in_pieces
    assert gathered <= plain[0][0] + teacher
    assert (gathered > plain[0][0]) is (engine != "fsdp1")  # which does not cut teachers
    assert summed == plain[1]
    pairs, width, wider = 2, WIDE["hidden_size"], other().config.hidden_size
    size = 4 * pairs * width * wider  # bytes of projections: gathered once, and summed once
    assert projections[1][0] == plain[1][0] + size
    # FSDP 1 has one flat tensor of them and the head, and gathers what a process lacks of it
    assert projections[0][0] == plain[0][0] + size // (2 if engine == "fsdp1" else 1)
