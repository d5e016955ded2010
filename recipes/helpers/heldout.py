"""What a student has of its teacher, measured on rows that it does not learn from."""

import time
from typing import Any, NamedTuple

from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from helpers import math_tasks
from hf_distill import DistillConfig, DistillTrainer, HintCollator
from hf_distill.models import kept_rng
from hf_distill.teachers import Teacher


def short_rows(
    rows: list[math_tasks.Row], collator: HintCollator, count: int, max_tokens: int
) -> list[math_tasks.Row]:
    """Return the first rows of at most so many tokens, prompt and completion together.

    Args:
        rows: to choose from.
        collator: makes the tokens of a row.
        count: how many are needed, >= 1.
        max_tokens: of a row.

    Raises:
        ValueError: `count` is below 1, or there are fewer rows.
    """
    if count < 1:
        raise ValueError(f"the number of rows must be at least 1, got {count}")
    chosen = []
    for row in rows:
        if collator([row])["input_ids"].shape[1] <= max_tokens:
            chosen.append(row)
        if len(chosen) == count:
            return chosen
    raise ValueError(
        f"{count} rows of at most {max_tokens} tokens are needed, got {len(chosen)} of {len(rows)}"
    )


class Distance(NamedTuple):
    """Holds means over the scored tokens of all rows, in nats.

    Args:
        loss: cross-entropy of the labels under the student.
        kl: KL(teacher || student) over the whole vocabulary, at temperature 1.
    """

    loss: float
    kl: float


def even_batch_size(num_rows: int, num_processes: int, largest: int) -> int:
    """Return rows per batch and process, at most `largest`, that give all as many batches.

    Otherwise rows would be repeated to fill the last batches, and would count more than others.

    Raises:
        ValueError: `num_processes` does not divide `num_rows`.
    """
    if num_processes == 1:
        return largest
    if num_rows % num_processes:
        raise ValueError(
            f"held-out rows must be a multiple of the {num_processes} processes, got {num_rows}"
        )
    share = num_rows // num_processes
    return next(size for size in range(min(largest, share), 0, -1) if share % size == 0)


class Judge:
    """Measures a student whenever it is called.

    Args:
        student: which other trainers may train meanwhile.
        teacher: what it is compared with.
        collator: of the rows.
        rows: that are held out.
        config: whose device, precision, batch size and output folder are used.

    Raises:
        ValueError: the rows cannot be shared evenly by the processes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        collator: HintCollator,
        rows: list[math_tasks.Row],
        config: TrainingArguments,
    ) -> None:
        self.student = student
        settings = DistillConfig(
            output_dir=str(config.output_dir),
            temperature=1.0,
            alpha=0.5,  # any but 0 and 1, which leave one of the two out of the loss
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=config.use_cpu,
            bf16=config.bf16,
            fp16=config.fp16,
            dataloader_pin_memory=config.dataloader_pin_memory,
            per_device_eval_batch_size=even_batch_size(
                len(rows), PartialState().num_processes, config.per_device_eval_batch_size
            ),
        )
        self._trainer = DistillTrainer(
            student,
            settings,
            collator,
            eval_dataset=rows,
            processing_class=collator.tokenizer,
            teacher=teacher,
        )
        self._trainer.remove_callback(PrinterCallback)

    def __call__(self) -> Distance:
        """Measure the student as it is; its mode and all random states stay as they were."""
        was_training = self.student.training
        with kept_rng(self._trainer.args.device):
            found = self._trainer.evaluate()
        self.student.train(was_training)
        return Distance(found["eval_hard"], found["eval_soft"])


class HeldOut(TrainerCallback):
    """Calls a judge every few steps: `points` holds (step, loss, KL), see `Distance`.

    Args:
        judge: of the student that is trained.
        every: optimizer steps between measurements, >= 1; the first and the last step are measured
            too.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, judge: Judge, every: int) -> None:
        if every < 1:
            raise ValueError(f"measure_steps must be at least 1, got {every}")
        self.judge, self.every = judge, every
        self.points: list[tuple[int, float, float]] = []
        self.seconds = 0.0  # how long measuring took

    def measure(self, step: int) -> None:
        """Take a point."""
        began = time.perf_counter()
        found = self.judge()
        self.points.append((step, found.loss, found.kl))
        self.seconds += time.perf_counter() - began

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure before the first step."""
        self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure every so many steps, and after the last one."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)
