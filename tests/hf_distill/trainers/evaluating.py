"""Trainers whose evaluations are compared, and rows of which some have no label."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from tests.hf_distill.trainers import classifying, models

# relative, of float32 means of some 50 tokens summed in another order, and of batches padded to
# other widths; measured: 4e-7
SUM_ERROR = 1e-5
IGNORED = [1]  # of the rows of `held_out`, which has a long row first, so that means differ


def held_out(unlabelled: list[int] = IGNORED) -> list[dict[str, Any]]:
    """Nine rows, of which some have no label."""
    made = models.rows(9, seed=1, ignored=1)
    made[0] = {name: value[:1] + 4 * value[1:] for name, value in made[0].items()}
    for i in unlabelled:
        made[i] = made[i] | {"labels": [-100] * len(made[i]["labels"])}
    return made


class Weighted(models.Pad):
    def __call__(self, batch: Any) -> dict[str, Any]:
        made = super().__call__(batch)
        return made | {"token_weights": (made["input_ids"] % 4) * 0.75}


def distill(folder: Path, **changes: Any) -> Any:
    names = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "callbacks")
    extra = {name: changes.pop(name) for name in names if name in changes}
    family = models.FAMILIES[changes.pop("family", "llama")]
    collator = changes.pop("collator", None) or models.Pad()
    data = changes.pop("held_out", None) or held_out()
    has_teacher = changes.pop("has_teacher", True)
    return DistillTrainer(
        family(),
        DistillConfig(**models.options(folder, **changes)),
        collator,
        models.rows(),
        data,
        teacher=family(1) if has_teacher else None,
        **extra,
    )


def classify(folder: Path, **changes: Any) -> Any:
    make = classifying.FAMILIES[changes.pop("family", "bert")]
    has_teacher = changes.pop("has_teacher", True)
    trainer = DistillTrainer(
        make(),
        DistillConfig(**models.options(folder, **changes)),
        classifying.collator(),
        classifying.rows(unlabelled=1),
        classifying.rows(9, seed=1, unlabelled=1),
        teacher=make(1) if has_teacher else None,
    )
    return trainer


def opsd(folder: Path, **changes: Any) -> Any:
    settings = {"on_policy": False, "max_completion_length": 8, "alpha": 0.5} | changes
    return OPSDTrainer(
        models.lora(models.llama()),
        OPSDConfig(**models.options(folder, **settings)),
        HintCollator(models.tokenizer()),
        models.problems(),
        models.problems(9),
        processing_class=models.tokenizer(),
    )


def func(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Half the cross-entropy."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return 0.5 * total / num_items_in_batch


NO_TEACHER: dict[str, Any] = {"has_teacher": False, "alpha": 0.0}
# a maker, its settings, and whether alpha * soft + (1 - alpha) * hard is the whole loss
RUNS: dict[str, tuple[Callable[..., Any], dict[str, Any], bool]] = {
    "kd": (distill, {"alpha": 0.3}, True),
    "kd-gpt2": (distill, {"family": "gpt2"}, True),
    "kd-soft-alone": (distill, {"alpha": 1.0}, True),
    "kd-hard-alone": (distill, {"alpha": 0.0}, True),
    "kd-jsd-clipped": (distill, {"divergence": "jsd", "clip": {"bound": 0.01}}, True),
    "kd-k3": (distill, {"divergence": "k3", "temperature": 1.0}, True),
    "kd-logits": (distill, {"torch_compile": False, "label_smoothing_factor": 0.1}, False),
    "kd-users-loss": (distill, {"compute_loss_func": func}, False),
    "kd-hidden": (distill, {"hidden_layers": "last"}, False),
    "kd-weights": (distill, {"collator": Weighted()}, False),
    "opsd": (opsd, {}, True),
    "classes": (classify, {"alpha": 0.3}, True),
    "classes-llama": (classify, {"family": "llama", "label_smoothing_factor": 0.1}, False),
    "no-teacher": (distill, NO_TEACHER, False),
    "no-teacher-gpt2": (distill, NO_TEACHER | {"family": "gpt2"}, False),
    "no-teacher-smoothing": (distill, NO_TEACHER | {"label_smoothing_factor": 0.1}, False),
    "no-teacher-users-loss": (distill, NO_TEACHER | {"compute_loss_func": func}, False),
    "no-teacher-classes": (classify, NO_TEACHER, False),
    "no-teacher-classes-llama": (classify, NO_TEACHER | {"family": "llama"}, False),
}
