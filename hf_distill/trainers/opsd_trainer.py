"""OPSDTrainer: a model that learns from itself with a hint in its context."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from hf_distill.data.hint_collator import HintCollator, find_hint_collator
from hf_distill.data.turn_ends import tell_end_tokens
from hf_distill.losses import ClipConfig, Loss, LossFunction, Terms, Tokens, behaviour_log_probs
from hf_distill.monitoring.completion_table import WriteTable
from hf_distill.monitoring.preflight import check_empty_hint, warn_of_lost_context
from hf_distill.rollouts import Engine, TellEngine
from hf_distill.rollouts.config import RolloutConfig
from hf_distill.rollouts.environments import Environment
from hf_distill.rollouts.repeat_sampler import RepeatSampler
from hf_distill.rollouts.rollout import EVAL_STEP, Rollouts, RolloutWindow, make_engine, make_table
from hf_distill.run import Run
from hf_distill.teachers import SelfTeacher, Teacher, as_teacher
from hf_distill.trainers.causal_lm import BEHAVIOUR
from hf_distill.trainers.checks import check_hints
from hf_distill.trainers.forecasting import ForecastCallback
from hf_distill.trainers.forecasting_trainer import ForecastingTrainer
from hf_distill.trainers.opsd_config import OPSDConfig
from hf_distill.trainers.step_collation import shows_hints
from hf_distill.trainers.tasks import Batch
from hf_distill.trainers.token_values import write_values
from hf_distill.trainers.unread_settings import unread_opsd_settings, warn_of_unread

logger = logging.getLogger(__name__)

ROLLOUT_FILE = "rollout-{rank}.json"
NUM_CHECKED = 4  # rows of the check before training


class OPSDTrainer(ForecastingTrainer):
    """Trains by on-policy self-distillation: student = model on the prompt, teacher = it hinted.

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
        loss: as in `DistillTrainer`.
        environment: judges the completions, and may go on with the dialogue: see `Environment`.
            What it says can be read by hints.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        TypeError: args or data_collator have another type.
        ValueError: as `DistillTrainer`; or an environment without `on_policy`; or completions that
            are used more than once, or several for a prompt, with a dataset without a length.
    """

    args: OPSDConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _has_rollouts = True

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
        loss: Loss | LossFunction | None = None,
        environment: Environment | None = None,
        **kwargs: Any,
    ) -> None:
        args = OPSDConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, OPSDConfig):
            raise TypeError(f"args must be an OPSDConfig, got {type(args).__name__}")
        if data_collator is None and processing_class is None:
            raise ValueError(
                "prompts need a tokenizer: pass processing_class=tokenizer, or a HintCollator as "
                "data_collator, got None for both"
            )
        if data_collator is None:
            data_collator = HintCollator(processing_class)
        if not isinstance(data_collator, HintCollator):
            raise TypeError(
                f"data_collator must be a HintCollator, got {type(data_collator).__name__}"
            )
        self._check_rollout(args, environment)
        if args.on_policy and data_collator.packing:
            raise ValueError(
                "packing is of completions from the data, whose rows are known before the batch is "
                "made, got packing=True of the HintCollator and on_policy=True: set one of them to "
                "False"
            )
        self.hint_collator, self.environment = data_collator, environment
        self.rollouts: Rollouts | None = None
        warn_of_unread(unread_opsd_settings(args, environment is not None, teacher is None))
        self._teacher_of_args = None if teacher is not None else args.make_teacher()
        teacher = self._teacher_of_args or as_teacher(cast(Any, teacher))
        if args.on_policy and not all(x.knows_new_rows for x in teacher.each()):
            raise ValueError(
                "a cached teacher knows the rows that were written, not those that the student "
                "will write: set on_policy=False, got True"
            )
        collate: Any = data_collator.prompts if args.on_policy else data_collator
        super().__init__(
            model,
            args,
            collate,
            train_dataset,
            eval_dataset,
            processing_class,
            teacher=teacher,
            loss=loss,
            **kwargs,
        )
        if args.on_policy:
            check_hints(self.hint_collator, teacher)
        clip = cast(ClipConfig, args.clip)
        if loss is None and clip.bound is not None and clip.level == "vocab_entry":
            logger.warning(
                "clip bound %g at vocab_entry can lower tokens that the teacher wants raised; "
                "level 'token_rescale' keeps the gradient's direction",
                clip.bound,
            )

    @staticmethod
    def _check_rollout(args: OPSDConfig, environment: Environment | None) -> None:
        if args.on_policy and args.max_tokens_per_batch is not None:
            raise ValueError(
                "max_tokens_per_batch needs completions whose lengths are known before they are "
                f"sampled, got {args.max_tokens_per_batch} and on_policy=True"
            )
        if environment is not None and not args.on_policy:
            raise ValueError("an environment judges sampled completions, got on_policy=False")
        rollout = cast(RolloutConfig, args.rollout)
        if args.on_policy and rollout.only_failed and environment is None:
            raise ValueError("rollout.only_failed needs an environment that scores, got None")
        if environment is not None and rollout.prefix_tokens is not None:
            raise ValueError(
                "an environment would take completions that rollout.prefix_tokens cuts for failed "
                f"answers, got prefix_tokens {rollout.prefix_tokens!r}: set it to None, or train "
                "without the environment"
            )
        loader: Any = args.accelerator_config
        if args.on_policy and loader.dispatch_batches:
            raise ValueError(
                "dispatch_batches cuts tensors only, and a batch holds rows: set False"
            )
        if args.on_policy:
            loader.dispatch_batches = False
        copies = rollout.num_completions
        if args.on_policy and args.per_device_train_batch_size % copies:
            raise ValueError(
                f"num_completions must divide per_device_train_batch_size, got {copies} and "
                f"{args.per_device_train_batch_size}"
            )

    def _tell_end_tokens(self, ids: list[int]) -> None:
        super()._tell_end_tokens(ids)
        told = find_hint_collator(self.data_collator)  # there is none that makes prompts only
        self.hint_collator = told or tell_end_tokens(self.hint_collator, ids)

    def _set_up(self, run: Run, keeps_teacher: bool = False) -> None:
        if self._teacher_of_args is not None:
            self._teacher_of_args.become(self.args.make_teacher())
        super()._set_up(run, keeps_teacher)
        self._window: RolloutWindow | None = None
        self._resumed: dict[str, Any] | None = None
        self._has_shown_hints = False
        self.rollouts = self._make_rollouts(self.environment) if self.args.on_policy else None
        if self.args.forecast_rows:
            self._put_callback(ForecastCallback(self._log_forecast, self.args.forecast_steps))

    def _reads_rows(self) -> bool:
        return True  # also where the collator only makes prompts, before the rollout

    def _collator_for(self, teacher: Teacher) -> Callable[[Any], Any]:
        # rows of prompts go to the rollouts, which add what the teacher needs
        return (lambda x: x) if self.args.on_policy else teacher.collator

    def _make_rollouts(self, environment: Environment | None) -> Rollouts:
        run, collator = self._run, self.hint_collator
        engine, table = self._engine(), make_table(run, collator)
        self._put_callback(TellEngine(engine))
        if table is not None:
            self._put_callback(WriteTable(table))
        route = run.teacher.route
        return Rollouts(self.args, collator, environment, engine, self.accelerator, route, table)

    def _engine(self) -> Engine:
        """Return the engine; vLLM's is made once, as it has a model of its own on the devices."""
        config = cast(RolloutConfig, self.args.rollout)
        if self.rollouts is not None and config.engine == "vllm":
            return self.rollouts.engine
        return make_engine(self._run, self.hint_collator, self.environment)

    def _before_training(self) -> None:
        """Check a self-teacher without hints, see `preflight`, unless the run is resumed."""
        if not self._is_resumed:
            self._check_empty_hint()

    def _check_empty_hint(self) -> None:
        reason, own = None, self.teacher
        if not isinstance(own, SelfTeacher):
            reason = "the teacher is another model"
        elif self._run.sharded or self.is_deepspeed_enabled:
            reason = "the model is not placed before training, or lies in pieces"
        elif isinstance(self.train_dataset, IterableDataset) or not (
            has_length(self.train_dataset) and hasattr(self.train_dataset, "__getitem__")
        ):
            reason = "the dataset has no rows to look up"
        elif not len(self.train_dataset):
            reason = "the dataset is empty"
        if reason is not None or not isinstance(own, SelfTeacher):
            logger.info("no check without hints: %s", reason)
            return
        dataset: Any = self.train_dataset
        rows = [dataset[i] for i in range(min(NUM_CHECKED, len(dataset)))]
        model, collator = cast(nn.Module, self.model), self.hint_collator
        completed = not self.args.on_policy
        student, teacher = collator.without_hints(rows, completed)
        images = [collator.images(collator.messages(row, completed)) for row in rows]
        # before training the model has no autocast of its own; as in training, products are 16-bit
        with self.accelerator.autocast():
            found = check_empty_hint(
                *(model, own, student, teacher, collator.pad_token_id, self._run.in_16_bit),
                images=images,
                more_inputs=collator.image_inputs,
            )
        logger.info("without a hint student and teacher are %.1e nats apart", found)
        self._start_check.skip()

    def _look_for_hints(self, inputs: dict[str, Any]) -> None:
        if shows_hints(inputs, NUM_CHECKED):
            self._has_shown_hints = True
            if inputs.get("teacher_input_ids") is None:
                logger.info("rows have no hints: the teacher reads what the student reads")
            elif self.args.process_index == 0 and not self.hint_collator.has_own_view:
                warn_of_lost_context(inputs, self.hint_collator.tokenizer, NUM_CHECKED)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return an optimizer step's micro-batches, with completions, and their token count."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rollouts is not None and batches:
            step = self.state.global_step
            if self._window is None or self.rollouts.is_first_step(step):
                self._window = self._new_window(self.rollouts, batches, step)
            batches = [dict(batch) for batch in self._window.batches]
            count = self._get_num_items_in_batch(batches, device)
            for batch in batches:
                self._hinting.count(batch, training=True)
        return batches, count

    def _new_window(self, rollouts: Rollouts, batches: list[Any], step: int) -> RolloutWindow:
        model = cast(nn.Module, self.model_wrapped)
        resumed, self._resumed = self._resumed or {}, None
        collator = self._hinting.at(self.hint_collator, rollouts.first_step(step), training=True)
        window = rollouts.window(model, batches, step, resumed.get("episodes"), collator)
        reused = rollouts.config.steps_per_rollout > 1 and window.episodes
        if reused and rollouts.config.importance_clip is not None:
            known = resumed.get(BEHAVIOUR) or [None] * len(window.batches)
            for batch, values in zip(window.batches, known, strict=True):
                if values is None:
                    placed = self._prepare_inputs(dict(batch))
                    batch[BEHAVIOUR] = self.behaviour_log_probs(placed).cpu()
                else:
                    batch[BEHAVIOUR] = torch.tensor(values)
        return window

    def behaviour_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """Return [B, T] log-probabilities of the scored tokens under the student as it is now.

        See `losses.behaviour_log_probs`; the batch must be on the student's device.
        """
        self._vocabulary.check(batch)
        return behaviour_log_probs(self._reader, cast(nn.Module, self.model_wrapped), batch)

    def _note(self, terms: Terms, batch: Batch, tokens: Tokens, training: bool) -> None:
        super()._note(terms, batch, tokens, training)
        table = None if self.rollouts is None else self.rollouts.table
        if training and table is not None and self.args.log_token_values:
            write_values(table, self._step(), terms, batch, tokens, self.args.log_token_values)

    def _read_metrics(self, training: bool) -> dict[str, float]:
        metrics = super()._read_metrics(training)
        return metrics if self.rollouts is None else metrics | self.rollouts.read(training)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Do as `DistillTrainer` does, on completions sampled from the student if on-policy."""
        if self.rollouts is not None:
            step = EVAL_STEP + self._eval_batches
            (episodes,) = self.rollouts.play(model, [inputs], step, training=False)
            self._eval_batches += 1
            step = self.state.global_step
            collator = self._hinting.at(self.hint_collator, step, training=False)
            inputs = self.rollouts.batch(model, episodes, collator)
            self._hinting.count(inputs, training=False)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _start_evaluation(self) -> None:
        super()._start_evaluation()
        self._eval_batches = 0  # every evaluation samples with the same seeds

    def _scores_data(self) -> bool:
        return self.rollouts is None  # else what the student has sampled

    def get_train_dataloader(self) -> DataLoader:
        """Do as `Trainer` does; rows are repeated if the rollout asks for it."""
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
        """Return which setting repeats rows, as text; it is empty if none does."""
        config = cast(RolloutConfig, self.args.rollout)
        for name in ("steps_per_rollout", "num_completions"):
            if self.args.on_policy and getattr(config, name) > 1:
                return f"{name} {getattr(config, name)} > 1"
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
        config = cast(RolloutConfig, self.args.rollout)
        return RepeatSampler(
            len(dataset),
            window,
            config.steps_per_rollout,
            self.args.seed,
            shuffle=self.args.train_sampling_strategy == "random",
            copies=config.num_completions,
        )

    def _save_extra(self, folder: str) -> None:
        super()._save_extra(folder)
        path = self._rollout_path(folder)
        if self._window is not None and self._window.episodes and self._inside_a_rollout():
            state: dict[str, Any] = {
                "episodes": [[episode.state() for episode in x] for x in self._window.episodes]
            }
            if BEHAVIOUR in self._window.batches[0]:
                state[BEHAVIOUR] = [batch[BEHAVIOUR].tolist() for batch in self._window.batches]
            try:
                text = json.dumps(state)
            except TypeError as error:
                raise TypeError(
                    "a checkpoint inside a rollout holds what the environment said as JSON; give "
                    f"Feedback.columns plain numbers, strings, lists and dicts: {error}"
                ) from error
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
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
        """Return whether the next step is not the first on its completions."""
        return self.rollouts is not None and not self.rollouts.is_first_step(self.state.global_step)

    def _rollout_path(self, folder: str) -> str:
        return os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index))
