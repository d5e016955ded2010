"""Every training of a trainer begins as that of a new trainer would.

`model_init` makes another model for every `train()`, a search for hyperparameters changes the
settings between them, and a second `train()` of one model goes on from its weights. What belongs to
one training is therefore made anew for each: the teacher's average or frozen copy, schedules, t of
TAID, meters, the watchdog, rollouts. Projections of hidden layers are a part of the student and go
on with its weights, as the `Trainer`'s optimizer does.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend, default_compute_objective

from hf_distill.losses.hidden_states import HiddenAlignment
from hf_distill.models.prefetch_trace import RecordTraining
from hf_distill.models.structure import unwrap
from hf_distill.monitoring.self_teacher_check import SelfTeacherCheck
from hf_distill.run import Run
from hf_distill.teachers import Teacher, UpdateTeacher, has_adapters
from hf_distill.trainers.checkpoints import StatefulTrainer
from hf_distill.trainers.distill_config import OF_BUILT_IN

logger = logging.getLogger(__name__)

OF_OWN_LOSS = ("alpha", "token_weights", "hidden_layers", "hidden_weight", "hidden")

# an evaluation has the loss that TAID leads to, whatever its t
SCALES = (
    *(name for name in OF_BUILT_IN if name != "taid"),
    *OF_OWN_LOSS,
    "contrast_weight",
    "contrast",
)
"""The settings of which an evaluation's loss is another number for the same student."""

Callback = TypeVar("Callback", bound=TrainerCallback)


def continued(layers: HiddenAlignment, before: HiddenAlignment | None) -> HiddenAlignment:
    """Return layers with the projections of the training before, if the student is the same."""
    if before is None or before.student is not layers.student:
        return layers
    old, new = (
        {} if x.projections is None else x.projections.state_dict() for x in (before, layers)
    )
    if {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}:
        layers.projections = before.projections
    return layers


def check_is_trained(model: nn.Module) -> None:
    """Check that some parameter of the student is trained.

    Raises:
        ValueError: all are frozen.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    peft = ""
    if has_adapters(model):
        peft = ", of adapters with PeftModel.from_pretrained(..., is_trainable=True)"
    raise ValueError(
        "nothing of the student is trained: a parameter must have requires_grad, got "
        f"{sum(1 for _ in model.parameters())} without; set it{peft}"
    )


class RestartingTrainer(StatefulTrainer):
    """Sets itself up again for a training if the last set-up is not for it."""

    _run: Run
    _start_check: SelfTeacherCheck
    _is_new = True  # whether no training has used the set-up
    _is_resumed = False
    _loops = 0  # of the training that runs
    _metrics_of_trainer: frozenset[str] = frozenset()
    _callbacks_of_set_up: tuple[TrainerCallback, ...] = ()
    _compares_losses = False  # whether a search goes by `eval_loss`, and nothing was said of it

    def _set_up_again(self, keeps_teacher: bool) -> None:
        """Make what belongs to a training anew; `keeps_teacher`: but for the teacher's state."""
        self._set_up(self._make_run(cast(Teacher, self.teacher)), keeps_teacher)

    def _make_run(self, teacher: Teacher) -> Run:
        """Return what helpers are told of this trainer."""
        raise NotImplementedError

    def _set_up(self, run: Run, keeps_teacher: bool = False) -> None:
        """Make what a training needs."""
        raise NotImplementedError

    def _before_training(self) -> None:
        """Let a subclass act on the set-up; the student has its first weights, resumed or not."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer` does; a training that is not the first begins as a new trainer's does."""
        self._is_resumed, self._loops = bool(resume_from_checkpoint), 0
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._detach_layers()
            self._end_workers()

    def _end_workers(self) -> None:
        """Let the persistent workers of data loaders go now that nothing reads them.

        A trainer is part of reference cycles. Workers that are found by the collector of those are
        not told to end: PyTorch waits five seconds for each, wherever the collector runs.
        """
        kept = getattr(self, "_eval_dataloaders", {}).values()
        for loader in (self.callback_handler.train_dataloader, *kept):
            inside: Any = getattr(loader, "base_dataloader", loader)  # of Accelerate's
            if getattr(inside, "_iterator", None) is not None:
                inside._iterator = None  # the next loop over it makes another

    def _hp_search_setup(self, trial: Any) -> None:
        # train() calls it when the model is the one to train and the arguments are its arguments
        self._take_values(trial)
        if self.is_in_train:
            check_is_trained(cast(Any, self.model))
        if self.teacher is not None and self.is_in_train:
            self._begin()

    def _begin(self) -> None:
        self._detach_layers()  # of a training that has ended in an error
        if not self._is_ready():
            before = self._callbacks_of_set_up
            trained = not self._is_new and self.model is self._run.student
            self._set_up_again(keeps_teacher=self._is_resumed and trained)
            stale = [x for x in self._callbacks_of_set_up if x in before]
            for callback in stale:
                self.remove_callback(callback)
            self._callbacks_of_set_up = tuple(
                x for x in self._callbacks_of_set_up if x not in stale
            )
        self._is_new = False
        if self._is_resumed:
            self._start_check.skip()
        self._before_training()
        self._attach_layers()

    def _is_ready(self) -> bool:
        """Return whether the last set-up is for the training that begins."""
        run, model = self._run, cast(Any, self.model)
        same = unwrap(model) is unwrap(run.student)
        if same and run.sharded and not self._is_new:
            logger.warning(
                "the parameters are sharded: what this training has of its own (the teacher's "
                "state, meters, the watchdog) goes on from the one before; make a new trainer to "
                "begin anew"
            )
            return True
        return self._is_new and same and self.accelerator is run.accelerator and not self._moved

    @property
    def _moved(self) -> bool:
        """Return whether the student lies elsewhere than at the set-up."""
        return self._device != next(cast(Any, self.model).parameters()).device

    def _note_set_up(self, run: Run) -> None:
        """Note a set-up that was just made."""
        self._put_callback(UpdateTeacher(run.teacher))
        self._is_new = True
        self._device = next(run.student.parameters()).device
        self._start_check = SelfTeacherCheck(run.teachers, run.in_16_bit)
        if run.sharded:
            self._start_check.skip()
            self._put_callback(RecordTraining(run.accelerator))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._loops += 1
        if self._loops > 1 and self.teacher is not None:  # a smaller batch, after one did not fit
            self._begin()
        return super()._inner_training_loop(*args, **kwargs)

    def _put_callback(self, callback: Callback, first: bool = False) -> Callback:
        """Add a callback of the set-up, in the place of that of the set-up before.

        Args:
            callback: to add.
            first: before the callbacks that report, so that they see its metrics.
        """
        callbacks, kind = self.callback_handler.callbacks, type(callback)
        before = next((x for x in self._callbacks_of_set_up if type(x) is kind), None)
        if before is not None:  # unless the user has removed it
            callbacks[:] = [callback if x is before else x for x in callbacks]
        elif first:
            callbacks.insert(0, callback)
        else:
            self.add_callback(callback)
        kept = [x for x in self._callbacks_of_set_up if x is not before]
        self._callbacks_of_set_up = (*kept, callback)
        return callback

    def _take_values(self, trial: Any) -> None:
        """Give the settings the values of a trial.

        The `Trainer` makes a value the type of the setting's present one, which a schedule and a
        number do not share; those of this library's own settings are taken as in a config.
        """
        own: dict[str, Any] = {}
        if self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
        else:
            is_optuna = self.hp_search_backend == HPSearchBackend.OPTUNA
            space = cast(Any, self.hp_space) if is_optuna else dict
            values = dict(space(trial))
            plain = {field.name for field in dataclasses.fields(TrainingArguments)}
            names = {field.name for field in dataclasses.fields(self.args)} - plain
            own = {name: values.pop(name) for name in names & values.keys()}
            self.hp_space = lambda _: values
            try:
                super()._hp_search_setup(trial if is_optuna else values)
            finally:
                self.hp_space, self._trial = space, trial
        self._warn_of_scales(own)
        for name, value in own.items():
            setattr(self.args, name, value)
        cast(Any, self.args).check_values()

    def _warn_of_scales(self, values: Mapping[str, Any]) -> None:
        """Say once in a search that its trials' losses are numbers of different scales."""
        if self.teacher is None or not (self._compares_losses and self.is_world_process_zero()):
            return
        read = OF_OWN_LOSS if self._run.own_loss else SCALES
        found = [name for name in read if name in values]
        if not found:
            return
        self._compares_losses = False
        advice = 'give compute_objective=lambda metrics: metrics["eval_hard"], or one of your own'
        if not self._scores_data():  # completions that the student samples have no labels
            advice = "give a compute_objective of your own, such as an accuracy"
        logger.warning(
            "the search changes %s, of which eval_loss is another number for the same student, so "
            "the losses of its trials cannot be compared: %s",
            " and ".join(found), advice,
        )  # fmt: skip

    def _scores_data(self) -> bool:
        """Return whether an evaluation scores the data's labels, so that their loss tells much."""
        return True

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search as `Trainer` does.

        The default objective is that of `Trainer`: the sum of what `compute_metrics` gives, else
        the loss. What this class adds to an evaluation's metrics is not a part of it. A warning
        says so where the trials' losses are of different scales.
        """
        self._compares_losses = compute_objective is None and self.compute_metrics is None
        compute_objective = compute_objective or self._objective
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        known = {k: v for k, v in metrics.items() if k in self._metrics_of_trainer}
        return default_compute_objective(known)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer` does, and note which metrics it gives."""
        output = super().evaluation_loop(*args, **kwargs)
        self._metrics_of_trainer |= set(output.metrics or ())
        return output
