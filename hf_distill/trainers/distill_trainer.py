"""DistillTrainer: a Trainer whose loss compares the student with a teacher."""

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_distill import losses
from hf_distill.cache import CachedCollator, CachedTeacher
from hf_distill.data import alignment, sides, token_weights
from hf_distill.data.cross_tokenizer_collator import UniversalCollator
from hf_distill.data.token_classes import token_classes
from hf_distill.losses import hidden_states
from hf_distill.losses.hard_loss import HardLoss, check_unweighted
from hf_distill.losses.taid import Taid, TaidConfig
from hf_distill.models.forward import Reader
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm, vocab_size
from hf_distill.monitoring.metrics import MeanMeter, TokenMeter
from hf_distill.monitoring.watchdog import add_watchdog
from hf_distill.rollouts import end_token_ids
from hf_distill.teachers import RoutedCollator, Teacher, as_teacher
from hf_distill.trainers import classification, config_schedules
from hf_distill.trainers.causal_lm import Scoring, Share, for_trainer
from hf_distill.trainers.checks import check_setup, check_without_teacher
from hf_distill.trainers.distill_config import DistillConfig
from hf_distill.trainers.step_collation import StepCollatingTrainer
from hf_distill.trainers.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def _classes_of(model: Any, processing_class: Any) -> Tensor | None:
    """[V] the class of each token, where the processing class is a tokenizer."""
    size = vocab_size(causal_lm(model))
    if not isinstance(processing_class, PreTrainedTokenizerBase) or size is None:
        return None
    return token_classes(processing_class, size)


class _UpdateTeacher(TrainerCallback):
    """Tells the teacher that an optimizer step has been taken."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the Trainer."""
        self.teacher.update(model)


class DistillTrainer(StepCollatingTrainer):
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
        config_schedules.check_teacher(args, teacher is not None)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
        )
        self.teacher = None if teacher is None else as_teacher(teacher)
        if self.teacher is None:
            check_without_teacher(self)
            return
        self._scoring = Scoring(args.loss_settings())
        self._classification = classification.for_student(self)
        self._hard_loss = HardLoss(self)
        check_setup(self)
        self._vocabulary = Vocabulary(self)
        self._weighing = for_trainer(self)
        classification.take_over_counting(self)
        refusal = self._hidden_states_refusal()
        self._reader = Reader("student", refusal, self._vocabulary.size)
        is_text = self._classification is None  # a row's class is no token
        classes = _classes_of(self.model, self.processing_class) if is_text else None
        self._meters = {True: TokenMeter(classes), False: TokenMeter(classes)}
        eos_token_id = getattr(processing_class, "eos_token_id", None)
        end_ids = end_token_ids(causal_lm(cast(nn.Module, self.model)), eos_token_id)
        self._alignment = alignment.AlignmentMeter(end_ids)
        self.teacher.prepare(self.accelerator, cast(nn.Module, self.model), refusal)
        if isinstance(self.teacher, CachedTeacher):
            self.data_collator = CachedCollator(self.data_collator, self.teacher)
        self._layers = hidden_states.for_trainer(self)
        self._mean_meters = {x: MeanMeter(self._mean_names()) for x in (True, False)}
        self.add_callback(_UpdateTeacher(self.teacher))
        if args.taid is not None:
            self._taid = Taid(cast(TaidConfig, args.taid), self.accelerator)
            self.add_callback(self._taid)
        self._probe = add_watchdog(self, self.teacher)

    @property
    def objective(self) -> losses.AnyObjective:
        """The loss of a token now: of every micro-batch of the next optimizer step."""
        return self.args.objective(self.state.global_step)

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
        side = sides.student_side(inputs)
        teacher_side = sides.teacher_side(inputs, side)
        if self._probe is not None:
            self._probe.keep(model, side, teacher_side)
        ask = partial(self._signal, model, teacher_side, inputs)
        weighed, signal = self._weighing.of(inputs, ask)
        self._mean_meters[model.training].add(weighed.logged)
        share = self._share(weighed.weights, num_items_in_batch)
        side, scored, counts = self._scoring.work(inputs, side, share, model.training)
        objective = self._present_objective(model.training)

        def terms_of(student: losses.Student) -> losses.Terms:
            terms = losses.step_terms(student, objective, signal, scored)
            if self._layers is None:
                return terms
            weight = config_schedules.value_at(self.args, "hidden_weight", self.state.global_step)
            return self._layers.add(terms, seen, signal, scored, weight)

        outputs, own_outputs = None, return_outputs or self.has_own_hard_loss()
        at_head = not own_outputs and signal.logits is None
        at_head = at_head and self._reader.reads_hidden(model, side.inputs)
        layers = self._layers
        watching: Any = nullcontext() if layers is None else layers.watching(side)
        with watching as seen:
            if own_outputs:
                asked = self._hard_loss.arguments(inputs["labels"], num_items_in_batch)
                outputs = model(**self._reader.forward_inputs(model, side.inputs), **asked)
                outputs = self._vocabulary.outputs(outputs)
                hard_loss = self._hard_loss.of(outputs, inputs["labels"], num_items_in_batch)
                terms = terms_of(losses.StudentLogits(outputs.logits[side.predicts], hard_loss))
            elif at_head:
                terms = self._reader.at_head(
                    model, side, lambda *x: terms_of(losses.StudentHidden(*x))
                )
            else:
                terms = terms_of(losses.StudentLogits(self._reader.logits(model, side)))
        self._note(terms, scored, counts, model.training)
        return (terms.loss, outputs) if return_outputs else terms.loss

    def _present_objective(self, training: bool) -> losses.AnyObjective:
        """The loss of a token at this step."""
        if self._taid is None or not training:
            return self.objective
        return self._taid.present(self.objective)

    def _signal(self, model: nn.Module, teacher_side: sides.Side, inputs: dict[str, Any]) -> Signal:
        """The teacher's, about the entries of the vocabulary that are used."""
        signal = cast(Teacher, self.teacher).signal(model, teacher_side)
        return self._vocabulary.signal(signal, inputs)

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Called with every batch before it is used."""
        self._vocabulary.check(inputs)
        self._alignment.add(inputs)
        if self._layers is not None:
            self._layers.check(inputs)

    def _ask(self, inputs: dict[str, Any]) -> Signal:
        """The teacher's signal of a batch on its device, before the step's first loss."""
        self._check_batch(inputs)
        teacher_side = sides.teacher_side(inputs, sides.student_side(inputs))
        model = cast(nn.Module, self.model_wrapped)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._signal(model, teacher_side, inputs)

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
        self._vocabulary.check(batch)
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
        read = [] if self.teacher is None else [token_weights.KEY, *classification.columns(self)]
        if isinstance(self.data_collator, RoutedCollator | UniversalCollator):
            read += self.data_collator.columns
        columns.extend(name for name in read if name not in columns)

    def has_own_hard_loss(self) -> bool:
        """Whether another hard loss takes the place of the cross-entropy, see `HardLoss`."""
        return self._hard_loss.replaces

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
        hidden_states = () if self._layers is None else self._layers.names
        rows = () if self._classification is None else self._classification.metric_names
        return (
            *self.objective.extra_names,
            *reused,
            *anchor,
            *hidden_states,
            *rows,
            *self._weighing.names,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; training logs also hold the metrics of the scored tokens."""
        if "loss" in logs:
            logs.update(self._read_metrics(training=True))
            logs.update(config_schedules.logged(self.args, self.state.global_step))
            if self._taid is not None:
                logs.update(self._taid.metrics())
            if self.teacher is not None and self._probe is not None:
                logs.update(self._probe.read(cast(nn.Module, self.model)))
        elif "train_loss" in logs and self.teacher is not None:
            self._alignment.read(self.accelerator)  # the run ends; it may not have logged before
        super().log(logs, start_time)
