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


def _coordinator(engine: Any) -> Any:
    """Return what holds the record in an engine of ZeRO-3, or None."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    found = None if offload is None else offload.get_param_coordinator()
    return found if hasattr(found, "is_record_trace") else None


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
        coordinator = _coordinator(engine)
        if coordinator is None:
            return
        self._is_trained = False

        def before_forward(*_: Any) -> None:
            if coordinator.is_record_trace() and not self._is_trained:
                coordinator._invalidate_trace()
            self._is_trained = torch.is_grad_enabled()

        # before DeepSpeed's own, which ends the record of the forward before
        self._hook = engine.module.register_forward_pre_hook(before_forward, prepend=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follow them no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
