"""What a trainer needs of a teacher."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_distill.data.sides import Side
from hf_distill.models.signals import Signal
from hf_distill.run import Run


class Teacher:
    """Says something of the scored tokens. Subclasses override `signal`.

    The rest is what a trainer asks of a teacher and its life cycle; the defaults are those of a
    frozen teacher that is ready as it is.

    Attributes:
        dense: whether signals are about the whole vocabulary, as logits or hidden states, and not
            about some entries of each token's distribution.
        temperature: the only temperature that its log-probabilities are known at, or None for any.
        vocab_size: logits per token, or None for as many as the student has.
        reads_batches: whether it reads a batch as a model does. Others know tokens of a vocabulary,
            and classifiers have none.
        knows_new_rows: whether it can be asked about any row, and not only about those that were
            written down before.
        route: from a row of the data to the number of the teacher that it asks; None where there is
            one teacher.
    """

    dense: bool = True
    temperature: float | None = None
    vocab_size: int | None = None
    reads_batches: ClassVar[bool] = True
    knows_new_rows: ClassVar[bool] = True
    route: Any = None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of its ids, to compare with the student's; None if not known."""
        return None

    def each(self) -> Sequence["Teacher"]:
        """Return the teachers that are asked."""
        return [self]

    def check(self, run: Run) -> None:
        """Check the run that the teacher is for, before it is prepared.

        Raises:
            ValueError: the run's loss could not be right.
        """

    def inputs(self) -> Sequence[str]:
        """Return names of a batch's inputs that it reads, which the student need not read."""
        return ()

    def collator(self, collator: Any) -> Any:
        """Return the run's data collator, or one around it that adds what the teacher needs."""
        return collator

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Place the teacher, check it against the student and begin anew, before any training.

        It is called when a trainer is made, and again before each of its later trainings.

        Args:
            accelerator: of the run.
            student: not wrapped yet.
            refusal: why hidden states must not be used in this run, or None.
        """

    def keep_vocab(self, size: int | None) -> None:
        """Learn that the run reads the first `size` entries of the vocabulary, or all (None)."""

    def wrong_vocab(self, message: str) -> Exception:
        """Return the error of a vocabulary that is not the student's."""
        return ValueError(message)

    def watched_model(self, student: nn.Module) -> nn.Module | None:
        """Return the model whose layers `watch` numbers; None where the teacher runs elsewhere."""
        return None

    def watch(self, layers: Sequence[int], attention: bool) -> None:
        """Give signals these layers' states from now on, see `hf_distill.models.layers`."""
        raise NotImplementedError(f"a {type(self).__name__} has no layers")

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return the teacher's view of the scored tokens, no gradient; `student` may be wrapped."""
        raise NotImplementedError(f"{type(self).__name__} must override signal")

    def update(self, student: nn.Module) -> None:
        """Follow the student; it is called after every optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold besides the student; empty if nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore from a checkpoint."""


class UpdateTeacher(TrainerCallback):
    """Tells a teacher that an optimizer step has been taken."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Update the teacher after an optimizer step."""
        self.teacher.update(model)
