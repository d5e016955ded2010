"""TAID, Temporally Adaptive Interpolated Distillation: the target moves to the teacher."""

import json
import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from hf_distill.losses.base import Loss, Terms, Tokens
from hf_distill.losses.chunks import at_least_float32
from hf_distill.losses.divergence import DivergenceLoss
from hf_distill.models.signals import Signal
from metal_ops import weighted_divergence


@dataclass
class TaidConfig:
    """Says how the target of TAID moves from the student (t = 0) to the teacher (t = 1).

    The defaults are those of the paper, where step_size is alpha and momentum is beta.

    Raises:
        ValueError: a value is out of range, or one that is not read was changed.
    """

    t_start: float = field(
        default=0.4, metadata={"help": "The value of t at the first step, in [0, t_end]."}
    )
    t_end: float = field(default=1.0, metadata={"help": "The largest value of t, in (0, 1]."})
    step_size: float = field(
        default=5e-4,
        metadata={
            "help": "The most by which one step may move t ahead of its linear progress, as a "
            "share of 1 - t, in [0, 1]."
        },
    )
    momentum: float = field(
        default=0.99,
        metadata={
            "help": "The decay of the moving average of the loss's relative change, in [0, 1)."
        },
    )
    adaptive: bool = field(
        default=True,
        metadata={
            "help": "Whether t also follows the loss. With False, t is linear in the progress of "
            "training."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if not 0.0 < self.t_end <= 1.0:
            raise ValueError(f"taid.t_end must be in (0, 1], got {self.t_end}")
        if not 0.0 <= self.t_start <= self.t_end:
            raise ValueError(
                f"taid.t_start must be in [0, t_end = {self.t_end}], got {self.t_start}"
            )
        if not 0.0 <= self.step_size <= 1.0:
            raise ValueError(f"taid.step_size must be in [0, 1], got {self.step_size}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"taid.momentum must be in [0, 1), got {self.momentum}")
        for name in ("step_size", "momentum"):
            value = getattr(self, name)
            if not self.adaptive and value != getattr(TaidConfig, name):
                raise ValueError(f"taid.{name} is read if taid.adaptive only, got {value}")


TEACHER_KL = "taid_teacher_kl"


@torch.no_grad()
def taid_target(logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """Return (1 - t) * student + t * teacher, the logits of TAID's target, without gradient.

    Args:
        logits: [..., V], the student's.
        teacher_logits: [..., V], in any dtype.
        t: in [0, 1].

    Returns:
        [..., V] in float32 (float64 if one side is), and at the end points that side as it is. An
        entry that is -inf on one side is so in the target, but at the other side's end point.
    """
    if t == 0.0:
        return logits.detach()
    if t == 1.0:
        return teacher_logits
    return (1 - t) * at_least_float32(logits) + t * at_least_float32(teacher_logits)


@dataclass(frozen=True)
class TaidLoss(DivergenceLoss):
    """Computes the soft loss KL(p_t || q) to a target between student and teacher.

    p_t = softmax(((1 - t) * student + t * teacher) / temperature) of the logits, the student's held
    constant, and q is the student. At t = 0 loss and gradient are zero, at t = 1 this is forward_kl
    to the teacher. The metrics are the teacher's, not the target's; "taid_teacher_kl" is what the
    soft loss would be at t = 1.

    Args:
        spec: of kind "forward_kl".
        alpha: share of the divergence, in [0, 1].
        t: in [0, 1].

    Raises:
        ValueError: the kind is another one, or t is out of range.

    Source:
        Shing et al. 2025, arXiv:2501.16937: its J is this KL. The authors' release reports the
        cross-entropy with p_t, which has the same gradient.
    """

    needs_dense: ClassVar[bool] = True

    t: float = 1.0

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.spec.kind != "forward_kl":
            raise ValueError(f"taid needs divergence 'forward_kl', got {self.spec.kind!r}")
        if not 0.0 <= self.t <= 1.0:
            raise ValueError(f"the t of taid must be in [0, 1], got {self.t}")

    def check_signal(self, teacher: Signal, num_tokens: int) -> None:
        """Check what the teacher says.

        Raises:
            ValueError: it is sparse.
        """
        if teacher.sparse is not None:
            raise ValueError(
                "taid mixes the logits of student and teacher, so it needs the teacher's logits or "
                f"hidden states; got {teacher.sparse.ids.shape[-1]} entries of the vocabulary"
            )

    def __call__(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms of N tokens, see `Loss`; logits exist a chunk of tokens at a time."""
        self.check_signal(teacher, len(tokens.targets))
        if self.t == 1.0:
            terms = super().__call__(student, teacher, tokens)
            return terms._replace(metrics={**terms.metrics, TEACHER_KL: terms.metrics["soft"]})
        return Loss.__call__(self, student, teacher, tokens)

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the divergence of n tokens from their targets."""
        with torch.no_grad():
            known = teacher.dense()
        if self.t == 1.0:
            return super().soft(logits, Signal(logits=known), tokens)
        target = Signal(logits=taid_target(logits, known, self.t))
        terms = super().soft(logits, target, tokens)
        weights = tokens.soft_weights
        at_end = weighted_divergence(logits.detach(), known, self.spec, weights=weights, stats=True)
        assert at_end.stats is not None
        metrics = {**terms.metrics, TEACHER_KL: at_end.per_token}
        metrics |= {k: v for k, v in at_end.stats._asdict().items() if k != "clipped"}
        return terms._replace(metrics=metrics)


TAID_FILE = "taid.json"

EPSILON = 1e-15  # that of the authors' release


class TaidState(NamedTuple):
    """Holds what the next step starts from: t, the average change, the last loss (None: none)."""

    t: float
    momentum: float = 0.0
    loss: float | None = None


def next_state(config: TaidConfig, state: TaidState, loss: float, progress: float) -> TaidState:
    """Return the state after an optimizer step.

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


class TaidCallback(TrainerCallback):
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

    def present(self, loss: Loss) -> TaidLoss:
        """Return the loss with the t of this step."""
        assert isinstance(loss, TaidLoss)
        return replace(loss, t=self.state.t)

    def add(self, soft: Tensor, weights: Tensor) -> None:
        """Count a micro-batch: soft [N] in nats, and the weights [N] of its tokens in the loss."""
        if not self.config.adaptive:
            return
        part = (soft * weights).sum(dtype=torch.float32)
        self._sum = part if self._sum is None else self._sum + part

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what was summed; a run that is not resumed starts at t_start."""
        self._sum = None
        if state.global_step == 0:
            self.state = TaidState(self.config.t_start)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move t behind each optimizer step."""
        progress = min(1.0, state.global_step / state.max_steps)
        self._used = self.state.t
        self.state = next_state(self.config, self.state, self._loss(), progress)

    def _loss(self) -> float:
        """Return the step's mean soft loss; where it is not read, nothing waits for the device."""
        if not self.config.adaptive:
            return math.nan
        own = torch.zeros((), device=self._accelerator.device) if self._sum is None else self._sum
        self._sum = None
        total: Any = self._accelerator.reduce(own, reduction="mean")
        return float(total)

    def metrics(self) -> dict[str, float]:
        """Return the t of the last step."""
        return {"taid_t": self._used}

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint."""
        with open(os.path.join(folder, TAID_FILE), "w", encoding="utf-8") as file:
            json.dump(self.state._asdict(), file)

    def load(self, folder: str) -> None:
        """Read the state from a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint is of a run without TAID.
        """
        path = os.path.join(folder, TAID_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the t of taid must be in the checkpoint: no {path}")
        with open(path, encoding="utf-8") as file:
            self.state = TaidState(**json.load(file))
