"""What each device of a run holds: parameters, gradients, states, teacher, loss, activations.

Three moments of a step are looked at: when the loss is formed, when the backward begins, and when
the optimizer steps. A device needs what the largest of them holds. The formulas are compared with
what the engines hold by `tests/hf_distill/engines/test_memory.py`.

Letters: N scored tokens of a device, V vocabulary, H hidden, W devices.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from hf_distill.models.forward import HEAD_COPIES, LOGITS_COPIES
from hf_distill.monitoring.activations import Activations, count_activations
from hf_distill.monitoring.model_sizes import ModelSizes, Parameter, parallel_sizes
from hf_distill.monitoring.plan_settings import DTYPES, Plan, PlanSettings, Row
from metal_ops import Head, linear_scratch_bytes

ENGINES = ("one", "ddp", "zero2", "fsdp2", "zero3", "tp")  # from the simplest
IN_PIECES = ("fsdp2", "zero3", "tp")
WIDE = 4  # bytes of a float32


class _Joined(NamedTuple):
    """Holds what an engine joins of a unit, and the gradients it has there before it cuts them."""

    parameters: int
    gradients: int


class Planner:
    """Plans a run on each engine.

    Args:
        student: its config.
        teacher: of another model, or None.
        settings: of the run.

    Raises:
        ValueError: `settings.teacher` is "model" and there is none, or the other way round.
    """

    def __init__(
        self, student: PreTrainedConfig, teacher: PreTrainedConfig | None, settings: PlanSettings
    ) -> None:
        if (teacher is None) == (settings.teacher == "model"):
            raise ValueError(
                "a model as teacher needs its config, and a self-teacher has none; got "
                f"{settings.teacher!r} and {'no' if teacher is None else 'a'} config"
            )
        self.settings, self._teacher_config = settings, teacher
        self.student = ModelSizes(student, DTYPES[settings.dtype], settings.lora_rank)
        self._counted: dict[bool, Activations | str] = {}

    @cached_property
    def teacher(self) -> ModelSizes | None:
        """Return the other model, or None."""
        config = self._teacher_config
        if config is None:
            return None
        given = self.settings.teacher_dtype
        dtype = DTYPES[given] if given else getattr(config, "dtype", None)
        return ModelSizes(config, dtype or torch.float32, frozen=True)

    def refusal(self, engine: str) -> str | None:
        """Return why an engine cannot be had with these settings, or None."""
        devices = self.settings.devices
        if engine not in ENGINES:
            return f"engine must be one of {ENGINES}, got {engine!r}"
        if engine == "one" and devices > 1:
            return f"engine one has 1 device, got {devices}"
        if engine != "tp" or devices == 1:
            return None
        if not self.student.plan:
            return f"{self.student.config.model_type} has no tensor parallel plan in transformers"
        for name, size in parallel_sizes(self.student.config).items():
            if size % devices:
                return (
                    f"{name} must be a multiple of the devices under tp, got {size} for {devices}"
                )
        return None

    def plan(self, engine: str) -> Plan:
        """Return what each device holds.

        Raises:
            ValueError: see `refusal`.
        """
        refused = self.refusal(engine)
        if refused is not None:
            raise ValueError(refused)
        return _EnginePlan(self, engine).plan()

    def activations(self, engine: str) -> Activations | str:
        """Return what the student's forward keeps, counted once for engines that run alike."""
        settings, as_bf16 = self.settings, self.settings.bf16 and engine in ("fsdp2", *ZERO)
        if as_bf16 not in self._counted:
            sizes = self.student
            if as_bf16:
                sizes = ModelSizes(sizes.config, torch.bfloat16, settings.lora_rank)
            shape = settings.batch_size, settings.length
            autocast = settings.bf16 and not as_bf16
            found = count_activations(sizes.model, sizes.blocks, *shape, autocast)
            self._counted[as_bf16] = found
        return self._counted[as_bf16]


ZERO = ("zero2", "zero3")


class _EnginePlan:
    """Makes the rows of one engine."""

    def __init__(self, planner: Planner, engine: str) -> None:
        self.planner, self.engine = planner, engine
        self.settings, self.student = planner.settings, planner.student
        self.parts = self.settings.devices if engine != "one" else 1
        self.rounds = self.settings.bf16 and engine in ("fsdp2", *ZERO)

    # what is held

    def _elements(self, p: Parameter, in_pieces: bool) -> int:
        """Return the elements of a parameter that a device holds."""
        if not in_pieces or self.parts == 1:
            return p.numel
        if self.engine == "fsdp2":
            return p.cut(self.parts, 0)
        if self.engine == "tp":
            return p.numel if p.axis is None else p.cut(self.parts, p.axis)
        return -(-p.numel // self.parts)

    def _sum(self, sizes: ModelSizes, itemsize: Callable[[Parameter], int], pieces: bool) -> int:
        return sum(self._elements(p, pieces) * itemsize(p) for p in sizes.parameters)

    @property
    def _pieces(self) -> bool:
        return self.engine in IN_PIECES

    def _stored(self, p: Parameter) -> int:
        """Return the bytes of an element of the student as it is held."""
        if self.rounds and self.engine in ZERO:
            return 2
        return WIDE if self.rounds and p.trained else p.itemsize

    def _computed(self, p: Parameter) -> int:
        """Return the bytes of an element of the student as it is computed with."""
        return 2 if self.rounds else p.itemsize

    def _parameters(self) -> Row:
        return _always("student parameters", self._sum(self.student, self._stored, self._pieces))

    def _trained_bytes(self, itemsize: Callable[[Parameter], int]) -> int:
        pieces = self._pieces or self.engine in ZERO
        trained = lambda p: itemsize(p) if p.trained else 0
        return self._sum(self.student, trained, pieces)

    def _gradients(self) -> Row:
        """Return gradients as they are kept; the step of ZeRO has them in float32 beside."""
        kept = self._trained_bytes(self._stored)
        stays = self.settings.gradient_accumulation_steps > 1 or self.engine == "zero3"
        early = kept if stays else 0
        buckets = kept if self.engine == "ddp" else 0
        wide = self._trained_bytes(lambda _: WIDE) if self.engine in ZERO else 0
        return Row("gradients", early + buckets, early + buckets, kept + buckets + wide)

    def _states(self) -> Row:
        """Return the optimizer's states, and the float32 parameters that ZeRO steps."""
        wide = self._trained_bytes(lambda _: WIDE) if self.engine in ZERO else 0
        if self.settings.optim == "sgd":
            return _always("optimizer states", wide)
        if self.settings.optim == "adafactor" and self.engine not in ZERO:
            factors = sum(_factors(p) for p in self.student.parameters if p.trained)
            return _always("optimizer states", factors)
        width = (lambda _: WIDE) if self.engine in ZERO else self._stored
        number = 2 if self.settings.optim == "adamw" else 1
        return _always("optimizer states", wide + number * self._trained_bytes(width))

    def _teacher(self) -> Row:
        sizes, kind = self.planner.teacher, self.settings.teacher
        name = "teacher parameters" if sizes else f"teacher {kind}"
        if sizes is not None:
            rounded = self.settings.bf16 and self.engine == "zero3"
            width = (lambda _: 2) if rounded else (lambda p: p.itemsize)
            return _always(name, self._sum(sizes, width, self._pieces))
        if kind == "ema":
            wide = lambda p: max(WIDE, p.itemsize) if p.trained else 0
            return _always(name, self._sum(self.student, wide, self._pieces))
        if kind == "base" and self.settings.lora_rank is None:
            return _always(name, self._sum(self.student, lambda p: p.itemsize, self._pieces))
        return _always(name, 0)

    # what comes and goes

    def _joined(self) -> tuple[int, _Joined, int]:
        """Return what is joined at the loss, at the backward's begin, and of the teacher's."""
        units, blocks = self.student.unit_elements(), self.student.largest_block()
        width = 2 if self.rounds else self.student.dtype.itemsize
        if self.engine not in ("fsdp2", "zero3") or self.parts == 1:
            trains = self.settings.lora_rank is None
            return 0, _Joined(0, blocks * width if trains else 0), 0
        head = units["head"] * width
        trained = width if self.settings.lora_rank is None else 0
        # of a block: joined, and the next one fetched meanwhile; gradients, and their copy
        block = _Joined(2 * blocks * width, 2 * blocks * trained)
        of_head = _Joined(head, 0)
        backward = max(block, of_head, key=sum)
        if self.engine == "zero3":
            return head, backward, self._teacher_head()
        if self.settings.shard_loss:
            return 0, block, 0
        # FSDP 2 gives up a buffer of what it has gathered only when it gathers again: the copy of
        # a self-teacher is gathered by the student's own modules
        teachers = 2 if self.planner.teacher is not None else 1
        return 2 * head, backward, teachers * self._teacher_head()

    def _teacher_head(self) -> int:
        """Return the bytes of the teacher's head, which is copied where an engine joins it."""
        sizes = self.planner.teacher
        if sizes is not None:
            width = 2 if self.settings.bf16 else sizes.dtype.itemsize
            return sizes.vocab * sizes.hidden * width
        held = self.settings.teacher == "ema" or (
            self.settings.teacher == "base" and self.settings.lora_rank is None
        )
        width = 2 if self.rounds else self.student.dtype.itemsize
        return self.student.vocab * self.student.hidden * width if held else 0

    @property
    def by_logits(self) -> bool:
        """Return whether the trainer reads logits, see `Reader.takes_less_by_logits`."""
        if self.engine not in ("fsdp2", "zero3") or not self.student.trains_head:
            return False
        if self._splits_head:
            return False
        copies = HEAD_COPIES["ZeRO" if self.engine == "zero3" else "FSDP"]
        return self.settings.tokens < self.student.hidden * copies / LOGITS_COPIES

    @property
    def _splits_head(self) -> bool:
        """Return whether a device computes its rows of the heads only."""
        shards = self.engine == "fsdp2" and self.settings.shard_loss
        return self.parts > 1 and (shards or self.engine == "tp")

    @property
    def _loss_tokens(self) -> int:
        """Return the tokens whose loss a device takes part in: under `shard_loss`, all devices'."""
        shards = self._splits_head and self.engine == "fsdp2"
        return self.settings.tokens * (self.parts if shards else 1)

    def _loss(self) -> Row:
        tokens, vocab, hidden = self._loss_tokens, self.student.vocab, self.student.hidden
        if self._splits_head:
            vocab = -(-vocab // self.parts)
        gradient = vocab * hidden * WIDE if self.student.trains_head else 0
        if self.by_logits:
            logits = tokens * vocab * WIDE
            return Row("loss", int(LOGITS_COPIES * logits), logits + gradient, 0)
        width = self.planner.teacher.hidden if self.planner.teacher else hidden
        states = tokens * (2 * hidden + width) * self._width
        # as measured, ZeRO-3 has the head's gradient twice by then
        twice = self.engine == "zero3" and self.parts > 1
        loss = gradient * (1 + twice) + self._scratch() + states
        if self.settings.bf16 and not self.rounds:  # autocast keeps the heads in 16 bits
            loss += vocab * (hidden + width) * 2
        copies = 1.0
        if self.engine in ("fsdp2", "zero3") and self.parts > 1 and not self._splits_head:
            copies = HEAD_COPIES["ZeRO" if self.engine == "zero3" else "FSDP"]
        return Row("loss", loss, int(copies * gradient) + tokens * hidden * self._width, 0)

    @property
    def _width(self) -> int:
        return 2 if self.settings.bf16 else self.student.dtype.itemsize

    def _scratch(self) -> int:
        """Return what the op takes for the logits of a chunk."""
        sizes, rounded = self.planner.teacher, self.settings.bf16
        dtype = torch.bfloat16 if rounded else self.student.dtype
        device = "cpu" if self.settings.device == "cpu" else "meta"
        one = lambda kind: torch.empty((), dtype=kind, device=device)
        student = Head(one(dtype).expand(self.student.vocab, self.student.hidden))
        teacher = student
        if sizes is not None:
            kind = torch.bfloat16 if rounded else sizes.dtype
            teacher = Head(one(kind).expand(sizes.vocab, sizes.hidden))
        if not self._splits_head:
            return linear_scratch_bytes(self.settings.tokens, student, teacher)
        return linear_scratch_bytes(self._loss_tokens, student, teacher, self.parts)

    def _buffers(self) -> Row:
        """Return DeepSpeed's buffer for gradients on their way."""
        if self.engine not in ZERO:
            return _always("engine's buffers", 0)
        size = self.settings.reduce_bucket_size
        elements = self.student.hidden**2 if size is None else size
        return _always("engine's buffers", elements * (2 if self.rounds else WIDE))

    def plan(self) -> Plan:
        """Return all rows."""
        at_loss, backward, of_teacher = self._joined()
        joined = Row(
            "joined by the engine",
            at_loss + of_teacher,
            backward.parameters + backward.gradients + of_teacher // 2,
            of_teacher // 2 if self.engine == "fsdp2" and self.planner.teacher is not None else 0,
        )
        held = [self._parameters(), self._gradients(), self._states(), self._teacher()]
        rows = [*held, self._buffers(), joined, self._loss()]
        found = self.planner.activations(self.engine)
        kept, unknown = 0, found if isinstance(found, str) else None
        if isinstance(found, Activations):
            parts = self.parts if self.engine == "tp" else 1
            kept = found.total(self.settings.gradient_checkpointing, parts)
        rows.append(Row("activations", kept, kept, 0, is_estimate=True))
        return Plan(self.engine, tuple(rows), unknown, self.by_logits)


def _always(kind: str, size: int) -> Row:
    return Row(kind, size, size, size)


def _factors(p: Parameter) -> int:
    """Return the bytes of Adafactor's states: of rows and columns, or of each element of a vector.

    They are as wide as the gradient.
    """
    if len(p.shape) < 2:
        return p.numel * p.itemsize
    return p.itemsize * (p.numel // p.shape[-1] + p.numel // p.shape[-2])


def first_that_fits(plans: list[Plan], memory: int) -> Plan | None:
    """Return the first plan that needs at most `memory` bytes, or None."""
    return next((plan for plan in plans if plan.needs <= memory), None)


def plan_all(planner: Planner) -> tuple[list[Plan], dict[str, str]]:
    """Return the plans of all engines for the devices, and why others cannot be had."""
    alone = planner.settings.devices == 1
    names = [x for x in ENGINES if (x == "one") == alone]
    refused = {x: planner.refusal(x) for x in names}
    plans = [planner.plan(x) for x, why in refused.items() if why is None]
    return plans, {x: why for x, why in refused.items() if why is not None}
