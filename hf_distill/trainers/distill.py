"""DistillTrainer: a Trainer whose loss compares the student with a teacher."""

import logging
import os
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_distill import alignment, losses, token_weights
from hf_distill.heads import Reader, Signal, causal_lm, vocab_size
from hf_distill.monitors import MeanMeter, TokenMeter
from hf_distill.offline import CachedCollator, CachedTeacher
from hf_distill.probes import make_probe
from hf_distill.rollouts import end_token_ids
from hf_distill.teachers import RoutedCollator, Teacher, as_teacher
from hf_distill.token_classes import token_classes
from hf_distill.token_weights import TokenWeights
from hf_distill.trainers import classifiers, scheduled
from hf_distill.trainers.checks import check_setup, check_unweighted, check_without_teacher
from hf_distill.trainers.configs import DistillConfig
from hf_distill.trainers.groups import (
    HiddenConfig,
    TaidConfig,
    TokenWeightsConfig,
    WatchdogConfig,
)
from hf_distill.trainers.hard_losses import HardLoss
from hf_distill.trainers.hidden import HiddenAlignment
from hf_distill.trainers.hinting import HintingTrainer
from hf_distill.trainers.scoring import Scoring, Share
from hf_distill.trainers.taid import Taid
from hf_distill.trainers.weighing import Weighing

logger = logging.getLogger(__name__)

TEACHER_FILE = "teacher.safetensors"


class _UpdateTeacher(TrainerCallback):
    """Tells the teacher that an optimizer step has been taken."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the Trainer."""
        self.teacher.update(model)


class DistillTrainer(HintingTrainer):
    """A `Trainer` for causal LMs and classifiers: loss = alpha * soft + (1 - alpha) * hard.

    soft is the divergence of the args between teacher and student at every labelled token, hard the
    cross-entropy of the labels (with `label_smoothing_factor` or `compute_loss_func`, that one; of
    a student whose own loss is another, its own). Both are summed and divided by the number of
    labelled tokens of the whole optimizer step. Where the models allow it, [rows, positions, vocab]
    logits are never built. Of sequence classifiers, see `classifiers.Classification`.

    Args:
        model: the student; every argument but `teacher` is that of `Trainer`.
        args: a `DistillConfig`.
        data_collator: as in `Trainer`.
        train_dataset: as in `Trainer`.
        eval_dataset: as in `Trainer`.
        processing_class: as in `Trainer`.
        teacher: a model, a name for `from_pretrained`, or a teacher of `hf_distill.teachers`. May
            be None if alpha is 0: this is then a plain `Trainer`.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: the teacher is missing, or its vocabulary is not the student's, or the set-up is
            one that the loss cannot be right in; the message says which.
        TypeError: args is not a `DistillConfig`.
    """

    args: DistillConfig

    def __init__(
        self,
        model: Any = None,
        args: DistillConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher: Teacher | nn.Module | str | None = None,
        **kwargs: Any,
    ) -> None:
        args = DistillConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DistillConfig):
            raise TypeError(f"args must be a DistillConfig, got {type(args).__name__}")
        scheduled.check_teacher(args, teacher is not None)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
        )
        self.teacher = None if teacher is None else as_teacher(teacher)
        self._layers: HiddenAlignment | None = None
        self._taid: Taid | None = None
        if self.teacher is None:
            check_without_teacher(self)
            return
        self._weighing = self._make_weighing()
        self._scoring = Scoring(args.loss_settings())
        self._classification = classifiers.for_student(self)
        self._hard_loss = HardLoss(self)
        check_setup(self)
        # this class divides by num_items_in_batch itself, whatever the model's forward accepts
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        rows = self._classification
        self._loss_shifts_labels = rows is None
        # PEFT's forward hides them from the Trainer
        self.label_names = ["labels" if rows is None else rows.label_name]
        self._teacher_columns = () if rows is None else rows.columns
        refusal = self._hidden_states_refusal()
        self._reader = Reader("student", refusal)
        classes = self._token_classes() if rows is None else None
        self._meters = {True: TokenMeter(classes), False: TokenMeter(classes)}
        eos_token_id = getattr(processing_class, "eos_token_id", None)
        end_ids = end_token_ids(causal_lm(cast(nn.Module, self.model)), eos_token_id)
        self._alignment = alignment.AlignmentMeter(end_ids)
        self.teacher.prepare(self.accelerator, cast(nn.Module, self.model), refusal)
        if isinstance(self.teacher, CachedTeacher):
            self.data_collator = CachedCollator(self.data_collator, self.teacher)
        self._layers = self._make_layers(self.teacher)
        self._mean_meters = {x: MeanMeter(self._mean_names()) for x in (True, False)}
        self.add_callback(_UpdateTeacher(self.teacher))
        if args.taid is not None:
            self._taid = Taid(cast(TaidConfig, args.taid), self.accelerator)
            self.add_callback(self._taid)
        self._probe = None
        self._add_watchdog(self.teacher)

    @property
    def objective(self) -> losses.Objective | losses.SampledObjective:
        """The loss of a token now: of every micro-batch of the next optimizer step."""
        return self.args.objective(self.state.global_step)

    def _make_layers(self, teacher: Teacher) -> HiddenAlignment | None:
        args = self.args
        settings = cast(HiddenConfig, args.hidden)
        weighs = scheduled.bounds(args, "hidden_weight")[1] > 0
        if args.hidden_layers is None or not (weighs or settings.attention_weight):
            return None
        model = cast(nn.Module, self.model)
        return HiddenAlignment(model, teacher, args.hidden_layers, settings, args.seed)

    def _make_weighing(self) -> Weighing:
        config = cast(TokenWeightsConfig, self.args.token_weights)
        around = config.by_class(), self.processing_class, config.reasoning
        weigh = TokenWeights(*around, config.around_reasoning())
        return Weighing(weigh, config.entropy, vocab_size(causal_lm(cast(nn.Module, self.model))))

    def _token_classes(self) -> Tensor | None:
        """[V] the class of each token, where the processing class is a tokenizer."""
        size = vocab_size(causal_lm(cast(nn.Module, self.model)))
        if not isinstance(self.processing_class, PreTrainedTokenizerBase) or size is None:
            return None
        return token_classes(self.processing_class, size)

    def _add_watchdog(self, teacher: Teacher) -> None:
        config = cast(WatchdogConfig, self.args.watchdog)
        if config.action == "off":
            return
        if self._classification is not None:
            config = classifiers.without_text_limits(config)
        # before the callbacks that report, so that they see its metrics
        self.callback_handler.callbacks.insert(0, config.make())
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.info("the watchdog does not probe the teacher: parameters are sharded")
        elif self._classification is None:
            self._probe = make_probe(teacher, self.accelerator)

    def _hidden_states_refusal(self) -> str | None:
        """Why this run must read logits, or None."""
        if self._classification is not None:
            return "a classifier has few logits"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "sharded parameters"
        if self.args.torch_compile:
            return "torch_compile"
        if self.has_own_hard_loss():
            return "label smoothing, compute_loss_func and a model's own loss take logits"
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Teacher's signal, student's terms, normalised over the whole optimizer step."""
        if self.teacher is None:
            self._check_without_teacher(token_weights.KEY in inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._classification is not None:
            arguments = model, inputs, return_outputs, num_items_in_batch
            return self._classification.compute_loss(self, *arguments)
        if not self._weighing.was_asked(inputs):
            self._check_batch(inputs)
        self._hard_loss.look(model, inputs)
        side = alignment.student_side(inputs)
        teacher_side = alignment.teacher_side(inputs, side)
        if self._probe is not None:
            self._probe.keep(model, side, teacher_side)
        ask = partial(self.teacher.signal, model, teacher_side)
        weighed, signal = self._weighing.of(inputs, ask)
        self._mean_meters[model.training].add(weighed.logged)
        share = self._share(weighed.weights, num_items_in_batch)
        side, scored, counts = self._scoring.work(inputs, side, share, model.training)
        objective = self._present_objective(model.training)

        def terms_of(student: losses.Student) -> losses.Terms:
            terms = losses.step_terms(student, objective, signal, scored)
            if self._layers is None:
                return terms
            weight = scheduled.value_at(self.args, "hidden_weight", self.state.global_step)
            return self._layers.add(terms, seen, signal, scored, weight)

        outputs, own_outputs = None, return_outputs or self.has_own_hard_loss()
        at_head = not own_outputs and signal.logits is None
        at_head = at_head and self._reader.reads_hidden(model, side.inputs)
        with nullcontext() if self._layers is None else self._layers.watching(side) as seen:
            if own_outputs:
                asked = self._hard_loss.arguments(inputs["labels"], num_items_in_batch)
                outputs = model(**self._reader.forward_inputs(model, side.inputs), **asked)
                hard_loss = self._own_hard_loss(outputs, inputs["labels"], num_items_in_batch)
                terms = terms_of(losses.StudentLogits(outputs.logits[side.predicts], hard_loss))
            elif at_head:
                terms = self._reader.at_head(
                    model, side, lambda *x: terms_of(losses.StudentHidden(*x))
                )
            else:
                terms = terms_of(losses.StudentLogits(self._reader.logits(model, side)))
        self._note(terms, scored, counts, model.training)
        return (terms.loss, outputs) if return_outputs else terms.loss

    def _present_objective(self, training: bool) -> losses.Objective | losses.SampledObjective:
        """The loss of a token at this step."""
        if self._taid is None or not training:
            return self.objective
        return self._taid.present(self.objective)

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Called with every batch before it is used."""
        self._alignment.add(inputs)
        if self._layers is not None:
            self._layers.check(inputs)

    def _ask(self, inputs: dict[str, Any]) -> Signal:
        """The teacher's signal of a batch on its device, before the step's first loss."""
        self._check_batch(inputs)
        teacher_side = alignment.teacher_side(inputs, alignment.student_side(inputs))
        model = cast(nn.Module, self.model_wrapped)
        with torch.no_grad(), self.compute_loss_context_manager():
            return cast(Teacher, self.teacher).signal(model, teacher_side)

    def _share(self, weights: Tensor | None, num_items_in_batch: Tensor | int | None) -> Share:
        num_averaged = self._num_averaged(num_items_in_batch)
        return Share(weights, num_items_in_batch, num_averaged, self._num_ranks())

    def _note(
        self, terms: losses.Terms, scored: losses.Scored, counts: Tensor | None, training: bool
    ) -> None:
        """Stop at a loss that is not a number; count the metrics."""
        losses.assert_finite(terms)
        if self._taid is not None and training:
            self._taid.add(terms.soft, scored.weights)
        counted = scored.targets if counts is None else scored.targets[counts]
        self._meters[training].add(terms.counted(counts), counted)
        self._mean_meters[training].add(terms.extra)

    def behaviour_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T] log-probabilities of a batch's scored tokens under the student as it is now.

        See `losses.behaviour_log_probs`; the batch must be on the student's device.
        """
        return losses.behaviour_log_probs(self._reader, cast(nn.Module, self.model_wrapped), batch)

    @staticmethod
    def _check_without_teacher(given: bool) -> None:
        if given:
            raise ValueError(f"{token_weights.KEY} need a teacher; without one this is a Trainer")

    def _num_ranks(self) -> int:
        """Processes with rows of their own, whose gradients are averaged."""
        return self.accelerator.num_processes // self.get_tp_size()

    def _num_averaged(self, num_items_in_batch: Tensor | int | None) -> int:
        """Processes whose gradients will be averaged though the count is of all of them."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return 1
        return self._num_ranks()

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        """As in `Trainer`; if tokens have weights, the sum of theirs."""
        if self.teacher is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        if self._classification is not None:
            return self._classification.count(self, batch_samples, device)
        weights = self._weighing.ahead(batch_samples, self._prepare_inputs, self._ask)
        if all(each is None for each in weights):
            return super()._get_num_items_in_batch(batch_samples, device)
        if self.has_own_hard_loss():
            check_unweighted(weights)
        count = token_weights.total(batch_samples, weights).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = cast(Tensor, self.accelerator.gather(count)).sum()
        # processes that share rows have counted them several times
        return count / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _set_signature_columns_if_needed(self) -> None:
        """As in `Trainer`, with the columns that this class and its collators read."""
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        read = [] if self.teacher is None else [token_weights.KEY, *self._teacher_columns]
        if isinstance(self.data_collator, RoutedCollator):
            read += self.data_collator.columns
        columns.extend(name for name in read if name not in columns)

    def has_own_hard_loss(self) -> bool:
        """Whether another hard loss takes the place of the cross-entropy, see `HardLoss`."""
        return self._hard_loss.replaces

    def _own_hard_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """The hard loss that is not the cross-entropy, as the Trainer scales it, or None."""
        loss = self._hard_loss.of(outputs, labels, num_items_in_batch)
        return None if loss is None else loss * self._num_averaged(num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss; logits and labels only for who computes metrics from them."""
        if self.teacher is None or not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in `Trainer`, with the metrics of the scored tokens added."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self._read_metrics(training=False).items():
            cast(dict, output.metrics)[f"{metric_key_prefix}_{name}"] = value
        return output

    def _read_metrics(self, training: bool) -> dict[str, float]:
        if self.teacher is None:
            return {}
        self._alignment.read(self.accelerator)
        metrics = self._meters[training].read(self.accelerator, self.objective.unmeasured)
        metrics |= self._mean_meters[training].read(self.accelerator)
        metrics |= self._hinting.read(self.accelerator, training)
        return metrics if self._classification is None else self._classification.named(metrics)

    def _mean_names(self) -> tuple[str, ...]:
        """What is logged of `Terms.extra` in this run."""
        settings = self._scoring.settings
        reused = () if settings.importance_clip is None else losses.IMPORTANCE_NAMES
        anchor = (losses.ANCHOR_NAME,) if settings.anchor_weight > 0 else ()
        hidden = () if self._layers is None else self._layers.names
        rows = () if self._classification is None else self._classification.metric_names
        return (
            *self.objective.extra_names,
            *reused,
            *anchor,
            *hidden,
            *rows,
            *self._weighing.names,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; training logs also hold the metrics of the scored tokens."""
        if "loss" in logs:
            logs.update(self._read_metrics(training=True))
            logs.update(scheduled.logged(self.args, self.state.global_step))
            if self._taid is not None:
                logs.update(self._taid.metrics())
            if self.teacher is not None and self._probe is not None:
                logs.update(self._probe.read(cast(nn.Module, self.model)))
        elif "train_loss" in logs and self.teacher is not None:
            self._alignment.read(self.accelerator)  # the run ends; it may not have logged before
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; projections of hidden states are a part of the model meanwhile."""
        with nullcontext() if self._layers is None else self._layers.attached():
            return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with nullcontext() if self._layers is None else self._layers.detached():
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with nullcontext() if self._layers is None else self._layers.detached():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with nullcontext() if self._layers is None else self._layers.detached():
            super()._load_best_model()

    def _parts(self) -> list[HiddenAlignment | Taid]:
        """What has a file of its own in a checkpoint."""
        return [part for part in (self._layers, self._taid) if part is not None]

    def _save_extra(self, folder: str) -> None:
        """Write what resuming needs besides the Trainer's own files."""
        state = {} if self.teacher is None else self.teacher.state_dict()
        if state and self.args.should_save:
            save_file(state, os.path.join(folder, TEACHER_FILE))
        for part in self._parts():
            if self.args.should_save:
                part.save(folder)

    def _load_extra(self, folder: str) -> None:
        """Read what `_save_extra` wrote; the state is the checkpoint's."""
        for part in self._parts():
            part.load(folder)
        if self.teacher is None or not self.teacher.state_dict():
            return
        path = os.path.join(folder, TEACHER_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the teacher's state must be in the checkpoint: no {path}")
        self.teacher.load_state_dict(load_file(path))
