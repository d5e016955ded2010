"""DistillTrainer: a Trainer whose loss compares the student with a teacher."""

import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_distill import alignment, losses, token_weights
from hf_distill.heads import Reader, causal_lm, vocab_size
from hf_distill.monitors import MeanMeter, TokenMeter
from hf_distill.offline import CachedCollator, CachedTeacher
from hf_distill.probes import make_probe
from hf_distill.rollouts import end_token_ids
from hf_distill.teachers import RoutedCollator, Teacher, as_teacher
from hf_distill.token_classes import token_classes
from hf_distill.token_weights import TokenWeights
from hf_distill.trainers import checkpoints
from hf_distill.trainers.checks import check_setup
from hf_distill.trainers.configs import DistillConfig
from hf_distill.trainers.groups import ClassWeightsConfig, WatchdogConfig
from hf_distill.trainers.scoring import Scoring, Share, Work
from hf_distill.trainers.vocabulary import Vocabulary
from hf_distill.universal import UniversalCollator

logger = logging.getLogger(__name__)

TEACHER_FILE = "teacher.safetensors"


class _UpdateTeacher(TrainerCallback):
    """Tells the teacher that an optimizer step has been taken."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the Trainer."""
        self.teacher.update(model)


class DistillTrainer(checkpoints.ResumableTrainer):
    """A `Trainer` for causal LMs whose loss is alpha * soft + (1 - alpha) * hard.

    soft is the divergence of the args between teacher and student at every labelled token, hard the
    cross-entropy of the labels (with `label_smoothing_factor` or `compute_loss_func`, that one).
    Both are summed and divided by the number of labelled tokens of the whole optimizer step. Where
    the models allow it, [rows, positions, vocab] logits are never built.

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
        if teacher is None and args.alpha > 0:
            raise ValueError(f"alpha {args.alpha} > 0 needs a teacher; pass teacher= or alpha=0")
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
        )
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.objective = args.objective()
        class_weights = cast(ClassWeightsConfig, args.class_weights).active()
        if self.teacher is None:
            if class_weights is not None:
                raise ValueError("class_weights need a teacher; without one this is a Trainer")
            return
        self._weigh = TokenWeights(class_weights, self.processing_class)
        self._scoring = Scoring(self._weigh, args.loss_settings())
        check_setup(self)
        self._vocabulary = Vocabulary(self)
        # this class divides by num_items_in_batch itself, whatever the model's forward accepts
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True
        self.label_names = ["labels"]  # PEFT's forward hides them from the Trainer
        refusal = self._hidden_states_refusal()
        self._reader = Reader("student", refusal, self._vocabulary.size)
        classes = self._token_classes()
        self._meters = {True: TokenMeter(classes), False: TokenMeter(classes)}
        self._mean_meters = {x: MeanMeter(self._mean_names()) for x in (True, False)}
        eos_token_id = getattr(processing_class, "eos_token_id", None)
        end_ids = end_token_ids(causal_lm(cast(nn.Module, self.model)), eos_token_id)
        self._alignment = alignment.AlignmentMeter(end_ids)
        self.teacher.prepare(self.accelerator, cast(nn.Module, self.model), refusal)
        if isinstance(self.teacher, CachedTeacher):
            self.data_collator = CachedCollator(self.data_collator, self.teacher)
        self.add_callback(_UpdateTeacher(self.teacher))
        self._probe = None
        self._add_watchdog(self.teacher)

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
        # before the callbacks that report, so that they see its metrics
        watchdog = config.make()
        watchdog.vocab = self._vocabulary.size
        self.callback_handler.callbacks.insert(0, watchdog)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.info("the watchdog does not probe the teacher: parameters are sharded")
        else:
            self._probe = make_probe(teacher, self.accelerator)

    def _hidden_states_refusal(self) -> str | None:
        """Why this run must read logits, or None."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "sharded parameters"
        if self.args.torch_compile:
            return "torch_compile"
        if self.has_own_hard_loss():
            return "label smoothing and compute_loss_func take logits"
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
            self._check_without_teacher(inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_batch(inputs)
        side = alignment.student_side(inputs)
        teacher_side = alignment.teacher_side(inputs, side)
        if self._probe is not None:
            self._probe.keep(model, side, teacher_side)
        signal = self._vocabulary.signal(self.teacher.signal(model, teacher_side), inputs)
        side, scored, counts = self._work(inputs, side, num_items_in_batch, model.training)

        def terms_of(student: losses.Student) -> losses.Terms:
            return losses.step_terms(student, self.objective, signal, scored)

        outputs = None
        if return_outputs or self.has_own_hard_loss():
            outputs = model(**self._reader.forward_inputs(model, side.inputs))
            outputs = self._vocabulary.outputs(outputs)
            hard_loss = self._own_hard_loss(outputs, inputs["labels"], num_items_in_batch)
            terms = terms_of(losses.StudentLogits(outputs.logits[side.predicts], hard_loss))
        elif signal.logits is None and self._reader.reads_hidden(model, side.inputs):
            terms = self._reader.at_head(model, side, lambda *x: terms_of(losses.StudentHidden(*x)))
        else:
            terms = terms_of(losses.StudentLogits(self._reader.logits(model, side)))
        self._note(terms, scored.targets, counts, model.training)
        return (terms.loss, outputs) if return_outputs else terms.loss

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Called with every batch before it is used."""
        self._vocabulary.check(inputs)
        self._alignment.add(inputs)

    def _work(
        self,
        inputs: Mapping[str, Any],
        side: alignment.Side,
        num_items_in_batch: Tensor | int | None,
        training: bool,
    ) -> Work:
        num_averaged = self._num_averaged(num_items_in_batch)
        share = Share(num_items_in_batch, num_averaged, self._num_ranks())
        return self._scoring.work(inputs, side, share, training)

    def _note(
        self, terms: losses.Terms, targets: Tensor, counts: Tensor | None, training: bool
    ) -> None:
        """Stop at a loss that is not a number; count the metrics."""
        losses.assert_finite(terms)
        counted = targets if counts is None else targets[counts]
        self._meters[training].add(terms.counted(counts), counted)
        self._mean_meters[training].add(terms.extra)

    def behaviour_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T] log-probabilities of a batch's scored tokens under the student as it is now.

        See `losses.behaviour_log_probs`; the batch must be on the student's device.
        """
        self._vocabulary.check(batch)
        return losses.behaviour_log_probs(self._reader, cast(nn.Module, self.model_wrapped), batch)

    @staticmethod
    def _check_without_teacher(inputs: Mapping[str, Any]) -> None:
        if token_weights.KEY in inputs:
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
        weights = [self._weigh(batch) for batch in batch_samples]
        if all(each is None for each in weights):
            return super()._get_num_items_in_batch(batch_samples, device)
        if self.has_own_hard_loss():
            raise ValueError(
                "weights of tokens reach neither label smoothing nor compute_loss_func, got both"
            )
        count = token_weights.total(batch_samples, weights).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = cast(Tensor, self.accelerator.gather(count)).sum()
        # processes that share rows have counted them several times
        return count / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _set_signature_columns_if_needed(self) -> None:
        """As in `Trainer`, with the columns that this class and its collators read."""
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        read = [token_weights.KEY] if self.teacher is not None else []
        if isinstance(self.data_collator, RoutedCollator | UniversalCollator):
            read += self.data_collator.columns
        columns.extend(name for name in read if name not in columns)

    def has_own_hard_loss(self) -> bool:
        """Whether label smoothing or `compute_loss_func` takes the place of the cross-entropy."""
        return self.label_smoother is not None or self.compute_loss_func is not None

    def _own_hard_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """The hard loss of `compute_loss_func` or label smoothing, as the Trainer scales it."""
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif self.label_smoother is not None:
            kwargs = {"shift_labels": True, "num_items_in_batch": num_items_in_batch}
            loss = self.label_smoother(outputs, labels, **kwargs)
        else:
            return None
        return loss * self._num_averaged(num_items_in_batch)

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
        return metrics | self._mean_meters[training].read(self.accelerator)

    def _mean_names(self) -> tuple[str, ...]:
        """What is logged of `Terms.extra` in this run."""
        settings = self._scoring.settings
        reused = () if settings.importance_clip is None else losses.IMPORTANCE_NAMES
        anchor = (losses.ANCHOR_NAME,) if settings.anchor_weight > 0 else ()
        return (*self.objective.extra_names, *reused, *anchor)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; training logs also hold the metrics of the scored tokens."""
        if "loss" in logs:
            logs.update(self._read_metrics(training=True))
            if self.teacher is not None and self._probe is not None:
                logs.update(self._probe.read(cast(nn.Module, self.model)))
        elif "train_loss" in logs and self.teacher is not None:
            self._alignment.read(self.accelerator)  # the run ends; it may not have logged before
        super().log(logs, start_time)

    def _save_extra(self, folder: str) -> None:
        """Write what resuming needs besides the Trainer's own files."""
        state = {} if self.teacher is None else self.teacher.state_dict()
        if state and self.args.should_save:
            save_file(state, os.path.join(folder, TEACHER_FILE))

    def _load_extra(self, folder: str) -> None:
        """Read what `_save_extra` wrote; the state is the checkpoint's."""
        if self.teacher is None or not self.teacher.state_dict():
            return
        path = os.path.join(folder, TEACHER_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the teacher's state must be in the checkpoint: no {path}")
        self.teacher.load_state_dict(load_file(path))
