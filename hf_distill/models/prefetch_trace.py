"""Keeps DeepSpeed's record of the order of modules that of a training step.

ZeRO-3 records in which order a forward and its backward use the modules, and plans by it which
parameters it gathers ahead and which stay whole between forward and backward. It takes the first
forward of the model for such a record. A forward without a backward before the first step (a probe,
an evaluation, a rollout) would give it an order that ends with the forward; when the first backward
shows otherwise the order is recorded anew, but what was planned by the old one (DeepSpeed 0.19
keeps which parameters to release after each module) stays, and every parameter is gathered twice a
step from then on.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hf_distill.models.pieces import zero3_coordinator


class RecordTraining(TrainerCallback):
    """Drops the record of a forward that had no gradient, before ZeRO-3 plans by it.

    Args:
        accelerator: of the run, whose engine is asked for when a training begins.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._hook: RemovableHandle | None = None
        self._is_trained = False  # by the forward that is being recorded

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follow the forwards of the student's engine."""
        self.on_train_end(args, state, control)
        wrapped = getattr(self._accelerator, "deepspeed_engine_wrapped", None)
        engine: Any = getattr(wrapped, "engine", None)
        coordinator = zero3_coordinator(engine)
        if not hasattr(coordinator, "is_record_trace"):
            return
        self._is_trained = False

        def before_forward(*_: Any) -> None:
            if coordinator.is_record_trace() and not self._is_trained:
                coordinator._invalidate_trace()
            self._is_trained = torch.is_grad_enabled()
            if not self._is_trained:
                # by the record of a step the forward before may have left parameters whole for a
                # backward that did not follow, and they may be other ones by now
                coordinator.release_and_reset_all(engine.module)

        # before DeepSpeed's own, which ends the record of the forward before
        self._hook = engine.module.register_forward_pre_hook(before_forward, prepend=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follow them no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
