"""DistillTrainer: a Trainer whose loss compares the student with a teacher."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_distill import losses
from hf_distill.data.alignment import AlignmentMeter
from hf_distill.data.sides import TEACHER_OWN_TOKENS
from hf_distill.data.token_classes import token_classes
from hf_distill.losses import HiddenConfig, Loss, TaidConfig, Terms, Tokens
from hf_distill.losses.hard_loss import HardLoss
from hf_distill.losses.hidden_states import HiddenAlignment
from hf_distill.losses.router_loss import add_router_loss
from hf_distill.losses.taid import TaidCallback
from hf_distill.models.forward import Reader
from hf_distill.models.pieces import will_lie_in_pieces
from hf_distill.models.shared_images import SharedImages
from hf_distill.models.signals import Signal
from hf_distill.models.structure import Kind, vocab_size
from hf_distill.monitoring.metrics import TokenMeter
from hf_distill.monitoring.watchdog import make_watchdog
from hf_distill.rollouts import end_token_ids
from hf_distill.run import Run
from hf_distill.teachers import Teacher, as_teacher
from hf_distill.trainers import config_schedules
from hf_distill.trainers.accounting import AccountingTrainer
from hf_distill.trainers.causal_lm import CausalLM
from hf_distill.trainers.checks import (
    check_config,
    check_setup,
    check_without_teacher,
    hidden_states_refusal,
    losses_of_run,
    own_loss,
    shard_loss,
)
from hf_distill.trainers.classification import check_classifier, make_classification
from hf_distill.trainers.distill_config import DistillConfig, loss_settings_of
from hf_distill.trainers.placed_labels import PlacedLabels, check_placed
from hf_distill.trainers.restarts import continued
from hf_distill.trainers.step_collation import given_collator
from hf_distill.trainers.tasks import LABELS, Batch, Task, make_hard_loss
from hf_distill.trainers.unread_settings import (
    unread_settings,
    unread_without_teacher,
    warn_of_unread,
)
from hf_distill.trainers.views import Views
from hf_distill.trainers.vocabulary import Vocabulary


class DistillTrainer(AccountingTrainer):
    """Trains causal LMs and classifiers: loss = alpha * soft + (1 - alpha) * hard.

    soft is the divergence of the args between teacher and student at every labelled token, hard the
    cross-entropy of the labels (with `label_smoothing_factor` or `compute_loss_func`, that one; of
    a student whose own loss is another, its own). Both are summed and divided by the number of
    labelled tokens of the whole optimizer step. Where the models allow it, [rows, positions, vocab]
    logits are never built. See `classification.Classification` for sequence classifiers.

    Args:
        model: the student; every argument but `teacher` is that of `Trainer`.
        args: a `DistillConfig`.
        data_collator: as in `Trainer`.
        train_dataset: as in `Trainer`.
        eval_dataset: as in `Trainer`.
        processing_class: as in `Trainer`.
        teacher: a model, a name for `from_pretrained`, or a teacher of `hf_distill.teachers`. May
            be None if alpha is 0: the student learns from labels alone.
        loss: your own soft loss in place of the divergence of the args: a function of
            (student_logits [n, V], teacher_logits [n, V], targets [n]) that returns [n], or a
            `hf_distill.losses.Loss`, of which the trainer takes a copy.
        forgetting_dataset: rows of another kind, whose cross-entropy each evaluation measures too.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: the teacher is missing, or its vocabulary is not the student's, or the set-up is
            one that the loss cannot be right in; the message says which.
        TypeError: args is not a `DistillConfig`, or is one of another trainer, or loss is neither a
            function nor a `Loss`.
    """

    args: DistillConfig
    task: Task
    current_gradient_accumulation_steps: int = 1  # the Trainer's: micro-batches of this step
    _moves: bool = False  # whether a schedule does
    _has_shown_hints: bool = True  # nothing is looked for
    _has_rollouts: bool = False  # whether it reads an OPSDConfig

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
        loss: Loss | losses.LossFunction | None = None,
        forgetting_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = DistillConfig(output_dir="tmp_trainer") if args is None else args
        check_config(args, type(self).__name__, self._has_rollouts)
        config_schedules.check_teacher_is_given(args, teacher is not None)
        self._own_loss = None if loss is None else own_loss(loss, args)
        self._present: tuple[Any, Loss] | None = None  # what it is made of, and the loss
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs
        )
        self._accepts_count = self.model_accepts_loss_kwargs  # the Trainer has looked
        if args.shard_loss:
            shard_loss(self.accelerator, teacher is not None)
        self.teacher = None if teacher is None else as_teacher(teacher)
        if self.teacher is None:
            check_without_teacher(args, self.data_collator, loss)
            warn_of_unread(unread_without_teacher(args))
            self._count_without_teacher()
        else:
            self._set_up(self._make_run(self.teacher))
        self._watch_forgetting(forgetting_dataset)

    def _make_run(self, teacher: Teacher) -> Run:
        """Return what helpers are told of this trainer."""
        student = cast(nn.Module, self.model)
        return Run(
            self.args,
            student,
            teacher,
            self.processing_class,
            given_collator(self.data_collator),
            self.accelerator,
            will_lie_in_pieces(self.accelerator, student),
            losses_of_run(self.args, self._own_loss),
            own_loss=self._own_loss is not None,
            num_copies=self._num_copies,
            num_parts=self._num_parts,
        )

    def _set_up(self, run: Run, keeps_teacher: bool = False) -> None:
        """Make what a step needs: the task, the teacher, what is measured."""
        if run.kind == Kind.ROWS:
            check_classifier(run)
        elif run.kind != Kind.CAUSAL:
            check_placed(run)
        users = lambda: (self.compute_loss_func, self.label_smoother)
        hard_loss = make_hard_loss(run, users, self._accepts_count)
        warn_of_unread(unread_settings(run))
        check_setup(run)
        self._vocabulary = Vocabulary(run)
        refusal = hidden_states_refusal(run, hard_loss.replaces)
        self._reader = Reader("student", refusal, self._vocabulary.size)
        self.task = self._make_task(run, hard_loss)
        # the loss is divided by a count, whatever the model accepts
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = self.task.shifts_labels
        # PEFT's forward hides their name from the Trainer
        self.label_names = self.args.label_names or [self.task.label_name]
        self._run = run
        if not keeps_teacher:
            run.teacher.prepare(self.accelerator, run.student, refusal)
        self._wrap_collator(self._collator_for(run.teacher))
        self._layers, self._views = self._make_layers(run), Views(run)
        whole = not (run.sharded or self.args.torch_compile)
        self._images = SharedImages(run.language_model) if whole else None
        self._make_monitors(run)
        self._note_set_up(run)

    def _make_task(self, run: Run, hard_loss: HardLoss) -> Task:
        if run.kind == Kind.ROWS:
            return make_classification(run, self._reader, hard_loss, lambda: self.loss)
        size, settings = self._vocabulary.size, self.args.loss_settings()
        task = CausalLM if run.kind == Kind.CAUSAL else PlacedLabels
        return task(run, settings, self._reader, hard_loss, size, self._num_ranks())

    def _collator_for(self, teacher: Teacher) -> Callable[[Any], Any]:
        return teacher.collator  # wraps the run's data collator in what the teacher needs

    def _make_layers(self, run: Run) -> HiddenAlignment | None:
        """Make what compares hidden layers, or return None."""
        args, settings = self.args, cast(HiddenConfig, self.args.hidden)
        weighs = config_schedules.bounds(args, "hidden_weight")[1] > 0
        if args.hidden_layers is None or not (weighs or settings.attention_weight):
            return None
        self._vocabulary.check_one_tokenizer("hidden_layers")
        layers = args.hidden_layers
        made = HiddenAlignment(run.student, run.teacher, layers, settings, args.seed)
        self._reader.watch = made.watch
        return continued(made, self._layers)

    def _make_monitors(self, run: Run) -> None:
        """Make meters, and callbacks that follow the training."""
        size = None if run.kind.has_classes else vocab_size(run.language_model)
        known, classes = run.tokenizer, None
        if known is not None and size is not None:
            classes = token_classes(known, size)
        self._meters = {training: TokenMeter(classes, run.num_copies) for training in (True, False)}
        eos_token_id = getattr(known or self.processing_class, "eos_token_id", None)
        self._alignment = AlignmentMeter(end_token_ids(run.language_model, eos_token_id))
        self._looked = False
        taid = cast("TaidConfig | None", self.args.taid) if self._own_loss is None else None
        self._taid = self._put_callback(TaidCallback(taid, self.accelerator)) if taid else None
        watchdog, self._probe = make_watchdog(run, self._vocabulary.size)
        if watchdog is not None:
            self._put_callback(watchdog, first=True)

    @property
    def loss(self) -> Loss:
        """Return the loss of a token now: of every micro-batch of the next optimizer step.

        In an evaluation it is that of the schedules' last values, the same whenever it is asked.
        """
        # a search for hyperparameters changes settings between its runs
        at = (self._step() if self._moves else 0), self._evaluation.active
        made_of = loss_settings_of(self.args), *at
        if self._present is None or self._present[0] != made_of:
            self._moves = bool(config_schedules.moving_schedules(self.args))
            self._present = made_of, self._loss_at(self._step())
        return self._present[1]

    def _step(self) -> int:
        """Return the optimizer step whose values schedules have now."""
        return config_schedules.LAST_STEP if self._evaluation.active else self.state.global_step

    def _loss_at(self, step: int) -> Loss:
        evaluates = self._evaluation.active and self._scores_data()
        measures_hard = self.args.measures_hard or evaluates
        if self._own_loss is None:
            made = self.args.loss_at(step)
            same = made.measures_hard == measures_hard
            return made if same else made.with_share(made.alpha, measures_hard)
        alpha = config_schedules.value_at(self.args, "alpha", step)
        self._own_loss.set_share(alpha, measures_hard)
        return self._own_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of student against teacher, normalised over the whole optimizer step."""
        if self.teacher is None:
            return self._without_teacher(model, inputs, return_outputs, num_items_in_batch)
        batch = self._read(model, inputs, num_items_in_batch, return_outputs)
        teacher = self.task.signal(batch, lambda: self._signal(model, batch))
        tokens = self.task.tokens(batch, model.training)
        terms_of = lambda student: self._terms(student, teacher, tokens)
        at_head = teacher.logits is None
        terms, outputs = self.task.run(model, batch, terms_of, at_head, return_outputs)
        terms = self._with_router_loss(terms, teacher, tokens, model.training)
        if not terms.loss.isfinite():
            raise losses.not_finite(terms, teacher)
        self._note(terms, batch, tokens, model.training)
        return (terms.loss, outputs) if return_outputs else terms.loss

    def token_loss(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the loss of a micro-batch's scored tokens. Override it for a loss of your own.

        Args:
            student: what the student says of the N tokens, with a gradient: hidden states [N, H]
                and the head, or logits [N, V].
            teacher: what the teacher says of them.
            tokens: their targets and weights [N]. A sum over tokens with these weights is this
                batch's part of the loss of the optimizer step.

        Returns:
            The loss [], and metrics [N] by name; what is not measured is left out.
        """
        if self._taid is None or not cast(nn.Module, self.model).training:
            return self.loss(student, teacher, tokens)
        return self._taid.present(self.loss)(student, teacher, tokens)

    def _terms(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the loss of the tokens and what surrounds it."""
        if self._run.sharded:
            teacher = teacher.beside(student)
        contrast, base_kl = self._views.weights(self._step()), self._views.base_kl_weight
        terms = losses.step_terms(self.token_loss, student, teacher, tokens, contrast, base_kl)
        if self._layers is None:
            return terms
        weight = config_schedules.value_at(self.args, "hidden_weight", self._step())
        return self._layers.add(terms, student, teacher, tokens, weight)

    def _with_router_loss(
        self, terms: Terms, teacher: Signal, tokens: Tokens, training: bool
    ) -> Terms:
        """Add what the routers of a mixture of experts have said of the batch, if there are any."""
        said = self._reader.routers
        if said.aux is None and said.experts is None:
            return terms
        num_batches = self.current_gradient_accumulation_steps if training else None
        return add_router_loss(terms, said, teacher, tokens, num_batches)

    def _read(self, model: nn.Module, inputs: Any, num_items: Any, with_outputs: bool) -> Batch:
        """Return the batch, checked; the first ones are looked at closely."""
        if self.task.label_name != LABELS:
            inputs = self._with_labels(inputs)
        if not self.task.was_asked(inputs):
            self._check_batch(inputs)
        if self._evaluation.active:
            num_items = None  # a batch of an evaluation has its own
        alone = num_items is None or self.accelerator.num_processes == 1
        batch = self.task.read(inputs, num_items, 1 if alone else self._num_averaged(num_items))
        batch.num_rows = self._evaluation.num_rows
        batch.wants_outputs = with_outputs or bool(self.compute_loss_func or self.label_smoother)
        if self._run.sharded and (
            batch.wants_outputs or self._reader.takes_less_by_logits(model, batch.student)
        ):  # a head in pieces is whole in its own call only
            batch.read_as_logits()
        if not self._looked:
            self._start_check.look(model, batch.student)
            done, probe = self.task.look(model, batch), self._probe
            kept = probe is None or probe.keep(model, batch.student, batch.teacher)
            self._looked = done and kept and self._start_check.is_done
        return batch

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Check a batch; it is called with every batch before it is used."""
        if not self.task.shifts_labels:
            return
        if not self._has_plain_vocabulary(inputs):
            self._vocabulary.check(inputs)
        if inputs.get("teacher_input_ids") is not None:
            self._alignment.add(inputs)
        if self._layers is not None:
            self._layers.check(inputs)
        if not self._has_shown_hints:
            self._look_for_hints(inputs)

    def _look_for_hints(self, inputs: dict[str, Any]) -> None:
        """Let a subclass look at batches until one has shown hints."""

    def _signal(self, model: nn.Module, batch: Batch) -> Signal:
        """Return the teacher's signal, about the entries of the vocabulary that are used."""
        with self.accelerator.autocast():  # the student's forward has its own
            vocab = self._vocabulary.size
            signal = self._views.signal(model, batch, not self._evaluation.active, vocab)
        plain = self._has_plain_vocabulary(batch.inputs)
        return signal if plain else self._vocabulary.signal(signal, batch.inputs)

    def _has_plain_vocabulary(self, inputs: Mapping[str, Any]) -> bool:
        return self._vocabulary.is_plain and TEACHER_OWN_TOKENS not in inputs

    def _ask(self, inputs: dict[str, Any]) -> Signal:
        """Return the teacher's signal of a batch on its device, before the step's first loss."""
        self._check_batch(inputs)
        batch = self.task.read(inputs, None, 1)
        if self._run.sharded:
            batch.read_as_logits()
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._signal(cast(nn.Module, self.model_wrapped), batch)

    def _note(self, terms: Terms, batch: Batch, tokens: Tokens, training: bool) -> None:
        """Count the metrics."""
        if self._evaluation.active:
            self._evaluation.parts = partial(self.task.parts, batch)
        self._unscored[training].add(batch.unscored)
        if self._taid is not None and training:
            self._taid.add(terms.metrics["soft"], tokens.weights)
        meter = self._meters[training]
        meter.add(terms.metrics, tokens.targets, tokens.counted)
        logged = batch.logged or {}
        if logged and batch.num_rows is not None:
            logged = {name: value[batch.counted_tokens] for name, value in logged.items()}
        meter.add({**terms.others, **logged})

    def _read_metrics(self, training: bool) -> dict[str, float]:
        if self.teacher is None:
            return {}
        self._alignment.read(self.accelerator)
        metrics = self._meters[training].read(self.accelerator)
        metrics |= self._hinting.read(self.accelerator, training)
        metrics |= self._unscored[training].read(self.accelerator)
        return self.task.named(metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Do as `Trainer` does; training logs also hold the metrics of the scored tokens."""
        if "loss" in logs:
            logs.update(self._read_metrics(training=True))
            step, own_loss = self.state.global_step, self._own_loss is not None
            logs.update(config_schedules.logged_values(self.args, step, own_loss))
            if self._taid is not None:
                logs.update(self._taid.metrics())
            if self.teacher is not None and self._probe is not None:
                logs.update(self._probe.read(cast(nn.Module, self.model)))
        elif "train_loss" in logs and self.teacher is not None:
            # the run ends; it may not have logged before
            self._alignment.read(self.accelerator)
            self._unscored[True].read(self.accelerator)
        super().log(logs, start_time)
