"""What the check before training says of NaN, and of modes that differ without dropout."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill.monitoring.preflight import EmptyHintError
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.test_preflight import log, trainer


class Noisy(nn.Module):
    """Changes hidden states in training: at random, or always alike."""

    def __init__(self, inner: nn.Module, random: bool) -> None:
        super().__init__()
        self.inner, self.random = inner, random

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            hidden = hidden + (torch.randn_like(hidden) if self.random else 1.0)
        return self.inner(hidden)


@pytest.mark.parametrize(
    ("random", "text"),
    [
        (True, "noise that is no dropout module: in training the student is"),
        (False, "in it the student is .* from itself in eval mode, the same each time, so this is"),
    ],
)
def test_other_differences_of_training_are_not_called_dropout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, random: bool, text: str
) -> None:
    model: Any = models.llama()
    model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp, random)
    found = log(caplog, trainer(tmp_path, model))
    assert re.search(text, found)
    assert "dropout: in training" not in found


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_is_named_and_not_its_consequences(tmp_path: Path, side: str) -> None:
    run: Any = trainer(tmp_path, models.llama())
    broken = run.model if side == "student" else run.teacher._copy
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(EmptyHintError, match=rf"numbers: the {side}'s logits are NaN or inf"):
        run._check_empty_hint()
