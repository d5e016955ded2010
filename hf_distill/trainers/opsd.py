"""OPSDTrainer: a model that learns from itself with a hint in its context."""

import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from hf_distill import alignment, rollouts
from hf_distill.collators import TRUNCATED, HintCollator
from hf_distill.episodes import Environment, Episode, play, share_siblings
from hf_distill.heads import causal_lm, unwrap
from hf_distill.monitors import CompletionMeter, ShareMeter
from hf_distill.preflight import check_empty_hint, warn_of_lost_context
from hf_distill.tables import WriteTable
from hf_distill.teachers import SelfTeacher, Teacher
from hf_distill.trainers.configs import ClipConfig, OPSDConfig
from hf_distill.trainers.distill import DistillTrainer
from hf_distill.trainers.groups import RolloutConfig
from hf_distill.trainers.samplers import RepeatSampler
from hf_distill.trainers.sampling import make_engine, make_table

logger = logging.getLogger(__name__)

ROLLOUT_FILE = "rollout-{rank}.json"
NUM_CHECKED = 4  # rows of the check before training
EVAL_STEP = 10**9  # eval rollouts draw from seeds that no training step uses


class Window(NamedTuple):
    """The micro-batches that are trained on for one rollout, and where they come from."""

    episodes: list[list[Episode]]
    batches: list[dict[str, Tensor]]


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
        environment: judges the completions, and may go on with the dialogue: see `Environment`.
            What it says can be read by hints.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        TypeError: args or data_collator have another type.
        ValueError: as `DistillTrainer`; or an environment without `on_policy`; or completions that
            are used more than once, or several for a prompt, with a dataset without a length.
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
        environment: Environment | None = None,
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
        self._check_rollout(args, environment)
        self.hint_collator = data_collator
        self.rollout = cast(RolloutConfig, args.rollout)
        self.environment = environment
        self._window: Window | None = None
        self._resumed: list[list[dict[str, Any]]] | None = None
        self._completion_meters = {True: CompletionMeter(), False: CompletionMeter()}
        self._sampled_meter = ShareMeter("on_policy")
        self._truncated_meters = {x: ShareMeter("hints_truncated") for x in (True, False)}
        super().__init__(
            model,
            args,
            data_collator.prompts if args.on_policy else data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            teacher=args.make_teacher() if teacher is None else teacher,
            **kwargs,
        )
        self.engine = make_engine(self, environment)
        if self.engine is not None:
            self.add_callback(rollouts.TellEngine(self.engine))
        self.table = make_table(self)
        if self.table is not None:
            self.add_callback(WriteTable(self.table))
        clip = cast(ClipConfig, args.clip)
        if clip.bound is not None and clip.level == "vocab_entry":
            logger.warning(
                "clip bound %g at vocab_entry can lower tokens that the teacher wants raised; "
                "level 'token_rescale' keeps the gradient's direction",
                clip.bound,
            )

    @staticmethod
    def _check_rollout(args: OPSDConfig, environment: Environment | None) -> None:
        if environment is not None and not args.on_policy:
            raise ValueError("an environment judges sampled completions, got on_policy=False")
        loader: Any = args.accelerator_config
        if args.on_policy and loader.dispatch_batches:
            raise ValueError(
                "dispatch_batches cuts tensors only, and a batch holds rows: set False"
            )
        if args.on_policy:
            loader.dispatch_batches = False
        copies = cast(RolloutConfig, args.rollout).num_completions
        if args.on_policy and args.per_device_train_batch_size % copies:
            raise ValueError(
                f"num_completions must divide per_device_train_batch_size, got {copies} and "
                f"{args.per_device_train_batch_size}"
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
        if reason is not None or not isinstance(self.teacher, SelfTeacher):
            logger.info("no check without hints: %s", reason)
            return
        dataset: Any = self.train_dataset
        rows = [dataset[i] for i in range(min(NUM_CHECKED, len(dataset)))]
        model, collator = cast(nn.Module, self.model), self.hint_collator
        student, teacher = collator.without_hints(rows, completed=not self.args.on_policy)
        # before training the model has no autocast of its own; as in training, products are 16-bit
        in_16_bit = self.args.bf16 or self.args.fp16 or getattr(model, "is_quantized", False)
        with self.accelerator.autocast():
            found = check_empty_hint(
                model,
                cast(SelfTeacher, self.teacher),
                student,
                teacher,
                collator.pad_token_id,
                in_16_bit,
            )
        logger.info("without a hint student and teacher are %.1e nats apart", found)

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        is_first = not self._alignment.started
        super()._check_batch(inputs)
        if is_first and self.args.process_index == 0:
            warn_of_lost_context(inputs, self.hint_collator.tokenizer, NUM_CHECKED)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, with completions, and their number of tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.on_policy and batches:
            step = self.state.global_step
            if self._window is None or step % self.rollout.steps_per_rollout == 0:
                self._window = self._make_window(batches, step)
            batches = self._window.batches
            count = self._get_num_items_in_batch(batches, device)
            if count is not None and not count:  # no reply with a hint, say: a step of no loss
                count = count + 1
        for batch in batches:
            self._count_truncated(batch, training=True)
        return [dict(batch) for batch in batches], count

    def _make_window(self, batches: list[dict[str, Any]], step: int) -> Window:
        """Micro-batches for one rollout; the completions are a checkpoint's if it had some."""
        seed, period = self.args.seed, step // self.rollout.steps_per_rollout
        resumed, self._resumed = self._resumed, None
        # the same on all processes
        sampled = random.Random(f"{seed} {period}").random() < self.rollout.on_policy_fraction
        self._sampled_meter.add(torch.tensor([sampled]))
        if not sampled:
            return Window([], [self.hint_collator(batch["rows"]) for batch in batches])
        if resumed is None:
            if self._inside_a_rollout():
                logger.warning(
                    "the checkpoint has no completions of this process, though step %d is not the "
                    "first on them: they are sampled anew, and the run is not the one it was",
                    step,
                )
            episodes = self._play(batches, step, training=True)
        else:
            episodes = self._episodes(batches)
            for one, states in zip(episodes, resumed, strict=True):
                for episode, state in zip(one, states, strict=True):
                    vars(episode).update(state)
        made = [self._rows(x) for x in episodes]
        if resumed is None and self.table is not None:
            for batch, (rows, hints) in zip(batches, made, strict=True):
                prompts = alignment.unpad(batch["prompt_ids"], batch["prompt_mask"])
                ids = alignment.unpad(rows["input_ids"], rows["attention_mask"])
                replies = [row[len(prompt) :] for row, prompt in zip(ids, prompts, strict=True)]
                self.table.add(step, prompts, hints, replies)
        return Window(episodes, [rows for rows, _ in made])

    def _episodes(self, batches: list[dict[str, Any]]) -> list[list[Episode]]:
        """New episodes for the rows of each micro-batch."""
        column, size = self.hint_collator.prompt_column, self.rollout.num_completions
        return [
            [Episode(row, row[column], group=i // size) for i, row in enumerate(batch["rows"])]
            for batch in batches
        ]

    def _play(
        self, batches: list[dict[str, Any]], step: int, training: bool
    ) -> list[list[Episode]]:
        """The episodes of each micro-batch, the replies of a round generated in one call."""
        model, eos_token_id = cast(nn.Module, self.model_wrapped), self.hint_collator.eos_token_id
        end_ids = rollouts.end_token_ids(unwrap(model), eos_token_id)

        def sample(prompts: Sequence[Sequence[int]], turn: int) -> list[list[int]]:
            # large odd multipliers keep steps, processes and rounds of neighbouring seeds apart
            seed = (self.args.seed * 1_000_003 + step) * 65_537 + self.args.process_index
            assert self.engine is not None
            completions = self.engine.sample(model, prompts, seed + (turn << 50))
            self._completion_meters[training].add(completions, end_ids)
            return completions

        episodes = self._episodes(batches)
        prompts = [alignment.unpad(b["prompt_ids"], b["prompt_mask"]) for b in batches]
        play(
            [episode for batch in episodes for episode in batch],
            [prompt for batch in prompts for prompt in batch],
            sample,
            self.hint_collator,
            self.environment,
            self.rollout.max_turns if self.environment else 1,
            end_ids,
        )
        for batch in episodes if training else []:
            share_siblings(batch)
        return episodes

    def _count_truncated(self, batch: dict[str, Tensor], training: bool) -> None:
        if TRUNCATED in batch:
            self._truncated_meters[training].add(batch[TRUNCATED])

    def _read_metrics(self, training: bool) -> dict[str, float]:
        metrics = super()._read_metrics(training)
        for meters in (self._completion_meters, self._truncated_meters):
            metrics |= meters[training].read(self.accelerator)
        if training and self.rollout.on_policy_fraction < 1.0:
            metrics |= self._sampled_meter.read(self.accelerator)
        return metrics

    def _rows(self, episodes: list[Episode]) -> tuple[dict[str, Tensor], list[Sequence[str]]]:
        """The student's and the teacher's rows of one micro-batch, and their hints."""
        batch, hints = self.hint_collator.from_episodes(episodes)
        alignment.assert_completions(batch, [episode.completions for episode in episodes])
        config = getattr(causal_lm(cast(nn.Module, self.model)), "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        lengths = batch["teacher_attention_mask"].sum(1).tolist()
        for i, length in enumerate(lengths):
            if limit is not None and length > limit:
                written = sum(map(len, episodes[i].completions))
                raise ValueError(
                    f"row {i} of the batch: the teacher's row has {length} tokens (context "
                    f"{length - written}, completion {written}), the model takes {limit}"
                )
        return batch, hints

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in `DistillTrainer`, with completions sampled from the student if on-policy."""
        if self.args.on_policy:
            (episodes,) = self._play([inputs], EVAL_STEP + self._eval_batches, training=False)
            self._eval_batches += 1
            inputs, _ = self._rows(episodes)
        self._count_truncated(inputs, training=False)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `DistillTrainer`; every evaluation samples with the same seeds."""
        self._eval_batches = 0
        return super().evaluation_loop(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; rows are repeated if the rollout asks for it."""
        strategy = self.args.train_sampling_strategy
        repeatable = has_length(self.train_dataset) and strategy in ("random", "sequential")
        if self._repeats() and not repeatable:
            raise ValueError(
                f"{self._repeats()} needs a dataset with a length and "
                "train_sampling_strategy 'random' or 'sequential', got "
                f"{type(self.train_dataset).__name__} and {strategy!r}"
            )
        return super().get_train_dataloader()

    def _repeats(self) -> str:
        """Which setting repeats rows, or nothing."""
        if not self.args.on_policy:
            return ""
        for name in ("steps_per_rollout", "num_completions"):
            if getattr(self.rollout, name) > 1:
                return f"{name} {getattr(self.rollout, name)} > 1"
        return ""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self._repeats():
            return super()._get_train_sampler(train_dataset)
        window = (
            self._train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes
        )
        return RepeatSampler(
            len(dataset),
            window,
            self.rollout.steps_per_rollout,
            self.args.seed,
            shuffle=self.args.train_sampling_strategy == "random",
            copies=self.rollout.num_completions,
        )

    def _save_extra(self, folder: str) -> None:
        super()._save_extra(folder)
        path = self._rollout_path(folder)
        if self._window is not None and self._window.episodes and self._inside_a_rollout():
            states = [[episode.state() for episode in batch] for batch in self._window.episodes]
            with open(path, "w", encoding="utf-8") as file:
                json.dump(states, file)
        elif os.path.isfile(path):
            os.remove(path)  # of a run before this one

    def _load_extra(self, folder: str) -> None:
        super()._load_extra(folder)
        path = self._rollout_path(folder)
        self._window = self._resumed = None
        if os.path.isfile(path) and self._inside_a_rollout():
            with open(path, encoding="utf-8") as file:
                self._resumed = json.load(file)

    def _inside_a_rollout(self) -> bool:
        """Whether the next step is not the first on its completions."""
        return self.state.global_step % self.rollout.steps_per_rollout != 0

    def _rollout_path(self, folder: str) -> str:
        return os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index))
