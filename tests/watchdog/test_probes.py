"""The row that a drift probe keeps."""

import pytest
import torch

from hf_distill.alignment import Side
from hf_distill.probes import PROBE_TOKENS, DriftProbe, _first_row, make_probe
from hf_distill.teachers import ModelTeacher, SelfTeacher
from tests.trainers import models

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
        (SelfTeacher("live"), type(None)),
    ],
)
def test_only_frozen_teachers_are_held_to_their_start(teacher, expected):
    assert type(make_probe(teacher, None)) is expected
