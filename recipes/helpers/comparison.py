"""A student learns from a teacher in several ways, each from the same start: what they share."""

import copy
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib
import torch
from accelerate import PartialState
from convert_gguf import resolve_model
from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.scripts.utils import TrlParser

from helpers import arms, math_tasks
from helpers.heldout import HeldOut, Judge, short_rows
from helpers.students import keep_layers
from hf_distill import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    HintCollator,
    ModelTeacher,
    Schedule,
    cache_teacher,
)
from hf_distill.cache import Codec
from hf_distill.teachers import Teacher

logger = logging.getLogger("comparison")

DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
KEEP_EVERY = 3
MEASURES = {"loss": "held-out loss", "kl": "held-out KL", "seconds": "seconds"}

Result = dict[str, Any]
Results = dict[str, dict[int, Result]]  # of arms, of seeds


@dataclass
class ComparisonArguments:
    """Holds what a comparison itself needs."""

    teacher_name_or_path: str = field(
        default="smollm2-135m", metadata={"help": "Its tokenizer is the student's too."}
    )
    student_name_or_path: str | None = field(
        default=None, metadata={"help": "None is the teacher with fewer layers, see keep_every."}
    )
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "A hub id, or a folder with train.jsonl and test.jsonl."},
    )
    keep_every: int | None = field(
        default=None,
        metadata={
            "help": f"Which layers of the teacher the student keeps, >= 1; None is {KEEP_EVERY}."
        },
    )
    num_rows: int = field(default=400, metadata={"help": "Rows to learn from, >= 1."})
    num_eval: int = field(default=64, metadata={"help": "Held-out rows, >= 1."})
    max_tokens: int = field(default=256, metadata={"help": "Longer rows are left out."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the caches, which runs may share; None is the output folder."},
    )
    measure_steps: int = field(default=50, metadata={"help": "Steps between measurements, >= 1."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Each arm is trained once for each."}
    )
    save_students: bool = field(
        default=False, metadata={"help": "Save the model of each arm and seed."}
    )
    arms: list[str] = field(default_factory=list, metadata={"help": "Set by the recipe."})


IGNORED = ("arms", "seeds", "cache_dir", "save_students")  # results do not depend on them


class Material(NamedTuple):
    """Holds what the arms share."""

    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    start: PreTrainedModel
    collator: HintCollator
    train: list[math_tasks.Row]
    test: list[math_tasks.Row]


class Comparison:
    """Trains arms from one start; a subclass says what an arm changes and what it learns from.

    Args:
        recipe: its arguments.
        config: of the training.
        known: the arms that there are.

    Raises:
        ValueError: an argument is out of range, or not one that several arms can read.
    """

    def __init__(
        self, recipe: ComparisonArguments, config: DistillConfig, known: tuple[str, ...]
    ) -> None:
        arms.check_arms(recipe.arms, known, config)
        if recipe.student_name_or_path is not None and recipe.keep_every is not None:
            raise ValueError(
                f"keep_every {recipe.keep_every} makes a student of the teacher; with "
                f"student_name_or_path {recipe.student_name_or_path!r} it must be None"
            )
        self.recipe, self.config = recipe, config
        self.folder = Path(str(config.output_dir))

    def changes(self, name: str) -> dict[str, Any]:
        """Return the fields of the config that an arm changes."""
        raise NotImplementedError

    def teacher(self, name: str) -> Teacher | None:
        """Return what an arm learns from; None for supervised training."""
        raise NotImplementedError

    def control(self) -> dict[str, Any]:
        """Return what supervised training changes: alpha, and what is read with a teacher."""
        changes: dict[str, Any] = {"alpha": 0.0, "token_weights": None}
        changes |= {"hidden_layers": None, "taid": None}
        for name in ("temperature", "beta", "hidden_weight"):
            changes[name] = Schedule.parse(getattr(self.config, name)).at(0)
        return changes

    @cached_property
    def material(self) -> Material:
        """Load models and rows when the first arm that is not finished needs them."""
        return load_material(self.recipe)

    def cached(
        self, name: str, codec: Codec, kind: type[CachedTeacher] = CachedTeacher, **reading: Any
    ) -> CachedTeacher:
        """Return the teacher's cache in a folder of that name, written now unless it is there."""
        path = Path(self.recipe.cache_dir or self.folder) / name
        made = self.material
        began = time.perf_counter()
        manifest = cache_teacher(
            made.teacher,
            made.train,
            path,
            codec=codec,
            data_collator=made.collator,
            processing_class=made.tokenizer,
            batch_size=self.config.per_device_train_batch_size,
        )
        logger.info(
            "%s: %d tokens, %.1f bytes/token, %.0f s",
            path,
            manifest.stats["tokens"],
            manifest.stats["bytes_per_token"],
            time.perf_counter() - began,
        )
        return kind(path, teacher=made.teacher, **reading)

    def temperatures(self) -> tuple[float, float]:
        """Return the range that a cache must serve: 1, 2 and the training's temperatures."""
        low, high = Schedule.parse(self.config.temperature).bounds
        return min(1.0, low), max(2.0, high)

    def train(self, name: str, seed: int) -> Result:
        """Return an arm's curve and seconds, from an earlier run if that has finished it."""
        folder = self.folder / f"seed{seed}" / name
        changes = {**self.changes(name), "seed": seed, "output_dir": str(folder)}
        config = dataclasses.replace(self.config, **changes)
        settings = arms.settings_of(self.recipe, config, IGNORED)
        return arms.kept(folder, settings, lambda: self._train(name, config))

    def _train(self, name: str, config: DistillConfig) -> Result:
        made = self.material
        student = copy.deepcopy(made.start)
        judge = Judge(student, ModelTeacher(made.teacher), made.collator, made.test, config)
        measure = HeldOut(judge, self.recipe.measure_steps)
        trainer = DistillTrainer(
            student,
            config,
            made.collator,
            made.train,
            processing_class=made.tokenizer,
            teacher=self.teacher(name),
            callbacks=[measure],
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began - measure.seconds
        if self.recipe.save_students:
            trainer.save_model()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {"heldout": measure.points, "seconds": seconds, "log_history": logs}

    def run(self, figure: str) -> None:
        """Train every arm with every seed, print, and save results.json and the figure."""
        results: Results = {name: {} for name in self.recipe.arms}
        is_main = PartialState().is_main_process
        for seed in self.recipe.seeds:
            for name, of_seeds in results.items():
                of_seeds[seed] = result = self.train(name, seed)
                step, loss, kl = result["heldout"][-1]
                if is_main:
                    print(
                        f"seed {seed} {name}: step {step}, held-out loss {loss:.4f}, KL {kl:.4f}, "
                        f"{result['seconds']:.0f} s of training",
                        flush=True,
                    )
        if is_main:
            found = summary(results)
            arms.write(self.folder / "results.json", {"summary": found, "arms": results})
            draw(self.folder / figure, results)
            print("\n" + show(found) + f"\n\nsee {self.folder / figure}", flush=True)


def load_material(recipe: ComparisonArguments) -> Material:
    """Load models and rows.

    Raises:
        ValueError: the student has another tokenizer, or there are too few short rows.
    """
    own = recipe.student_name_or_path
    with PartialState().main_process_first():  # one process converts, the others find the result
        path = resolve_model(recipe.teacher_name_or_path)
        own_path = None if own is None else resolve_model(own)
    tokenizer = AutoTokenizer.from_pretrained(path)
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).eval()
    if own_path is None:
        every = KEEP_EVERY if recipe.keep_every is None else recipe.keep_every
        start = keep_layers(teacher, every)
    else:
        other = AutoTokenizer.from_pretrained(own_path)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                "student and teacher must share a tokenizer, got those of "
                f"{own!r} and {recipe.teacher_name_or_path!r}"
            )
        start = AutoModelForCausalLM.from_pretrained(own_path)
    torch.nn.Module.to(start, dtype=torch.float32)  # small updates would be lost in 16 bits
    collator = HintCollator(tokenizer, [])
    task = math_tasks.gsm8k(recipe.dataset, 10**6)
    train = short_rows(task.train, collator, recipe.num_rows, recipe.max_tokens)
    test = short_rows(task.test, collator, recipe.num_eval, recipe.max_tokens)
    logger.info(
        "student: %d layers and %.1f M parameters; teacher: %d and %.1f M",
        *_size(start),
        *_size(teacher),
    )
    logger.info("rows of at most %d tokens: %d, held out %d",
                recipe.max_tokens, len(train), len(test))  # fmt: skip
    return Material(tokenizer, teacher, start, collator, train, test)


def _size(model: PreTrainedModel) -> tuple[int, float]:
    config: Any = model.config
    return config.get_text_config().num_hidden_layers, model.num_parameters() / 1e6


def summary(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Return loss and KL at the last step and seconds, by arm and seed and as means over seeds."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, of_seeds in results.items():
        values = {seed: (*r["heldout"][-1][1:], r["seconds"]) for seed, r in of_seeds.items()}
        found[name] = {
            measure: {
                "mean": statistics.fmean(value[i] for value in values.values()),
                "seeds": {str(seed): value[i] for seed, value in values.items()},
            }
            for i, measure in enumerate(MEASURES)
        }
    return found


def show(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the summary as a Markdown table."""
    seeds = list(next(iter(found.values()))["loss"]["seeds"])
    header = ["arm"]
    for title in MEASURES.values():
        header += [f"{title}, mean", *(f"seed {seed}" for seed in seeds)]
    rows = []
    for name, measures in found.items():
        row = [name]
        for measure, values in measures.items():
            digits = 0 if measure == "seconds" else 4
            numbers = [values["mean"], *values["seeds"].values()]
            row += [f"{number:.{digits}f}" for number in numbers]
        rows.append(row)
    return arms.table(header, rows)


def draw(path: Path, results: Results) -> None:
    """Draw a PNG with held-out loss and KL over the steps: means over seeds, and their range."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True)
    titles = ("held-out loss, nats/token", "held-out KL(teacher || student), nats/token")
    for column, (axis, title) in enumerate(zip(axes, titles, strict=True), start=1):
        for name, of_seeds in results.items():
            curves = [result["heldout"] for result in of_seeds.values()]
            steps = [point[0] for point in curves[0]]
            at_step = [[point[column] for point in points] for points in zip(*curves, strict=True)]
            (line,) = axis.plot(steps, [statistics.fmean(x) for x in at_step], label=name)
            low, high = [min(x) for x in at_step], [max(x) for x in at_step]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="optimizer step", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(LogFormatter())  # 2 and 3 instead of powers of ten
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(
    make: Callable[[Any, DistillConfig], Comparison],
    arguments: type[ComparisonArguments],
    defaults: dict[str, Any],
    figure: str,
) -> None:
    """Parse the command line and run.

    Args:
        make: from the recipe's arguments and the config to the comparison.
        arguments: the class of the recipe's arguments.
        defaults: the recipe's own, beside `DEFAULTS`.
        figure: name of the PNG in the output folder.
    """
    parser = TrlParser(cast(Any, (arguments, DistillConfig)))
    parser.set_defaults_with_config(**DEFAULTS, **defaults)
    recipe, config = cast(Any, parser.parse_args_and_config())
    _ = config.device  # sets the processes up as the arguments say, before anyone else asks
    logging.basicConfig(level=logging.INFO if PartialState().is_main_process else logging.ERROR)
    make(recipe, config).run(figure)
