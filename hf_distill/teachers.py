"""Teachers: objects that read the teacher's side of a batch. The trainer does not know which."""

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_distill.alignment import Side
from hf_distill.heads import Reader, Signal, causal_lm, evaluating, unwrap, vocab_size

logger = logging.getLogger(__name__)

SELF_TEACHERS = ("base", "live", "ema")


class Teacher(Protocol):
    """What a trainer needs of a teacher. `signal` is the method; the rest is its life cycle."""

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Called once, before any training: place the teacher, check it against the student.

        `refusal` is why hidden states must not be used in this run, or None.
        """

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """The teacher's view of the scored tokens, without gradient. `student` may be wrapped."""
        ...

    def update(self, student: nn.Module) -> None:
        """Called after every optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the student; empty if nothing."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore from a checkpoint."""


def _describe_memory(model: nn.Module) -> str:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return f"{size / 2**20:,.0f} MiB"


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """Both must give as many logits.

    Raises:
        ValueError: naming both sizes.
    """
    sizes = vocab_size(causal_lm(student)), vocab_size(causal_lm(teacher))
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            "student and teacher must have one vocabulary, got "
            f"{sizes[0]} entries for the student and {sizes[1]} for the teacher"
        )


class ModelTeacher:
    """Another causal LM, frozen.

    Args:
        model: a model, or what `AutoModelForCausalLM.from_pretrained` takes.
    """

    def __init__(self, model: nn.Module | str) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        self.model: nn.Module = loaded.eval().requires_grad_(False)

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Check the vocabulary and move the model to the trainer's device, unless it is placed."""
        if self.model is student:
            raise ValueError(
                "the teacher must not be the student's own object, which is frozen with it: use "
                "SelfTeacher, or a copy"
            )
        check_vocabulary(student, self.model)
        placed = getattr(self.model, "hf_device_map", None) or getattr(
            self.model, "is_quantized", False
        )
        if not placed:
            self.model.to(accelerator.device)
        self._reader = Reader("teacher", refusal)

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """The frozen model's view of its side of the batch."""
        return self._reader.signal(self.model, side)

    def update(self, student: nn.Module) -> None:
        """Nothing: the teacher is frozen."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the teacher is where it was loaded from."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The base model inside the block; afterwards every requires_grad is as before.

    PEFT turns requires_grad on for all parameters of the active adapter when it comes back, also
    for those the user had frozen.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class SelfTeacher:
    """The student itself, as it was or as it is.

    Args:
        kind: "base" is the student before training: its adapters switched off, at no extra weights,
            or a frozen copy where the whole model is trained. "ema" is an exponential moving
            average of the trainable parameters. "live" is the student at this step, without
            gradient; with hints it tends to collapse, see the README.
        ema_decay: per optimizer step, in [0, 1), for "ema".

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, kind: str = "base", ema_decay: float = 0.995) -> None:
        if kind not in SELF_TEACHERS:
            raise ValueError(f"teacher must be one of {SELF_TEACHERS}, got {kind!r}")
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        self.kind = kind
        self.ema_decay = ema_decay
        self._copy: nn.Module | None = None
        self._average: dict[str, Tensor] = {}

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Take the frozen copy or the first average, and log what it costs."""
        self._reader = Reader("teacher", refusal)
        if self.kind == "base" and not isinstance(student, PeftModel):
            self._copy = copy.deepcopy(student).eval().requires_grad_(False)
            logger.info("teacher base: a frozen copy, %s", _describe_memory(self._copy))
        elif self.kind == "base":
            logger.info("teacher base: the student with its adapters off, no extra weights")
        elif self.kind == "ema":
            # in float32: a step of 1 - ema_decay would be lost in 16 bits
            self._average = {
                n: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for n, p in _trainable(student)
            }
            logger.info(
                "teacher ema: decay %g, %d averaged tensors", self.ema_decay, len(self._average)
            )
        else:
            logger.warning(
                "teacher live: a self-teacher that follows the student tends to collapse into "
                "endless completions; watch completion_ended, or use 'base'"
            )

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """The teacher's view of its side of the batch."""
        if self._copy is not None:
            return self._reader.signal(self._copy, side)
        model = unwrap(student)
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            if self.kind == "base":
                assert isinstance(model, PeftModel)
                stack.enter_context(adapters_off(model))
            elif self.kind == "ema":
                stack.enter_context(self._swapped(model))
            return self._reader.signal(model, side, frozen_head=self.kind == "ema")

    @contextmanager
    def _swapped(self, model: nn.Module) -> Iterator[None]:
        kept = {name: parameter.data for name, parameter in _trainable(model)}
        try:
            for name, parameter in _trainable(model):
                parameter.data = self._average[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in _trainable(model):
                parameter.data = kept[name]

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move the average towards the student by 1 - ema_decay."""
        if self.kind == "ema":
            for name, parameter in _trainable(unwrap(student)):
                average = self._average[name]
                average.lerp_(parameter.to(average.dtype), 1 - self.ema_decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by parameter name; empty for the other kinds."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the average.

        Raises:
            ValueError: the checkpoint's parameters are not the student's.
        """
        if state.keys() != self._average.keys():
            odd = sorted(state.keys() ^ self._average.keys())
            raise ValueError(
                "the checkpoint's teacher must hold the student's trainable parameters; "
                f"{len(odd)} differ, the first is {odd[0]!r}"
            )
        for name, average in self._average.items():
            average.copy_(state[name])


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def as_teacher(teacher: Teacher | nn.Module | str) -> Teacher:
    """A teacher from a model, a name that `from_pretrained` takes, or a teacher."""
    return ModelTeacher(teacher) if isinstance(teacher, nn.Module | str) else teacher
