"""OPSDTrainer: a model that learns from itself with a hint in its context."""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from hf_distill import alignment, rollouts
from hf_distill.collators import TRUNCATED, HintCollator
from hf_distill.heads import causal_lm, unwrap
from hf_distill.monitors import CompletionMeter, ShareMeter
from hf_distill.preflight import check_empty_hint
from hf_distill.tables import CompletionTable, WriteTable
from hf_distill.teachers import SelfTeacher, Teacher
from hf_distill.trainers.configs import ClipConfig, OPSDConfig
from hf_distill.trainers.distill import DistillTrainer
from hf_distill.trainers.groups import RolloutConfig
from hf_distill.trainers.samplers import RepeatSampler

logger = logging.getLogger(__name__)

ROLLOUT_FILE = "rollout-{rank}.json"
NUM_CHECKED = 4  # rows of the check before training
EVAL_STEP = 10**9  # eval rollouts draw from seeds that no training step uses


class OPSDTrainer(DistillTrainer):
    """On-policy self-distillation: student = the model on the prompt, teacher = it with a hint.

    Completions are sampled from the student once per optimizer step (or per `steps_per_rollout`
    steps), or taken from the data (`on_policy=False`); both sides score the same tokens.

    Args:
        model: the student, with or without PEFT adapters.
        args: an `OPSDConfig`.
        data_collator: a `HintCollator`; by default one for the columns prompt, hint, completion.
        train_dataset: rows for the collator.
        eval_dataset: the same; completions are sampled for it too, with fixed seeds.
        processing_class: the tokenizer.
        teacher: a teacher to use instead of the one that `args.teacher` names.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        TypeError: args or data_collator have another type.
        ValueError: as `DistillTrainer`; or `steps_per_rollout` > 1 with a dataset without a length.
    """

    args: OPSDConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: Any = None,
        args: OPSDConfig | None = None,
        data_collator: HintCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher: Teacher | nn.Module | str | None = None,
        **kwargs: Any,
    ) -> None:
        args = OPSDConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, OPSDConfig):
            raise TypeError(f"args must be an OPSDConfig, got {type(args).__name__}")
        if data_collator is None:
            data_collator = HintCollator(processing_class)
        if not isinstance(data_collator, HintCollator):
            raise TypeError(
                f"data_collator must be a HintCollator, got {type(data_collator).__name__}"
            )
        self.hint_collator = data_collator
        self.rollout = cast(RolloutConfig, args.rollout)
        self._completions: list[list[list[int]]] | None = None
        self._completion_meters = {True: CompletionMeter(), False: CompletionMeter()}
        self._truncated_meters = {x: ShareMeter("hints_truncated") for x in (True, False)}
        super().__init__(
            model,
            args,
            data_collator.contexts if args.on_policy else data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            teacher=args.make_teacher() if teacher is None else teacher,
            **kwargs,
        )
        self.engine = self._make_engine() if args.on_policy else None
        if self.engine is not None:
            self.add_callback(rollouts.TellEngine(self.engine))
        self.table: CompletionTable | None = None
        if args.log_completions:
            tokenizer, report_to = data_collator.tokenizer, cast(list[str], args.report_to)
            self.table = CompletionTable(
                cast(str, args.output_dir),
                report_to,
                tokenizer,
                args.log_completions,
                self.accelerator,
            )
            self.add_callback(WriteTable(self.table))
        clip = cast(ClipConfig, args.clip)
        if clip.bound is not None and clip.level == "vocab_entry":
            logger.warning(
                "clip bound %g at vocab_entry can lower tokens that the teacher wants raised; "
                "level 'token_rescale' keeps the gradient's direction",
                clip.bound,
            )

    def _make_engine(self) -> rollouts.Engine:
        rollout = self.rollout
        sampling = rollouts.Sampling(
            self.hint_collator.pad_token_id,
            self.hint_collator.eos_token_id,
            self.args.max_completion_length,
            rollout.temperature,
            rollout.generation_kwargs,
        )
        return rollouts.make_engine(
            rollout.engine,
            sampling,
            batch_size=rollout.batch_size,
            engine_kwargs=rollout.engine_kwargs,
            model=cast(nn.Module, self.model),
            accelerator=self.accelerator,
            processing_class=self.hint_collator.tokenizer,
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`; a new run first checks a self-teacher without hints, see `preflight`."""
        if not resume_from_checkpoint and self.state.global_step == 0:
            self._check_empty_hint()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _check_empty_hint(self) -> None:
        reason = None
        if not isinstance(self.teacher, SelfTeacher):
            reason = "the teacher is another model"
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "the model is not placed before training"
        elif isinstance(self.train_dataset, IterableDataset) or not (
            has_length(self.train_dataset) and hasattr(self.train_dataset, "__getitem__")
        ):
            reason = "the dataset has no rows to look up"
        elif not len(self.train_dataset):
            reason = "the dataset is empty"
        if reason is not None or self.teacher is None:
            logger.info("no check without hints: %s", reason)
            return
        dataset: Any = self.train_dataset
        rows = [dataset[i] for i in range(min(NUM_CHECKED, len(dataset)))]
        model, collator = cast(nn.Module, self.model), self.hint_collator
        student, teacher = collator.without_hints(rows)
        # before training the model has no autocast of its own; as in training, products are 16-bit
        in_16_bit = self.args.bf16 or self.args.fp16 or getattr(model, "is_quantized", False)
        with self.accelerator.autocast():
            found = check_empty_hint(
                model, self.teacher, student, teacher, collator.pad_token_id, in_16_bit
            )
        logger.info("without a hint student and teacher are %.1e nats apart", found)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, with completions, and their number of tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._count_truncated(batch, training=True)
        if not self.args.on_policy or not batches:
            return batches, count
        step = self.state.global_step
        if self._completions is None or step % self.rollout.steps_per_rollout == 0:
            self._completions = self._rollout(batches, step, training=True)
        batches = [self._rows(b, c) for b, c in zip(batches, self._completions, strict=True)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _rollout(
        self, batches: list[dict[str, Tensor]], step: int, training: bool
    ) -> list[list[list[int]]]:
        """One list of completions per micro-batch, all generated in one call."""
        model, eos_token_id = cast(nn.Module, self.model_wrapped), self.hint_collator.eos_token_id
        prompts = [alignment.unpad(b["prompt_ids"], b["prompt_mask"]) for b in batches]
        assert self.engine is not None
        # a large odd multiplier keeps steps and processes of neighbouring seeds apart
        seed = (self.args.seed * 1_000_003 + step) * 65_537 + self.args.process_index
        flat = [prompt for batch in prompts for prompt in batch]
        completions = self.engine.sample(model, flat, seed)
        end_ids = rollouts.end_token_ids(unwrap(model), eos_token_id)
        self._completion_meters[training].add(completions, end_ids)
        if training and self.table is not None:
            contexts = [self._text(c) for b in batches for c in _teacher_prompts(b)]
            no_hints: list[list[str]] = [[] for _ in flat]  # they are in the teacher's context
            self.table.add(step, flat, no_hints, completions, {"teacher_prompt": contexts})
        rest = iter(completions)
        return [[next(rest) for _ in batch] for batch in prompts]

    def _text(self, ids: list[int]) -> str:
        return cast(str, self.hint_collator.tokenizer.decode(ids, skip_special_tokens=False))

    def _count_truncated(self, batch: dict[str, Tensor], training: bool) -> None:
        if TRUNCATED in batch:
            self._truncated_meters[training].add(batch[TRUNCATED])

    def _read_metrics(self, training: bool) -> dict[str, float]:
        metrics = super()._read_metrics(training)
        for meters in (self._completion_meters, self._truncated_meters):
            metrics |= meters[training].read(self.accelerator)
        return metrics

    def _rows(self, batch: dict[str, Tensor], completions: list[list[int]]) -> dict[str, Tensor]:
        """The student's and the teacher's rows of one micro-batch of contexts."""
        prompts = alignment.unpad(batch["prompt_ids"], batch["prompt_mask"])
        teacher_prompts = _teacher_prompts(batch)
        self._check_context(teacher_prompts, completions)
        return alignment.build_batch(
            prompts, teacher_prompts, completions, self.hint_collator.pad_token_id
        )

    def _check_context(self, contexts: list[list[int]], completions: list[list[int]]) -> None:
        config = getattr(causal_lm(cast(nn.Module, self.model)), "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        for i, (context, completion) in enumerate(zip(contexts, completions, strict=True)):
            length = len(context) + len(completion)
            if limit is not None and length > limit:
                raise ValueError(
                    f"row {i} of the batch: the teacher's row has {length} tokens (context "
                    f"{len(context)}, completion {len(completion)}), the model takes {limit}"
                )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in `DistillTrainer`, with completions sampled from the student if on-policy."""
        self._count_truncated(inputs, training=False)
        if self.args.on_policy:
            (completions,) = self._rollout([inputs], EVAL_STEP + self._eval_batches, training=False)
            self._eval_batches += 1
            inputs = self._rows(inputs, completions)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `DistillTrainer`; every evaluation samples with the same seeds."""
        self._eval_batches = 0
        return super().evaluation_loop(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; rows are repeated if `steps_per_rollout` asks for it."""
        repeats, strategy = self.rollout.steps_per_rollout, self.args.train_sampling_strategy
        repeatable = has_length(self.train_dataset) and strategy in ("random", "sequential")
        if repeats > 1 and self.args.on_policy and not repeatable:
            raise ValueError(
                f"steps_per_rollout {repeats} > 1 needs a dataset with a length and "
                "train_sampling_strategy 'random' or 'sequential', got "
                f"{type(self.train_dataset).__name__} and {strategy!r}"
            )
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        repeats, strategy = self.rollout.steps_per_rollout, self.args.train_sampling_strategy
        if repeats == 1 or not self.args.on_policy:
            return super()._get_train_sampler(train_dataset)
        window = (
            self._train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes
        )
        return RepeatSampler(
            len(dataset), window, repeats, self.args.seed, shuffle=strategy == "random"
        )

    def _save_extra(self, folder: str) -> None:
        super()._save_extra(folder)
        if (
            self._completions is None
            or self.state.global_step % self.rollout.steps_per_rollout == 0
        ):
            return  # the next step samples anew
        name = ROLLOUT_FILE.format(rank=self.args.process_index)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(self._completions, file)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        name = ROLLOUT_FILE.format(rank=self.args.process_index)
        path = os.path.join(resume_from_checkpoint, name)
        self._completions = None
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                self._completions = json.load(file)
        elif self.args.on_policy and self.rollout.steps_per_rollout > 1:
            logger.info("no %s in the checkpoint: completions are sampled anew", name)


def _teacher_prompts(batch: dict[str, Tensor]) -> list[list[int]]:
    return alignment.unpad(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
