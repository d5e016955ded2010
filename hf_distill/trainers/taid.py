"""The t of TAID: from step to step, in checkpoints and in the log."""

import json
import math
import os
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from hf_distill.losses import AnyObjective, TaidObjective
from hf_distill.trainers.groups import TaidConfig

TAID_FILE = "taid.json"
EPSILON = 1e-15  # that of the authors' release


class TaidState(NamedTuple):
    """What the next step starts from: t, the average change, the last step's loss (None: none)."""

    t: float
    momentum: float = 0.0
    loss: float | None = None


def next_state(config: TaidConfig, state: TaidState, loss: float, progress: float) -> TaidState:
    """The state after an optimizer step.

        change   = (last loss - loss) / (last loss + 1e-15)
        momentum = config.momentum * momentum + (1 - config.momentum) * change
        linear   = t_start + (t_end - t_start) * progress
        t        = min(t_end, max(linear, t + step_size * sigmoid(momentum) * (1 - t)))

    After the first step there is no change yet, and t stays. Behind a loss of 0 (t_start = 0 gives
    one) the change is 0: it has no relative size. Not adaptive, t is `linear`.

    Args:
        config: the constants.
        state: before the step.
        loss: of the step, in nats; read if adaptive only.
        progress: the share of the optimizer steps that is done, in [0, 1].

    Source:
        Shing et al. 2025, arXiv:2501.16937, as in the authors' release but for three things. The
        release does so at every forward pass, here it is once an optimizer step. Its progress is
        that before the step, one step less. Its loss is the cross-entropy with the target, which
        has the size of an entropy at any t; the KL grows with about t².
    """
    linear = config.t_start + (config.t_end - config.t_start) * progress
    if not config.adaptive:
        return TaidState(min(config.t_end, linear))
    if state.loss is None:
        return state._replace(loss=loss)
    change = (state.loss - loss) / (state.loss + EPSILON) if state.loss > 0 else 0.0
    momentum = config.momentum * state.momentum + (1 - config.momentum) * change
    gate = 0.5 * (1 + math.tanh(0.5 * momentum))  # the sigmoid; its exp could overflow
    pushed = state.t + config.step_size * gate * (1 - state.t)
    return TaidState(min(config.t_end, max(linear, pushed)), momentum, loss)


class Taid(TrainerCallback):
    """Follows a run: sums the soft loss of each optimizer step and moves t behind it.

    Args:
        config: the constants.
        accelerator: of the run; the loss of a step is that of all processes.
    """

    def __init__(self, config: TaidConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.state = TaidState(config.t_start)
        self._accelerator = accelerator
        self._sum: Tensor | None = None
        self._used = config.t_start

    def present(self, objective: AnyObjective) -> TaidObjective:
        """The objective with the t of this step."""
        assert isinstance(objective, TaidObjective)
        return replace(objective, t=self.state.t)

    def add(self, soft: Tensor, weights: Tensor) -> None:
        """Count a micro-batch: soft [N] in nats, and the weights [N] of its tokens in the loss."""
        if not self.config.adaptive:
            return
        part = (soft * weights).sum(dtype=torch.float32)
        self._sum = part if self._sum is None else self._sum + part

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer; a run that is not resumed starts at t_start."""
        self._sum = None
        if state.global_step == 0:
            self.state = TaidState(self.config.t_start)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer behind each optimizer step."""
        progress = min(1.0, state.global_step / state.max_steps)
        self._used = self.state.t
        self.state = next_state(self.config, self.state, self._loss(), progress)

    def _loss(self) -> float:
        """The mean soft loss of the step; where it is not read, nothing waits for the device."""
        if not self.config.adaptive:
            return math.nan
        own = torch.zeros((), device=self._accelerator.device) if self._sum is None else self._sum
        self._sum = None
        total: Any = self._accelerator.reduce(own, reduction="mean")
        return float(total)

    def metrics(self) -> dict[str, float]:
        """The t of the last step."""
        return {"taid_t": self._used}

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint."""
        with open(os.path.join(folder, TAID_FILE), "w", encoding="utf-8") as file:
            json.dump(self.state._asdict(), file)

    def load(self, folder: str) -> None:
        """Read it.

        Raises:
            FileNotFoundError: the checkpoint is of a run without TAID.
        """
        path = os.path.join(folder, TAID_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the t of taid must be in the checkpoint: no {path}")
        with open(path, encoding="utf-8") as file:
            self.state = TaidState(**json.load(file))
