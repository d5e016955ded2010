"""Rows of one's own collator: padding and its ids do not count, end tokens do.

Rows of the student and of the teacher have several lengths; both sides are padded on their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data.alignment import AlignmentError
from tests.hf_distill.trainers import models

Batch = dict[str, Tensor]
TOLERANCE = 3e-6  # of the largest gradient; measured: at most 4e-7
STUDENT = ("input_ids", "attention_mask", "labels")
TEACHER = ("teacher_input_ids", "teacher_attention_mask")
INDEX = {STUDENT: "completion_index", TEACHER: "teacher_completion_index"}


def to_the_left(batch: Batch, names: tuple[str, ...]) -> Batch:
    """The batch with one side's padding in front of its rows."""
    gaps = (batch[names[1]] == 0).sum(1)
    moved = {
        name: torch.stack([row.roll(int(gap)) for row, gap in zip(batch[name], gaps, strict=True)])
        for name in names
    }
    index = batch[INDEX[names]]
    moved[INDEX[names]] = torch.where(index == -1, -1, index + gaps[:, None])
    return batch | moved


def wider(batch: Batch, names: tuple[str, ...]) -> Batch:
    """With three more columns of padding, of other ids."""
    fills = {"labels": -100}
    more = {
        name: nn.functional.pad(batch[name], (0, 3), value=fills.get(name, 0)) for name in names
    }
    ids, mask = names[:2]
    more[ids] = torch.where(more[mask] == 1, more[ids], 17)
    return batch | more


LAYOUTS: dict[str, Callable[[Batch], Batch]] = {
    "student left": lambda batch: to_the_left(batch, STUDENT),
    "teacher left": lambda batch: to_the_left(batch, TEACHER),
    "both left": lambda batch: to_the_left(to_the_left(batch, STUDENT), TEACHER),
    "wider": lambda batch: wider(wider(batch, STUDENT), TEACHER),
    "wider left": lambda batch: to_the_left(to_the_left(wider(batch, STUDENT), STUDENT), TEACHER),
    "without the student's map": lambda b: {k: x for k, x in b.items() if k != "completion_index"},
    "maps the other way": lambda batch: batch | {x: batch[x].flip(1) for x in INDEX.values()},
}


class Laid(HintCollator):
    """Lays its batches out otherwise."""

    layout: Callable[[Batch], Batch]

    def __call__(self, rows: Any) -> Batch:
        return self.layout(super().__call__(rows))


def trainer(folder: Path, family: str, collator: HintCollator, **changes: Any) -> OPSDTrainer:
    settings = {"on_policy": False, "max_steps": 1, "alpha": 0.5} | changes
    model = models.FAMILIES[family]()
    return OPSDTrainer(
        model,
        OPSDConfig(**models.options(folder, **settings)),
        collator,
        models.problems(),
        processing_class=collator.tokenizer,
        teacher=models.FAMILIES[family](1),
    )


def gradients(folder: Path, family: str, batch: Batch, **changes: Any) -> dict[str, Tensor]:
    """The loss and its gradients, by name."""
    run = trainer(folder, family, HintCollator(models.tokenizer()), **changes)
    loss = run.compute_loss(run.model, batch)
    loss.backward()
    found = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest gradient, or of the loss."""
    assert got.keys() == want.keys()
    largest = max(want[name].abs().max() for name in want if name != "loss")
    return max(
        float((got[name] - want[name]).abs().max() / (want[name] if name == "loss" else largest))
        for name in want
    )


def made(pad_is_eos: bool = False) -> Batch:
    return HintCollator(models.tokenizer(pad_is_eos))(models.problems(4))


@pytest.mark.parametrize("reads_logits", [False, True])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_does_not_change_loss_and_gradient(
    tmp_path: Path, family: str, layout: str, pad_is_eos: bool, reads_logits: bool
) -> None:
    changes = {"label_smoothing_factor": 1e-9} if reads_logits else {}  # needs whole logits
    right = made(pad_is_eos)
    assert (right["attention_mask"] == 0).any()
    assert (right["teacher_attention_mask"] == 0).any()
    laid = LAYOUTS[layout](right)
    want = gradients(tmp_path, family, right, **changes)
    found = error(gradients(tmp_path, family, laid, **changes), want)
    print(f"error {found:.1e}")
    assert found <= TOLERANCE


def test_pad_or_end_token_as_padding_is_the_same(tmp_path: Path) -> None:
    one, other = (gradients(tmp_path, "llama", made(x)) for x in (False, True))
    assert error(other, one) <= TOLERANCE


def without_ends(batch: Batch) -> Batch:
    """End tokens cut off the rows: maps, labels and masks without them."""
    cut = {name: x.clone() for name, x in batch.items()}
    for (ids, mask, *_), index in INDEX.items():
        last = (cut[index] != -1).sum(1, keepdim=True) - 1
        at = cut[index].gather(1, last)
        assert (cut[ids].gather(1, at) == models.EOS).all()
        cut[mask].scatter_(1, at, 0)
        cut[index].scatter_(1, last, -1)
        if ids == "input_ids":
            cut["labels"].scatter_(1, at, -100)
    return cut


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_end_tokens_are_in_the_loss(tmp_path: Path, pad_is_eos: bool) -> None:
    batch = made(pad_is_eos)
    want = gradients(tmp_path, "llama", batch)
    assert error(gradients(tmp_path, "llama", without_ends(batch)), want) > 0.05
    assert [row[row != -100][-1] for row in batch["labels"]] == [models.EOS] * 4


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_label_on_padding_is_an_error(tmp_path: Path, pad_is_eos: bool) -> None:
    batch = made(pad_is_eos)
    row = int((batch["attention_mask"] == 0).any(1).nonzero()[0])
    batch["labels"][row, -1] = batch["input_ids"][row, -1]
    with pytest.raises(AlignmentError, match=f"not be padding for the student: row {row}"):
        gradients(tmp_path, "llama", batch)


@pytest.mark.parametrize("layout", ["both left", "wider"])
def test_a_collator_of_ones_own_trains_to_the_same_weights(tmp_path: Path, layout: str) -> None:
    weights = []
    for place in (lambda batch: batch, LAYOUTS[layout]):
        collator = Laid(models.tokenizer(pad_is_eos=True))
        collator.layout = place
        run = trainer(tmp_path, "gpt2", collator, max_steps=3)
        run.train()
        weights.append(models.weights(run.model))
    assert models.difference(*weights) <= 2e-6
