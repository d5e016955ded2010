"""Arms of a comparison: what they share, results that are kept from run to run, and tables."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

logger = logging.getLogger("arms")

# what decides the outcome of a training beside its seed and its data
TRAINING = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
)


def check_arms(names: Sequence[str], known: Sequence[str], config: TrainingArguments) -> None:
    """Check what the command line asks for.

    Raises:
        ValueError: an arm is unknown, or the config has a setting that several arms cannot read.
    """
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        raise ValueError(f"arms must be among {[*known]}, got {unknown or names}")
    if config.seed != TrainingArguments.seed:
        raise ValueError(f"several runs have several seeds: set seeds, not seed, got {config.seed}")
    if config.resume_from_checkpoint is not None:
        raise ValueError(
            "finished arms are kept and others start anew: resume_from_checkpoint must be None, "
            f"got {config.resume_from_checkpoint!r}"
        )


def settings_of(recipe: Any, config: Any, ignored: Sequence[str]) -> dict[str, Any]:
    """Return what an arm's results depend on, as JSON gives it back.

    Args:
        recipe: the recipe's own arguments, a dataclass.
        config: of the training; its fields beyond `TrainingArguments` are part of it.
        ignored: fields of `recipe` that do not matter.
    """
    given = config.to_dict()
    own = [name for name in given if name not in TrainingArguments.__dataclass_fields__]
    settings = {name: given[name] for name in (*TRAINING, *own)}
    settings |= {name: value for name, value in vars(recipe).items() if name not in ignored}
    return json.loads(json.dumps(settings, default=str))


def kept(
    folder: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the results of an arm: those of an earlier run, or `make`'s, which are written.

    All processes call it; the main one reads and writes.

    Args:
        folder: of the arm; results.json in it is written when the arm is finished.
        settings: see `settings_of`; they are kept with the results.
        make: trains and measures.

    Raises:
        ValueError: the arm was finished with other settings.
    """
    path, state = folder / "results.json", PartialState()
    found: list[Any] = [None]
    if state.is_main_process and path.is_file():
        found = [json.loads(path.read_text())]
    result = broadcast_object_list(found)[0]  # other machines may not see the file
    if result is not None:
        _check_settings(path, result.get("settings", settings), settings)
        logger.info("%s: finished before, kept", folder)
        return result
    result = json.loads(json.dumps({**make(), "settings": settings}))
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, result)
    return result


def _check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in (name for name in now if name in before):
        if before[name] != now[name]:
            raise ValueError(
                f"{path} is of a run with {name} {before[name]!r}, not {now[name]!r}: "
                "remove its folder, or take another output_dir"
            )


def write(path: Path, result: Any) -> None:
    """Write JSON into a file that is whole or not there."""
    begun = path.with_suffix(".part")
    begun.write_text(json.dumps(result, indent=1))
    begun.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned."""
    lines = [[*header], ["-" * len(title) for title in header], *([*row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{n}}" for cell, n in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
