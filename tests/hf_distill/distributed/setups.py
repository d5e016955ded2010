"""Training runs for one process or several, of as many rows a step; run as a script, it saves them.

accelerate launch --multi_gpu --num_processes 2 -m tests.hf_distill.distributed.setups FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    HintCollator,
    OPSDConfig,
    OPSDTrainer,
    SpanCollator,
)
from hf_distill.cache import CachedTeacher, HeadSamples, cache_teacher
from hf_distill.data.batches import unpad
from tests.hf_distill.data import image_processors
from tests.hf_distill.trainers import (
    classifying,
    experts,
    image_models,
    letters,
    models,
    own_losses,
    placed,
)

ROWS_PER_STEP = 4
SAVED_AT = 3
Result = tuple[dict[str, Tensor], list[dict[str, float]]]


def _options(folder: Path, num_processes: int, **changes: Any) -> dict[str, Any]:
    per_process = ROWS_PER_STEP // num_processes
    return models.options(folder, per_device_train_batch_size=per_process, **changes)


def distill(folder: Path, num_processes: int, **changes: Any) -> DistillTrainer:
    """All weights; rows of uneven lengths, two micro-batches a step."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2} | changes
    tokenizer = settings.pop("processing_class", None)
    teacher, loss = settings.pop("teacher", None) or models.llama(1), settings.pop("loss", None)
    args = DistillConfig(**_options(folder, num_processes, **settings))
    return DistillTrainer(
        models.llama(),
        args,
        models.Pad(),
        models.rows(longest=30),
        processing_class=tokenizer,
        teacher=teacher,
        loss=loss,
    )


def distill_own_loss(folder: Path, num_processes: int) -> DistillTrainer:
    """The forward KL in plain PyTorch, with metrics of its own."""
    return distill(folder, num_processes, loss=own_losses.Measuring())


def distill_cached(folder: Path, num_processes: int) -> DistillTrainer:
    """From a cache that the processes have written together."""
    rows, codec = models.rows(longest=30), HeadSamples(top_k=8, num_samples=4)
    given = {"codec": codec, "data_collator": models.Pad(), "shard_rows": 3}
    cache_teacher(models.llama(1), rows, folder / "cache", **given)
    return distill(folder, num_processes, teacher=CachedTeacher(folder / "cache"))


def distill_local_mean(folder: Path, num_processes: int) -> DistillTrainer:
    """The bug: every process divides by its own number of tokens."""
    return distill(folder, num_processes, average_tokens_across_devices=False)


def distill_logits(folder: Path, num_processes: int) -> DistillTrainer:
    """Label smoothing reads logits and has a hard loss of its own."""
    return distill(folder, num_processes, label_smoothing_factor=0.1)


def distill_projections(folder: Path, num_processes: int) -> DistillTrainer:
    """Projections of hidden layers where the loss is outside of the model's forward."""
    given = {"hidden_layers": "uniform", "teacher": models.llama(1, hidden_size=48)}
    return distill(folder, num_processes, label_smoothing_factor=0.1, **given)


def distill_experts(folder: Path, num_processes: int) -> DistillTrainer:
    """Their auxiliary loss is one of each micro-batch, so that these have the same rows here."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // num_processes}
    args = DistillConfig(**models.options(folder, max_steps=2, **batches))
    rows, teacher = models.rows(longest=30), experts.moe(seed=1)
    return DistillTrainer(experts.moe(), args, models.Pad(), rows, teacher=teacher)


def distill_nothing_to_score(folder: Path, num_processes: int) -> DistillTrainer:
    """The second of two processes has no labelled token in the first step."""
    trainer = distill(folder, num_processes, gradient_accumulation_steps=1)
    for row in trainer.train_dataset[2:4]:
        row["labels"] = [-100] * len(row["labels"])
    return trainer


def stopped_by_one(folder: Path, num_processes: int) -> DistillTrainer:
    """The teacher of the second of two processes has the student's head."""
    watchdog = {"action": "stop", "teacher_uniform": None}  # random models are nearly uniform
    settings = {"watchdog": watchdog, "learning_rate": 0.01}
    trainer = distill(folder, num_processes, **settings)
    if trainer.accelerator.process_index == 1:
        trainer.teacher.model.lm_head = trainer.model.lm_head
    return trainer


def _opsd(
    folder: Path,
    num_processes: int,
    model: Any,
    kind: type[OPSDTrainer] = OPSDTrainer,
    **changes: Any,
) -> OPSDTrainer:
    settings = {"max_completion_length": 8, "rollout": {"temperature": 0.0}} | changes
    args = OPSDConfig(**_options(folder, num_processes, **settings))
    data, tokenizer = models.problems(), models.tokenizer()
    return kind(model, args, train_dataset=data, processing_class=tokenizer)


def opsd_off_policy(folder: Path, num_processes: int) -> OPSDTrainer:
    return _opsd(folder, num_processes, models.lora(models.llama()), on_policy=False)


def opsd_hint_dropout(folder: Path, num_processes: int) -> OPSDTrainer:
    """Rows whose hints are dropped or cut as the step says, on whatever process they are."""
    plan = {"hint_dropout": "linear:0.2->0.8@3", "max_hint_length": "linear:8->2@3"}
    collator = HintCollator(models.tokenizer(), truncation="hint", **plan)
    args = OPSDConfig(**_options(folder, num_processes, on_policy=False, max_steps=4))
    return OPSDTrainer(models.lora(models.llama()), args, collator, models.problems())


def opsd_on_policy(folder: Path, num_processes: int) -> OPSDTrainer:
    """Greedy, for samples depend on the rows that share a process. Completions are kept."""
    return _opsd(folder, num_processes, models.lora(models.llama()), log_completions=1)


def opsd_repeated(folder: Path, num_processes: int) -> OPSDTrainer:
    """Two steps per rollout, shuffled, into a second epoch, with a moving average as teacher."""
    return _opsd(
        folder,
        num_processes,
        models.llama(),
        teacher="ema",
        self_teacher={"ema_decay": 0.5},
        rollout={"temperature": 0.0, "steps_per_rollout": 2},
        max_steps=10,
        train_sampling_strategy="random",
    )


class _Weighted(models.Pad):
    def __call__(self, batch: Any) -> dict[str, Tensor]:
        made = super().__call__(batch)
        return made | {"token_weights": (made["input_ids"] % 4) * 0.75}


def distill_weighted(folder: Path, num_processes: int) -> DistillTrainer:
    """Weights of tokens, some 0; a loss of single tokens; classes count too."""
    trainer = distill(
        folder,
        num_processes,
        divergence="policy_gradient",
        token_weights={"number": 3.0},
        processing_class=models.tokenizer(),
    )
    trainer.data_collator = _Weighted()
    return trainer


def classify(folder: Path, num_processes: int) -> DistillTrainer:
    """A classifier, the labels of the processes' rows missing at different rates."""
    changes = {"gradient_accumulation_steps": 2, "max_steps": 2, "alpha": 0.3}
    rows = classifying.rows(unlabelled=1)
    for row in rows[:3]:
        row["label"] = -100
    options = _options(folder, num_processes, **changes)
    options.pop("output_dir")
    return classifying.trainer(folder, data=rows, **options)


def _placed(folder: Path, num_processes: int, make: Any, data: Any) -> DistillTrainer:
    """The processes' rows have different numbers of labels."""
    changes = {"gradient_accumulation_steps": 2, "max_steps": 2, "alpha": 0.3}
    options = _options(folder, num_processes, **changes)
    options.pop("output_dir")
    return placed.trainer(folder, make(), make(1), data, **options)


def masked(folder: Path, num_processes: int) -> DistillTrainer:
    return _placed(folder, num_processes, placed.MASKED["bert"], placed.masked_rows())


def token_classes(folder: Path, num_processes: int) -> DistillTrainer:
    rows = placed.masked_rows(classes=placed.CLASSES)
    return _placed(folder, num_processes, placed.PLACES["bert"], rows)


def seq2seq(folder: Path, num_processes: int) -> DistillTrainer:
    return _placed(folder, num_processes, placed.SEQ2SEQ["bart"], placed.pairs())


def opsd_spans(folder: Path, num_processes: int) -> OPSDTrainer:
    """A teacher of letters reads what a student of words has sampled."""
    words, others = models.tokenizer(), letters.letters()
    settings = {"max_completion_length": 8, "rollout": {"temperature": 0.0}, "divergence": "spans"}
    args = OPSDConfig(**_options(folder, num_processes, **settings, alpha=1.0, temperature=1.0))
    given = {"teacher": letters.reader(), "processing_class": words}
    collator = SpanCollator(words, others, "{hint}")
    return OPSDTrainer(models.llama(), args, collator, models.problems(), **given)


def opsd_images(folder: Path, num_processes: int) -> OPSDTrainer:
    """Rows with images on both sides."""
    processor, rows = image_processors.processor("llava"), image_processors.rows()
    settings = {"max_completion_length": 6, "rollout": {"temperature": 0.0}, "teacher": "base"}
    args = OPSDConfig(**_options(folder, num_processes, **settings, max_steps=2))
    given = {"processing_class": processor}
    model, collator = image_models.model("llava"), HintCollator(processor)
    return OPSDTrainer(model, args, collator, rows * 4, **given)


def distill_taid(folder: Path, num_processes: int) -> DistillTrainer:
    """Its t follows the loss of both processes, ahead of the linear target."""
    taid = {"t_start": 0.5, "t_end": 0.95, "step_size": 0.8, "momentum": 0.9}
    return distill(folder, num_processes, taid=taid, max_steps=4)


def distill_entropy(folder: Path, num_processes: int) -> DistillTrainer:
    """The sum of weights is known once every process has asked its teacher."""
    settings = {"entropy": 4.0, "reasoning": 0.25, "markers": ["1", "2"], "number": 3.0}
    tokenizer = models.tokenizer()
    trainer = distill(folder, num_processes, token_weights=settings, processing_class=tokenizer)
    trainer.data_collator = _Weighted()
    with torch.no_grad():  # sure of some tokens, unsure of others
        trainer.teacher.model.lm_head.weight.mul_(4)
    return trainer


class _Anchored(OPSDTrainer):
    """Batches with anchor rows, longer and shorter than the others; some have nothing scored."""

    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        own = torch.zeros((), dtype=torch.long)
        for batch in batches:
            rows = []
            for ids in unpad(batch["input_ids"], batch["attention_mask"]):
                ids = (ids[:5] * 4)[: 4 + sum(ids[:5]) % 16]
                labels = [i if i % 5 < 2 and ids[0] % 2 == 0 else -100 for i in ids]
                mask = [1] * len(ids)
                rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
            made = models.Pad()(rows)
            own += (made["labels"][:, 1:] != -100).sum()
            batch |= {f"anchor_{name}": value for name, value in made.items()}
        total = self.accelerator.reduce(own, reduction="sum")
        return [batch | {"anchor_count": total} for batch in batches], count


def opsd_anchored(folder: Path, num_processes: int) -> OPSDTrainer:
    return _opsd(
        folder,
        num_processes,
        models.lora(models.llama()),
        kind=_Anchored,
        anchor_weight=0.5,
        gradient_accumulation_steps=2,
    )


SETUPS = (
    classify,
    masked,
    token_classes,
    seq2seq,
    opsd_spans,
    opsd_images,
    distill_cached,
    distill,
    distill_entropy,
    distill_experts,
    distill_local_mean,
    distill_logits,
    distill_nothing_to_score,
    distill_own_loss,
    distill_projections,
    distill_taid,
    distill_weighted,
    opsd_anchored,
    stopped_by_one,
    opsd_off_policy,
    opsd_hint_dropout,
    opsd_on_policy,
    opsd_repeated,
)


def opsd_saved(folder: Path, num_processes: int) -> OPSDTrainer:
    """Samples of each process, a moving average, a checkpoint between two steps of a rollout."""
    return _opsd(
        folder,
        num_processes,
        models.llama(attention_dropout=0.2),
        teacher="ema",
        self_teacher={"ema_decay": 0.5},
        rollout={"temperature": 1.0, "steps_per_rollout": 2},
        max_steps=SAVED_AT + 2,
        save_strategy="steps",
        save_steps=SAVED_AT,
        train_sampling_strategy="random",
    )


def train(setup: Any, folder: Path, num_processes: int, resume_from: str | None = None) -> Result:
    """Final weights, and the logs of all steps."""
    trainer = setup(folder, num_processes)
    assert trainer.accelerator.num_processes == num_processes
    trainer.train(resume_from_checkpoint=resume_from)
    weights = models.weights(trainer.accelerator.unwrap_model(trainer.model))
    return weights, models.steps(trainer)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    checkpoint = str(folder / "saved" / f"checkpoint-{SAVED_AT}")
    runs = [(setup.__name__, setup, folder, None) for setup in SETUPS]
    runs += [
        ("straight", opsd_saved, folder / "saved", None),
        ("resumed", opsd_saved, folder / "again", checkpoint),
    ]
    for name, setup, to, resume_from in runs:
        result = train(setup, to, 2, resume_from)
        if torch.distributed.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
