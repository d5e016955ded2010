"""What a trainer needs of a teacher."""

from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from hf_distill.data.sides import Side
from hf_distill.models.signals import Signal
from hf_distill.models.structure import causal_lm, check_classes, is_classifier


class Teacher(Protocol):
    """`signal` is the method; the rest is its life cycle.

    A teacher may also have `vocab_size`, its logits per token (int, or None for as many as the
    student's), and `tokenizer`, a method without arguments that gives its tokenizer, or None where
    that is not known. What is there is compared with the student's.
    """

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


class Stateless:
    """The life cycle of a teacher that does not change in training."""

    def update(self, student: nn.Module) -> None:
        """Nothing: the teacher is frozen."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the teacher is where it was taken from."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


def check_kinds(student: nn.Module, teacher: nn.Module) -> None:
    """Classifiers must have the same classes; causal LMs are compared by the trainer.

    Raises:
        ValueError: as `check_classes`.
    """
    if is_classifier(causal_lm(student)) or is_classifier(causal_lm(teacher)):
        check_classes(causal_lm(student), causal_lm(teacher))
