"""A student learns from a larger teacher on any engine of accelerate, with few lines around it.

Both models are loaded by name, and may lie in pieces on the devices; `recipes/accelerate` has
config files of accelerate for one GPU, eight GPUs with FSDP 2, ZeRO-3 or tensor parallelism, and a
Mac:

    accelerate launch --config_file recipes/accelerate/eight_gpus_fsdp2.yaml \
        recipes/distill_large.py --student_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --teacher_name_or_path meta-llama/Llama-3.1-8B-Instruct --teacher_dtype bfloat16 \
        --num_rows 6000 --max_tokens 512 --max_steps 1000 --learning_rate 2e-5 --bf16 \
        --output_dir out/large

`python -m hf_distill plan STUDENT TEACHER --devices 8` says what that takes on each device. The
rows are those of GSM8K (`--dataset` also takes a folder with train.jsonl and test.jsonl). The
output folder gets the student, and results.json with the logs and what is measured on held-out
rows at the end.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from convert_gguf import resolve_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig
from trl.scripts.utils import TrlParser

from helpers import math_tasks
from helpers.heldout import short_rows
from helpers.launch import start_missing_processes
from hf_distill import DistillConfig, DistillTrainer, HintCollator, ModelTeacher

logger = logging.getLogger("distill_large")

DEFAULTS: dict[str, Any] = {
    "output_dir": "out/distill_large",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class RecipeArguments:
    """Holds what the recipe itself needs."""

    student_name_or_path: str = field(metadata={"help": "It has the teacher's tokenizer."})
    teacher_name_or_path: str = field(metadata={"help": "It is loaded by name, in pieces."})
    student_dtype: str = field(
        default="float32", metadata={"help": "Small updates would be lost in 16 bits."}
    )
    teacher_dtype: str | None = field(
        default=None, metadata={"help": "Such as bfloat16; None is that of its weights."}
    )
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "A hub id, or a folder with train.jsonl and test.jsonl."},
    )
    num_rows: int = field(default=400, metadata={"help": "Rows to learn from, >= 1."})
    num_eval: int = field(default=64, metadata={"help": "Held-out rows, >= 1."})
    max_tokens: int = field(default=256, metadata={"help": "Longer rows are left out."})
    tp_size: int | None = field(
        default=None,
        metadata={
            "help": "Devices of a tensor parallel group, for both models. None is what the config "
            "of accelerate says (parallelism_config_tp_size), and 1 without it."
        },
    )


def placed(tp_size: int | None) -> dict[str, Any]:
    """Return what `from_pretrained` needs to cut a model, beside what the engine does.

    Raises:
        ValueError: the size is below 1, or the processes cannot be divided into such groups.
    """
    size = int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1")) if tp_size is None else tp_size
    count = PartialState().num_processes
    if size < 1 or count % size:
        raise ValueError(f"tp_size must divide the {count} processes, got {size}")
    return {} if size == 1 else {"distributed_config": DistributedConfig(tp_size=size)}


def make_trainer(recipe: RecipeArguments, config: DistillConfig) -> DistillTrainer:
    """Load both models and the rows.

    Raises:
        ValueError: the models have other tokenizers, or there are too few short rows.
    """
    with PartialState().main_process_first():  # one process converts, the others find the result
        names = [
            resolve_model(x) for x in (recipe.student_name_or_path, recipe.teacher_name_or_path)
        ]
    tokenizer, other = (AutoTokenizer.from_pretrained(name) for name in names)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            "student and teacher must share a tokenizer, got those of "
            f"{recipe.student_name_or_path!r} and {recipe.teacher_name_or_path!r}"
        )
    cut = placed(recipe.tp_size)
    student = AutoModelForCausalLM.from_pretrained(names[0], dtype=recipe.student_dtype, **cut)
    teacher = ModelTeacher(names[1], recipe.teacher_dtype, **cut)
    collator = HintCollator(tokenizer, [])
    task = math_tasks.gsm8k(recipe.dataset, 10**6)
    train = short_rows(task.train, collator, recipe.num_rows, recipe.max_tokens)
    test = short_rows(task.test, collator, recipe.num_eval, recipe.max_tokens)
    return DistillTrainer(
        student, config, collator, train, test, processing_class=tokenizer, teacher=teacher
    )


def main() -> None:
    """Train, measure and save."""
    parser = TrlParser(cast(Any, (RecipeArguments, DistillConfig)))
    parser.set_defaults_with_config(**DEFAULTS)
    recipe, config = cast(Any, parser.parse_args_and_config())
    _ = config.device  # sets the processes up as the arguments say, before anyone else asks
    is_main = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR)
    trainer = make_trainer(recipe, config)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    found = trainer.evaluate()
    if trainer.is_fsdp_enabled:  # checkpoints are in pieces, the result is whole
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if not is_main:
        return
    logs = [log for log in trainer.state.log_history if "loss" in log]
    after = {name: found[f"eval_{name}"] for name in ("hard", "soft")}
    result = {"after": after, "steps": trainer.state.global_step, "log_history": logs}
    result["recipe"] = vars(recipe)
    path = Path(str(config.output_dir)) / "results.json"
    path.write_text(json.dumps(result, indent=1, default=str))
    print(
        f"{trainer.state.global_step} steps, loss {logs[0]['loss']:.4f} to {logs[-1]['loss']:.4f}, "
        f"held-out cross-entropy {after['hard']:.4f}, divergence {after['soft']:.4f}; see {path}",
        flush=True,
    )


if __name__ == "__main__":
    start_missing_processes()
    main()
