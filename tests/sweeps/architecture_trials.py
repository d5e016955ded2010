"""The trials of one causal-LM type: each gives one cell of the table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hf_distill.data.batches import unpad
from hf_distill.models.layers import LayerWatcher, decoder_blocks
from tests.sweeps import reference, running, tiny_configs
from tests.sweeps.cells import (
    GRADIENT,
    LOGITS,
    LOSS,
    NONE,
    RIGHT,
    WRONG,
    Cell,
    as_json,
    furthest,
    measured,
    relative,
    tried,
    worst,
)
from tests.tiny_models import problems


@dataclass
class Subject:
    """A type with a student and a teacher, and what is right for them.

    Attributes:
        kind: the name of the type.
        windows: whether attention windows are shorter than the rows.
    """

    kind: str
    windows: bool = False

    @cached_property
    def student(self) -> Any:
        """Never trained: trials train copies."""
        return tiny_configs.model(self.kind, 0, self.windows)

    @cached_property
    def teacher(self) -> Any:
        return tiny_configs.model(self.kind, 1, self.windows)

    @cached_property
    def alpha(self) -> float:
        """1 where the model's own loss is another one: then nothing says what the rest must be."""
        return 1.0 if reference.has_own_loss(self.student) else reference.ALPHA

    @cached_property
    def is_random(self) -> bool:
        return reference.is_random(running.copied(self.student), self.teacher)

    @cached_property
    def expected(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a step."""
        return reference.distillation_step(running.copied(self.student), self.teacher, self.alpha)

    @property
    def names(self) -> tuple[str, ...]:
        return (type(self.student).__name__,)


def step(subject: Subject, side: str = "right") -> Cell:
    """Loss and gradients of a DistillTrainer's first step on a batch that is padded on a side."""
    student, collator = running.copied(subject.student), reference.Pad(subject.student, side)
    teacher = running.copied(subject.teacher)
    if subject.is_random:
        with torch.no_grad():
            expected = float(reference.distillation(subject.student, teacher, subject.alpha))
        off = relative(running.evaluated(student, teacher, collator, subject.alpha), expected)
        return measured(off, LOSS, f"evaluated {off:.0e}")
    loss, gradients = subject.expected
    first = running.distill(student, teacher, collator, subject.alpha)
    off = relative(first.loss if first.loss is not None else float("nan"), loss)
    far = furthest(first.gradients, gradients)
    batch = collator(reference.rows())
    if math.isnan(far) and not reference.has_finite_gradients(subject.student, batch):
        return Cell(NONE, "Transformers: the model's own loss has gradients that are not numbers")
    text = f"{off:.0e} / {far:.0e}"
    return worst(measured(off, LOSS, text), measured(far, GRADIENT, text))


def opsd(subject: Subject) -> Cell:
    """The first loss of an OPSDTrainer on completions of the data."""
    trainer, collator = running.opsd(running.copied(subject.student), on_policy=False)
    batch = collator(problems(running.NUM_ROWS, 0))
    own = unpad(batch["input_ids"], batch["attention_mask"])
    other = unpad(batch["teacher_input_ids"], batch["teacher_attention_mask"])
    lengths = (batch["completion_index"] >= 0).sum(1).tolist()
    pairs = list(zip(own, other, lengths, strict=True))
    expected = reference.divergence(subject.student, subject.student, pairs)
    first = running.train(trainer)
    if subject.is_random:
        return Cell(RIGHT, "runs")
    return measured(
        relative(first.loss if first.loss is not None else float("nan"), expected), LOSS
    )


def generate(subject: Subject) -> Cell:
    """A rollout of left-padded prompts, greedy: each token is that of its row alone."""
    trainer, _ = running.opsd(
        running.copied(subject.student), on_policy=True, rollout={"temperature": 0.0}
    )
    rows = running.sampled(trainer)
    odd = sum(not reference.is_greedy(subject.student, *row, LOGITS) for row in rows)
    return measured(odd, 0, f"{len(rows) - odd} of {len(rows)} rows")


@torch.no_grad()
def layers(subject: Subject) -> Cell:
    """`hidden_layers` runs, and the states are those of `output_hidden_states`."""
    student, teacher = running.copied(subject.student), running.copied(subject.teacher)
    collator = reference.Pad(subject.student)
    with torch.enable_grad():
        running.distill(student, teacher, collator, subject.alpha, hidden_layers="uniform")
    lm, batch = subject.student, collator(reference.rows())
    inputs: dict[str, Any] = {name: x for name, x in batch.items() if name != "labels"}
    if reference.takes(lm, "use_cache"):
        inputs["use_cache"] = False
    count = len(decoder_blocks(lm))
    keep = batch["input_ids"] != reference.PAD
    with LayerWatcher("student", range(1, count + 1)).on(lm, keep) as seen:
        found = lm(**inputs, output_hidden_states=True).hidden_states
    states = seen.states().hidden
    width = states[0].shape[-1:]
    if found is None or any(x.shape != keep.shape + width for x in found):
        return Cell(RIGHT, "runs; states of another shape")
    return _numbered([x[keep] for x in found], states)


def _numbered(found: Sequence[Tensor], states: Sequence[Tensor]) -> Cell:
    """Whether states are entries of the library's, but for the last, which is before the norm."""
    places = [
        [place for place, other in enumerate(found) if torch.equal(other, state)]
        for state in states[:-1]
    ]
    if all(layer in place for layer, place in enumerate(places, 1)):
        return Cell(RIGHT)
    firsts = [place[0] for place in places if place]
    in_order = len(firsts) == len(places) and firsts == sorted(set(firsts))
    return Cell(RIGHT, "numbered otherwise") if in_order else Cell(WRONG, "other states")


def left(subject: Subject) -> Cell:
    """`step` on a left-padded batch; without a mask nobody could tell what is padding."""
    if not reference.takes(subject.student, "attention_mask"):
        return Cell(NONE, "takes no mask")
    return step(subject, "left")


def plain_generate(subject: Subject) -> None:
    """The completions of left-padded prompts by Transformers alone."""
    batch = reference.Pad(subject.student, "left")(reference.rows())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    subject.student.generate(**inputs, max_new_tokens=2, do_sample=False)


def plain_states(subject: Subject) -> None:
    """The states of a row by Transformers alone."""
    inputs = reference.inputs_of(subject.student, reference.rows()[0]["input_ids"])
    subject.student(**inputs, output_hidden_states=True)


TRIALS: dict[str, Callable[[Subject], Cell]] = {
    "step": step,
    "left": left,
    "opsd": opsd,
    "generate": generate,
    "layers": layers,
}
PLAIN = {"generate": plain_generate, "layers": plain_states}
COLUMNS = tuple(TRIALS)


def _notes(subject: Subject) -> str:
    own = ["own loss, alpha 1"] if subject.alpha == 1.0 else []
    return "; ".join(own + (["random in training"] if subject.is_random else []))


def trial(kind: str, windows: bool = False, columns: tuple[str, ...] = COLUMNS) -> dict[str, Any]:
    """All cells of a type, by column, and how its student was read.

    Returns:
        kind, class, path, note, and cells {column: [verdict, text]}; or kind and failed, the
        reason why Transformers cannot build the type or run it alone on token ids.
    """
    subject = Subject(kind, windows)
    try:
        with torch.no_grad():
            reference.logits(subject.student, reference.rows()[0]["input_ids"])
        note = _notes(subject)
    except Exception as error:  # the library's own: there is nothing to try
        return {"kind": kind, "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    cells, path = {}, ""
    for column in columns:
        plain = PLAIN.get(column)
        with running.heard() as said:
            cells[column] = tried(
                partial(TRIALS[column], subject),
                subject.names,
                plain and partial(plain, subject),
            )
        path = running.path_of(said) if column == columns[0] else path
    made = {"kind": kind, "class": subject.names[0], "path": path, "note": note}
    return made | {"cells": as_json(cells)}
