"""What probes keep of the first batch, and what they read from it."""

import pytest
import torch
from accelerate import Accelerator

from hf_distill.data.sides import Side
from hf_distill.monitoring.probes import (
    PROBE_ROWS,
    PROBE_TOKENS,
    DriftProbe,
    LiveProbe,
    _first_row,
    make_probe,
    some_tokens,
)
from hf_distill.teachers import ModelTeacher, SelfTeacher
from tests.hf_distill.trainers import models

ROWS, WIDTH = 3, 30


def side(**inputs: torch.Tensor) -> Side:
    """The first row has no scored token, the others have twenty."""
    predicts = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    predicts[1:, 5:25] = True
    ids = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)
    return Side({"input_ids": ids, **inputs}, predicts)


def test_the_first_row_with_scored_tokens_is_kept():
    kept = _first_row(side())
    assert kept.inputs["input_ids"].tolist() == [list(range(WIDTH, 2 * WIDTH))]
    assert kept.predicts.nonzero().tolist() == [[0, 5 + i] for i in range(PROBE_TOKENS)]


def test_inputs_that_may_not_be_one_a_row_are_kept_whole():
    """Three images of one row, say: to take the first would leave a row without its images."""
    kept = _first_row(side(pixel_values=torch.zeros(ROWS, 2)))
    assert kept.inputs["pixel_values"].shape == (ROWS, 2)
    assert kept.predicts.shape == (ROWS, WIDTH)
    assert kept.predicts.nonzero().tolist() == [[1, 5 + i] for i in range(PROBE_TOKENS)]


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (ModelTeacher(models.llama()), DriftProbe),
        (SelfTeacher("base"), DriftProbe),
        (SelfTeacher("live"), LiveProbe),
        (SelfTeacher("lora_scale"), type(None)),
    ],
)
def test_only_frozen_teachers_are_held_to_their_start(teacher, expected):
    assert type(make_probe(teacher, None, False)) is expected


def testsome_tokens_are_spread_evenly():
    predicts = torch.zeros(PROBE_ROWS + 1, 50, dtype=torch.bool)
    predicts[:, 10:42] = True  # twice as many as are read
    predicts[1, 14:] = False
    kept = some_tokens(Side({"input_ids": torch.zeros(PROBE_ROWS + 1, 50)}, predicts))
    assert kept.predicts.shape == (PROBE_ROWS, 50)
    assert kept.predicts[0].nonzero()[:, 0].tolist() == list(range(10, 42, 2))
    assert kept.predicts[1].nonzero()[:, 0].tolist() == list(range(10, 14))
    assert len(kept.predicts[0].nonzero()) == PROBE_TOKENS


def test_a_live_teacher_moves_by_a_share_of_what_it_had_to_teach():
    """Both sides get the same shift of the logits, whose JSDs are computed here by hand."""
    model, teacher = models.llama(), SelfTeacher("live")
    teacher.prepare(Accelerator(cpu=True), model, None)
    student = side()
    student.inputs["input_ids"] = student.inputs["input_ids"] % models.VOCAB
    hinted = Side({"input_ids": student.inputs["input_ids"].flip(1)}, student.predicts)
    probe = LiveProbe(teacher, Accelerator(cpu=True), False)
    probe.keep(model, student, hinted)
    assert probe.read(model) == {"teacher_moved": 0.0}

    @torch.no_grad()
    def said(one: Side) -> torch.Tensor:
        chosen = some_tokens(one)
        return model(**chosen.inputs).logits[chosen.predicts].double().log_softmax(-1)

    def jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        m = ((p.exp() + q.exp()) / 2).log()
        return 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1).mean()

    before, gap = said(hinted), jsd(said(hinted), said(student))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight) * weight.std(correction=0))
    probe.keep(model, hinted, student)  # only the first batch counts
    found = probe.read(model)["teacher_moved"]
    assert found == pytest.approx(float(jsd(said(hinted), before) / gap), rel=1e-4)
    assert found > 0.01
