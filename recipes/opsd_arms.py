"""Arms of on-policy self-distillation side by side, on tasks where it helps and where it hurts.

Each arm starts from the same warmed-up student of a task and seed. The control arms are supervised
training on the references and no training at all. No network; one CPU core:

    python recipes/opsd_arms.py --config recipes/opsd_arms.yaml --output_dir out/opsd_arms

`--tasks rule --arms none plain contrast --seeds 0` runs a part of it; what is finished in the
output folder is kept, so several commands with other tasks may share one. The folder gets
results.json, table.md and opsd_arms.png.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from gsm8k_opsd import supervised
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from trl.scripts.utils import TrlParser

from helpers import accuracy, arm_results, arms, word_problems
from helpers.hint_tasks import TASKS
from helpers.math_tasks import Task
from hf_distill import Contrast, Feedback, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data import Attempt

DEFAULTS: dict[str, Any] = {
    "output_dir": "out/opsd_arms",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 40,
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "adam_beta2": 0.98,
    "warmup_steps": 5,
}
NONE, SFT, PLAIN = "none", "sft", "plain"
FORECAST_ROWS = 64


@dataclass(frozen=True)
class Arm:
    """Says what an arm changes: fields of the config, a wrong hint, and a verifier."""

    changes: dict[str, Any] = field(default_factory=dict)
    contrast: bool = False
    judged: bool = False


_FAILED = {"rollout": {"only_failed": True}}
ARMS: dict[str, Arm] = {
    NONE: Arm(),
    SFT: Arm(),
    PLAIN: Arm(),
    "contrast": Arm(contrast=True),
    "contrast_target": Arm({"contrast": {"kind": "target"}}, contrast=True),
    "position_early": Arm({"token_weights": {"position": "early"}}),
    "position_late": Arm({"token_weights": {"position": "late", "position_floor": 0.0}}),
    "entropy_down": Arm({"token_weights": {"entropy": -1.0}}),
    "failed_only": Arm(_FAILED, judged=True),
    "base_kl": Arm({"base_kl_weight": 1.0}),
    "prefix": Arm(),  # see `changes`
    "contrast_failed": Arm(_FAILED, contrast=True, judged=True),
    "contrast_base_kl": Arm({"base_kl_weight": 0.3}, contrast=True),
}


def changes(name: str, config: OPSDConfig) -> dict[str, Any]:
    """Return the fields of the config that an arm changes; a prefix grows for half the steps."""
    if name != "prefix":
        return ARMS[name].changes
    most, steps = config.max_completion_length, max(1, config.max_steps // 2)
    return {"rollout": {"prefix_tokens": f"linear:{min(4, most)}->{most}@{steps}"}}


@dataclass
class RecipeArguments:
    """Holds what the recipe itself needs."""

    tasks: list[str] = field(
        default_factory=lambda: [*TASKS], metadata={"help": f"Among {[*TASKS]}."}
    )
    arms: list[str] = field(default_factory=lambda: [*ARMS], metadata={"help": f"Among {[*ARMS]}."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each arm is trained once for each."}
    )
    warm_up_steps: int = field(
        default=400, metadata={"help": "Supervised steps that teach the student to read hints."}
    )
    num_train: int = field(default=2000, metadata={"help": "Rows to learn from, >= 1."})
    num_eval: int = field(default=256, metadata={"help": "Held-out rows to grade, >= 1."})


IGNORED = ("tasks", "arms", "seeds")  # results do not depend on them


class Verifier:
    """Scores a completion 1 if its answer is right, else 0."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, attempts: Sequence[Attempt]) -> list[Feedback]:
        """Return the column `score` of each attempt."""
        return [Feedback(columns={"score": self.score(x.row, x.text)}) for x in attempts]

    def score(self, row: Any, text: str) -> float:
        """Return 1.0 or 0.0."""
        return float(self.task.is_right(text, row))


class Start:
    """Holds a task and its warmed-up student of one seed, which the arms share."""

    def __init__(self, name: str, recipe: RecipeArguments, seed: int) -> None:
        made = TASKS[name]
        self.task = made.make(recipe.num_train, recipe.num_eval, seed)
        self.tokenizer: PreTrainedTokenizerFast = word_problems.build_tokenizer()
        self.model = word_problems.build_model(self.tokenizer, seed)
        made.warm_up(self.model, self.tokenizer, recipe.warm_up_steps, seed)

    def collator(self, arm: Arm) -> HintCollator:
        """Return the collator of an arm."""
        hint = self.task.hint
        wrong = dataclasses.replace(hint, text=word_problems.HINT_TEMPLATE.format(hint="{wrong}"))
        contrast = Contrast(hint=wrong) if arm.contrast else None
        return HintCollator(self.tokenizer, hint, contrast=contrast)

    def accuracy(self, model: nn.Module, config: OPSDConfig, hinted: bool) -> accuracy.Accuracy:
        """Measure on the held-out rows."""
        return accuracy.measure(
            model,
            self.task,
            self.task.test,
            HintCollator(self.tokenizer, self.task.hint),
            hinted=hinted,
            max_completion_length=config.max_completion_length,
            batch_size=128,
            description="accuracy",
        )


def train(start: Start, name: str, config: OPSDConfig) -> dict[str, Any]:
    """Train one arm; return accuracies, lengths, the cost of a step and the forecast."""
    model, arm = copy.deepcopy(start.model), ARMS[name]
    found: dict[str, Any] = {}
    if name == SFT:
        folder = Path(str(config.output_dir))
        trainer: Any = supervised(model, config, start.collator(arm), start.task.train, folder)
    else:
        verifier = Verifier(start.task)
        trainer = OPSDTrainer(
            model,
            config,
            start.collator(arm),
            start.task.train,
            processing_class=start.tokenizer,
            environment=verifier if arm.judged else None,
        )
        forecast = trainer.forecast(start.task.test, FORECAST_ROWS, verifier.score)
        found["forecast"] = {**forecast.metrics(), "sentence": forecast.sentence}
    if name != NONE:
        found |= _timed(trainer, config.max_steps)
    for view in ("unaided", "hinted"):
        found[view] = start.accuracy(model, config, view == "hinted").to_dict()
    return found


def _timed(trainer: Any, steps: int) -> dict[str, Any]:
    """Train; return processor seconds of a step."""
    began = time.process_time()
    trainer.train()
    return {"step_seconds": (time.process_time() - began) / steps}


def run(recipe: RecipeArguments, config: OPSDConfig) -> arm_results.Results:
    """Train every arm of every task and seed that is not finished; return all results."""
    results: arm_results.Results = {}
    total = len(recipe.tasks) * len(recipe.seeds) * len(recipe.arms)
    bar = tqdm(total=total, desc="arms")
    for task in recipe.tasks:
        for seed in recipe.seeds:
            made: list[Start] = []  # when the first arm that is not finished needs it
            for name in recipe.arms:
                folder = Path(str(config.output_dir)) / task / f"seed{seed}" / name
                own = {**changes(name, config), "seed": seed, "output_dir": str(folder)}
                own = dataclasses.replace(config, **own)

                def make(
                    task: str = task,
                    seed: int = seed,
                    name: str = name,
                    own: OPSDConfig = own,
                    made: list[Start] = made,
                ) -> dict[str, Any]:
                    if not made:
                        made.append(Start(task, recipe, seed))
                    return train(made[0], name, own)

                found = arms.kept(folder, arms.settings_of(recipe, own, IGNORED), make)
                results.setdefault(task, {}).setdefault(name, {})[seed] = found
                bar.update()
                bar.write(f"{task} seed {seed} {name}: unaided {found['unaided']['share']:.1%}")
    bar.close()
    return results


def main() -> None:
    """Parse, train, save, draw and print."""
    parser = TrlParser(cast(Any, (RecipeArguments, OPSDConfig)))
    parser.set_defaults_with_config(**DEFAULTS)
    recipe, config = parser.parse_args_and_config()
    logging.basicConfig(level=logging.WARNING)
    arms.check_arms(recipe.arms, [*ARMS], config)
    unknown = sorted(set(recipe.tasks) - set(TASKS))
    if unknown or not recipe.tasks:
        raise ValueError(f"tasks must be among {[*TASKS]}, got {unknown or recipe.tasks}")
    folder = Path(str(config.output_dir))
    results = run(recipe, config)
    arms.write(folder / "results.json", results)
    shown = arm_results.show(results, NONE, PLAIN)
    (folder / "table.md").write_text(shown + "\n")
    arm_results.draw(folder / "opsd_arms.png", results, NONE)
    print(shown, flush=True)


if __name__ == "__main__":
    main()
