"""Fine-tune a causal language model on a text file: one document per line, packed into blocks."""

from dataclasses import dataclass, field
from itertools import chain

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)

from hf_distill import DistillConfig, DistillTrainer


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or name of the model."})
    train_file: str = field(metadata={"help": "Text, one document per line."})
    teacher_name_or_path: str | None = field(default=None, metadata={"help": "For distillation."})
    block_size: int = field(default=16, metadata={"help": "Tokens of a training example."})
    validation_split: float = field(default=0.25, metadata={"help": "Share held out."})


def blocks(tokenizer, path: str, size: int) -> Dataset:
    """The file's tokens in blocks of `size`; what remains at the end is left out."""
    with open(path, encoding="utf-8") as file:
        documents = [line.strip() for line in file if line.strip()]
    ids = list(chain.from_iterable(tokenizer(documents)["input_ids"]))
    cut = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    ones = [[1] * size for _ in cut]
    return Dataset.from_dict({"input_ids": cut, "attention_mask": ones, "labels": cut})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path)
    data = blocks(tokenizer, script_args.train_file, script_args.block_size)
    split = data.train_test_split(script_args.validation_split, seed=training_args.seed)
    trainer = DistillTrainer(
        model=model,
        teacher=script_args.teacher_name_or_path,
        args=training_args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
