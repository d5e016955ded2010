"""Teachers that are the student itself: as it was, averaged, with weaker adapters, or as it is."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import PeftType
from torch import Tensor, nn

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.layers import LayerWatcher
from hf_distill.models.modes import evaluating
from hf_distill.models.pieces import will_lie_in_pieces
from hf_distill.models.precision import weights_replaced
from hf_distill.models.signals import Signal
from hf_distill.models.structure import as_called, unwrap
from hf_distill.schedules import Schedule
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.held_values import HeldValues
from hf_distill.teachers.initial_adapters import (
    BaseOfAdapters,
    check_not_merged,
    has_adapters,
)

logger = logging.getLogger(__name__)

SELF_TEACHERS = ("base", "live", "ema", "lora_scale")

STEP = "step"  # of a schedule, in a checkpoint


def _describe_memory(model: nn.Module) -> str:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return f"{size / 2**20:,.0f} MiB"


PLAIN_LORA = "teacher lora_scale needs a model with plain LoRA adapters"


def check_scalable(model: nn.Module) -> None:
    """Check that the effect of the model's active adapters is proportional to LoRA's scaling.

    Raises:
        ValueError: it is no PEFT model, its adapters are of another kind, or more than low-rank
            products is trained with them; the message says which.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"{PLAIN_LORA}, got a {type(model).__name__}")
    for name in model.active_adapters:
        _check_config(name, model.peft_config[name])
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            _check_layer(path, module, model.active_adapters)


def _check_config(name: str, config: Any) -> None:
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{PLAIN_LORA}, got {PeftType(config.peft_type).value} ({name!r})")
    for setting in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, setting):
            raise ValueError(
                f"{PLAIN_LORA} and nothing else trained, whose effect has no scale; got {setting} "
                f"{getattr(config, setting)} ({name!r})"
            )
    if config.bias != "none":
        raise ValueError(f"{PLAIN_LORA} and bias 'none', got {config.bias!r} ({name!r})")


def _check_layer(path: str, layer: LoraLayer, active: list[str]) -> None:
    variants = [layer.lora_variant[name] for name in active if name in layer.lora_variant]
    if variants:
        raise ValueError(f"{PLAIN_LORA}, got {type(variants[0]).__name__} in {path}")
    if layer.merged:
        raise ValueError(f"{PLAIN_LORA}, not merged into the weights; {path} is merged")


class SelfTeacher(Teacher):
    """Asks the student itself, as it was or as it is.

    Args:
        kind: "base" is the student before training: its adapters are switched off, which needs no
            extra weights, or a frozen copy is kept if the whole model is trained. Beside adapters a
            copy is kept of what they do not switch off: biases that are trained, and the start that
            PiSSA, OLoRA, CorDA and LoRA-GA take out of the weights. "ema" is an
            exponential moving average of the trainable parameters. It averages each parameter by
            itself, so of a LoRA adapter A and B are averaged apart, and the product of the averages
            is not the average of the products. "lora_scale" is the student with the effect of its
            LoRA adapters times `lora_scale`. "live" is the student at this step, without gradient.
            With hints it tends to collapse.
        ema_decay: the decay of the "ema" average per optimizer step, in [0, 1).
        lora_scale: the share of the adapters' effect that "lora_scale" has, in [0, 1]: 0 is the
            base, and 1 is live. It is a number, or a schedule over optimizer steps such as
            "linear:0.0->1.0@100".

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        kind: str = "base",
        ema_decay: float = 0.995,
        lora_scale: float | str | Schedule = 0.5,
    ) -> None:
        if kind not in SELF_TEACHERS:
            raise ValueError(f"teacher must be one of {SELF_TEACHERS}, got {kind!r}")
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        self.lora_scale = Schedule.parse(lora_scale)
        low, high = self.lora_scale.bounds
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"lora_scale must stay in [0, 1], got {lora_scale}")
        self.kind = kind
        self.ema_decay = ema_decay
        self._copy: nn.Module | None = None
        self._base: tuple[nn.Module, BaseOfAdapters] | None = None  # the model, and its base
        self._held: HeldValues | None = None  # the average, or the start of a model in pieces
        self._step = 0

    def become(self, other: "SelfTeacher") -> None:
        """Follow the student as another teacher would, from the next `prepare` on."""
        self.kind, self.ema_decay, self.lora_scale = other.kind, other.ema_decay, other.lora_scale

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Take the frozen copy or the first average, and log what it costs.

        A student that was its own teacher before keeps what its adapters started from.

        Raises:
            ValueError: the student has no adapters that "lora_scale" could scale; or its adapters
                are merged; or the model before training cannot be had, see `BaseOfAdapters`.
        """
        self._reader = Reader("teacher", refusal)
        self._copy, self._held, self._step = None, None, 0
        if self.kind == "lora_scale":
            check_scalable(student)
        check_not_merged(student)
        if self.kind in ("base", "lora_scale") and has_adapters(student):
            self._keep_base(accelerator, student)
        elif self.kind == "base" and will_lie_in_pieces(accelerator, student):
            self._held = HeldValues(student, wide=False)
            logger.info("teacher base: the values of the start, in pieces like the student's")
        elif self.kind == "base":
            self._copy = copy.deepcopy(student).eval().requires_grad_(False)
            logger.info("teacher base: a frozen copy, %s", _describe_memory(self._copy))
        elif self.kind == "ema":
            self._held = HeldValues(student, wide=True)
            logger.info(
                "teacher ema: decay %g, %d averaged tensors",
                *(self.ema_decay, len(self._held.values)),
            )
        else:
            logger.warning(
                "teacher live: a self-teacher that follows the student tends to collapse into "
                "endless completions; watch completion_ended, or use 'base'"
            )

    def _keep_base(self, accelerator: Accelerator, student: nn.Module) -> None:
        model = unwrap(student)
        if self._base is None or self._base[0] is not model:
            self._base = model, BaseOfAdapters(model)
        base = self._base[1]
        if base.initial and will_lie_in_pieces(accelerator, student):
            raise ValueError(
                "a sharded student cannot be given the values that it started with, got "
                f"{accelerator.distributed_type.value} and {base}: give the model before training "
                "as a teacher of its own"
            )
        if self.kind == "base":
            logger.info("teacher base: %s", base)
        else:
            logger.info("teacher lora_scale: %s of %s", self.lora_scale, base)

    def watched_model(self, student: nn.Module) -> nn.Module:
        """Return the model whose layers `watch` numbers."""
        return student if self._copy is None else self._copy

    def watch(self, layers: Sequence[int], attention: bool) -> None:
        """Give signals these layers' states from now on, see `hf_distill.models.layers`."""
        self._reader.watch = LayerWatcher("teacher", layers, attention)

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return the teacher's view of its side of the batch."""
        if self._copy is not None:
            return self._reader.signal(self._copy, side)
        model = unwrap(student)
        swaps = self._held is not None or bool(self._base and self._base[1].initial)
        with weights_replaced(), evaluating(model), self._instead(student):
            return self._reader.signal(as_called(student), side, frozen_head=swaps)

    def _instead(self, student: nn.Module) -> Any:
        """Make the student the teacher inside the block."""
        if self._held is not None:
            return self._held.inside(student)
        if self._base is None:
            return nullcontext()
        model, base = unwrap(student), self._base[1]
        if self.kind == "base":
            return base.inside(model)
        return base.scaled(model, self.lora_scale.at(self._step))

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move the average towards the student by 1 - ema_decay, or the schedule by a step."""
        self._step += 1
        if self.kind == "ema" and self._held is not None:
            self._held.move(student, 1 - self.ema_decay)

    @torch.no_grad()
    def distance(self, student: nn.Module) -> float | None:
        """Return the largest absolute difference of the average and the student's parameters.

        It is None for the kinds that have no average.
        """
        if self.kind != "ema" or self._held is None:
            return None
        return self._held.distance(student)

    def averaged(self, student: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each average and what the student has, as this process holds them."""
        assert self._held is not None
        return self._held.pairs(student)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average or the adapters' start, by parameter name, and a schedule's step.

        All processes must call it together. The tensors of a model in pieces are whole in the main
        process, and have only a shape in others.
        """
        kept = {} if self._base is None else self._base[1].initial
        step = {STEP: torch.tensor(self._step)} if self.kind == "lora_scale" else {}
        held = self._held if self.kind == "ema" else None
        return {**({} if held is None else held.whole()), **kept, **step}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` holds.

        Raises:
            ValueError: the checkpoint's tensors are not those of this teacher.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            odd = sorted(state.keys() ^ expected.keys())
            raise ValueError(
                "the checkpoint's teacher must hold the student's trainable parameters for ema, "
                f"what adapters do not switch off for base, {STEP!r} for lora_scale; {len(odd)} "
                f"differ, the first is {odd[0]!r}"
            )
        if self.kind == "lora_scale":
            self._step = int(state[STEP])
        if self._base is not None:
            model, base = self._base
            base.load(model, state)
        if self._held is not None and self.kind == "ema":
            self._held.load(state)


@dataclass
class SelfTeacherConfig:
    """Says how a self-teacher follows the student.

    Raises:
        ValueError: a value is out of range.
    """

    ema_decay: float = field(
        default=0.995,
        metadata={
            "help": "The decay of the ema teacher's moving average per optimizer step, in [0, 1)."
        },
    )
    lora_scale: float | str = field(
        default=0.5,
        metadata={
            "help": "The share of the adapters' effect that the lora_scale teacher has, in [0, 1]. "
            "It is a number, or a schedule such as 'linear:0.0->1.0@100' (from, to, optimizer "
            "steps)."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        SelfTeacher("ema", self.ema_decay, self.lora_scale)
