"""The process of one trainer, whose steps `tests.benchmarks.steps` measures.

It is run as a file, so that the package and its tests can be those of another checkout.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

# questions behind so many sentences about boxes: prompts and completions of different lengths
QUESTIONS = [
    ("Say hello.", 0),
    ("What is the capital of France? Answer with one word.", 0),
    ("Explain step by step how photosynthesis works.", 0),
    ("How many pears are in box 2?", 3),
    ("How many plums are in box 5?", 6),
    ("Write a story about box 3.", 9),
    ("Which box holds the most pears?", 14),
    ("How many boxes are there? Answer with one number.", 20),
]
HINT = "Think of what the boxes hold."
ON_POLICY = ("on-policy, teacher", "on-policy, itself")
CASES = ("off-policy, teacher", "off-policy, itself", *ON_POLICY)
SIZES = ("batch", "accumulate", "new_tokens", "repeats", "threads")
NOISE = 0.02  # of a teacher's weights, as a share of their spread
Load = Callable[[float], Any]  # the model, with so much noise

PARTS = ("generate", "teacher", "student forward", "loss", "backward", "optimizer")


def prompts() -> list[list[dict[str, str]]]:
    """Return the prompts as chats of one message."""
    boxes = [f"Box {i} holds {3 * i + 2} pears and {i + 4} plums." for i in range(1, 21)]
    return [
        [{"role": "user", "content": " ".join([*boxes[:count], question])}]
        for question, count in QUESTIONS
    ]


def resident_mb(name: str) -> float:
    """Return VmRSS, this process's resident memory, or VmHWM, its peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no line {name!r} in /proc/self/status")


class Turns(TrainerCallback):
    """Takes a step when it is told to, and says what the step took.

    Args:
        said: where the parent reads.
        base_mb: memory of the process before models were loaded.
    """

    def __init__(self, said: Any, base_mb: float) -> None:
        self.said, self.base_mb = said, base_mb
        self.start: tuple[float, float] | None = None
        self.parts: Parts | None = None
        self.logged: dict[str, float] = {}

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Watch the optimizer, which is made now."""
        if self.parts is not None:
            self.parts.watch(optimizer, "step", "optimizer")

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the loss and the lengths of the step before."""
        self.logged = logs

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Say what the step took, and wait for the next turn."""
        if self.start is None:
            found: dict[str, Any] = {}
        else:
            found = {"s": time.perf_counter() - self.start[0]}
            found["CPU s"] = time.process_time() - self.start[1]
            found["MB"] = resident_mb("VmHWM") - self.base_mb
            found["loss"] = self.logged.get("loss")
            lengths = ("completion_length", "completions/mean_length")
            found["length"] = next((self.logged[x] for x in lengths if x in self.logged), None)
            found["parts"] = {} if self.parts is None else self.parts.take()
        self.said.write(json.dumps(found) + "\n")
        self.said.flush()
        if not sys.stdin.readline():
            raise SystemExit(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        if self.parts is not None:
            self.parts.take()
        self.start = time.perf_counter(), time.process_time()


class Parts:
    """Adds up the processor's seconds of calls by part; a call inside of another has its own."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside: list[float] = []

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Add the calls of a method to a part from now on."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.seconds[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, name, timed)

    def watch_trainer(self, trainer: Any) -> None:
        """Watch an `OPSDTrainer`, all but its optimizer."""
        self.watch(trainer.rollouts.engine, "sample", "generate")
        self.watch(trainer.teacher, "signal", "teacher")
        self.watch(trainer.task, "run", "student forward")
        self.watch(trainer, "token_loss", "loss")
        self.watch(trainer.accelerator, "backward", "backward")

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        found, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return found


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows of ids on the right."""
    batch = {}
    for name, fill in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
        values = [torch.tensor(row[name]) for row in rows]
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, True, fill)
    return batch


def off_policy_rows(vocab: int, count: int) -> list[dict[str, list[int]]]:
    """Return rows of 64 to 256 random ids, of which the second half is scored."""
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        length = int(torch.randint(64, 257, (), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the training arguments that all trainers share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": given.batch,
        "gradient_accumulation_steps": given.accumulate,
        "max_steps": 1 + given.repeats,
        "learning_rate": 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def chats(count: int, hint: str) -> list[dict[str, Any]]:
    """Return rows of prompts, each with a hint in a column."""
    chosen = prompts()
    return [{"prompt": chosen[i % len(chosen)], hint: HINT} for i in range(count)]


def ours(given: argparse.Namespace, load: Load, tokenizer: Any, turns: Turns) -> Any:
    """Make our trainer of a case."""
    # of the checkout that the parent chose
    from hf_distill import (  # noqa: PLC0415
        DistillConfig,
        DistillTrainer,
        HintCollator,
        OPSDConfig,
        OPSDTrainer,
        SelfTeacher,
    )

    model, settings = (
        load(0.0),
        settings_of(given) | {"alpha": 1.0, "beta": 0.5, "temperature": 1.0},
    )
    settings |= {"divergence": "jsd", "train_sampling_strategy": "sequential"}
    alone, count = given.case.endswith("itself"), settings["max_steps"] * given.rows
    kinds = {"processing_class": tokenizer, "callbacks": [turns]}
    if given.case not in ON_POLICY:
        data = off_policy_rows(model.config.vocab_size, count)
        teacher = SelfTeacher("live") if alone else load(NOISE)
        args = DistillConfig(**settings)
        return DistillTrainer(model, args, collate, data, teacher=teacher, **kinds)
    rollout = {"temperature": 0.0}
    args = OPSDConfig(**settings, max_completion_length=given.new_tokens, rollout=rollout)
    collator = HintCollator(tokenizer, "{hint}" if alone else [])
    teacher = None if alone else load(NOISE)
    return OPSDTrainer(model, args, collator, chats(count, "hint"), teacher=teacher, **kinds)


def trls(given: argparse.Namespace, load: Load, tokenizer: Any, turns: Turns) -> Any:
    """Make TRL's trainer of a case."""
    from trl import DistillationConfig, DistillationTrainer  # noqa: PLC0415 - not in ours
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: PLC0415
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # noqa: PLC0415

    model, settings = load(0.0), settings_of(given)
    alone, count = given.case.endswith("itself"), settings["max_steps"] * given.rows
    kinds = {"processing_class": tokenizer, "callbacks": [turns]}
    if given.case not in ON_POLICY:
        settings |= {"lmbda": 0.0, "beta": 0.5, "train_sampling_strategy": "sequential"}
        data = Dataset.from_list(off_policy_rows(model.config.vocab_size, count))
        teacher = model if alone else load(NOISE)
        return GKDTrainer(model, teacher, GKDConfig(**settings), collate, data, **kinds)
    settings |= {"max_completion_length": given.new_tokens, "shuffle_dataset": False}
    settings |= {"generation_kwargs": {"do_sample": False}}
    data = Dataset.from_list(chats(count, "privileged_context"))
    if not alone:
        args = DistillationConfig(**settings, beta=0.5)
        return DistillationTrainer(model, load(NOISE), args, data, **kinds)
    options = {"distillation_mode": "full_logits", "distillation_alpha": 0.5}
    args = SDFTConfig(**settings, **options, num_generations=1, max_prompt_length=None)
    return SDFTTrainer(model, args, data, **kinds)


def work(given: argparse.Namespace) -> None:
    """Be the process of one trainer."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print must not reach the parent
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")

    def load(noise: float) -> Any:
        made = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        torch.manual_seed(1)
        for parameter in made.parameters() if noise else ():
            parameter.data += noise * parameter.std() * torch.randn_like(parameter)
        return made

    # imported before memory is measured
    if given.name == "TRL":
        import trl.experimental.sdft.sdft_trainer  # noqa: F401, PLC0415
    else:
        import hf_distill.trainers  # noqa: F401, PLC0415
    turns = Turns(said, resident_mb("VmRSS"))
    trainer = (trls if given.name == "TRL" else ours)(given, load, tokenizer, turns)
    if given.profile and given.case in ON_POLICY and given.name != "TRL":
        turns.parts = Parts()
        turns.parts.watch_trainer(trainer)
    trainer.train()


def main() -> None:
    """Read the command line that `tests.benchmarks.steps` writes."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for name in ("name", "case", "model"):
        parser.add_argument(f"--{name}", required=True)
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    given.rows = given.batch * given.accumulate
    work(given)


if __name__ == "__main__":
    main()
