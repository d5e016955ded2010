"""What a run is made of, for those who help a trainer: they get this record, not the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.losses import Loss
from hf_distill.models.structure import Kind, causal_lm, kind_of


@dataclass(frozen=True)
class Run:
    """Holds the parts of a run.

    Attributes:
        args: the trainer's config.
        student: as the trainer has it, with its adapters.
        teacher: a `hf_distill.teachers.Teacher`.
        processing_class: the tokenizer, if it is one.
        collator: the data collator that the trainer was given.
        accelerator: the trainer's.
        sharded: whether parameters lie in pieces on several processes, now or once training has
            begun (FSDP, DeepSpeed ZeRO-3, tensor parallelism).
        losses: the loss at the ends of all schedules and between them: what holds for these holds
            at every step.
        own_loss: whether the loss is the user's, and not one that the config names.
        num_copies: processes that share the same rows (tensor parallelism).
        num_parts: processes that a row is split over (context and sequence parallelism).
    """

    args: Any
    student: nn.Module
    teacher: Any
    processing_class: Any
    collator: Any
    accelerator: Accelerator
    sharded: bool
    losses: Sequence[Loss]
    own_loss: bool = False
    num_copies: int = 1
    num_parts: int = 1

    @property
    def language_model(self) -> nn.Module:
        """Return the Transformers model itself, without wrappers and adapters."""
        return causal_lm(self.student)

    @property
    def kind(self) -> Kind:
        """Return of what the student gives logits."""
        return kind_of(self.language_model)

    @property
    def in_16_bit(self) -> bool:
        """Return whether the student computes in 16 bits or fewer, whatever its logits are."""
        quantized = getattr(self.student, "is_quantized", False)
        return bool(self.args.bf16 or self.args.fp16 or quantized)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the processing class where it is a tokenizer, or a processor's; else None."""
        given = self.processing_class
        given = getattr(given, "tokenizer", None) if isinstance(given, ProcessorMixin) else given
        return given if isinstance(given, PreTrainedTokenizerBase) else None

    @property
    def teachers(self) -> Sequence[Any]:
        """Return the teachers that are asked: several behind a `RoutedTeacher`."""
        return self.teacher.each()
