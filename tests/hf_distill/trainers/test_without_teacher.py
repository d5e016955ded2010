"""What the loss of a trainer without a teacher is divided by."""

import torch

from hf_distill.trainers.without_teacher import ModelLoss
from tests.hf_distill.trainers import models


def test_labels_that_are_shifted_already_are_all_counted() -> None:
    lm = models.llama()
    settings = {"accepts_count": True, "sharded": False}
    own = ModelLoss(lm, "labels", has_users_loss=lambda: False, **settings)
    labels = torch.arange(5, 11)[None]
    assert own.labelled({"labels": labels}) == 5
    assert own.labelled({"labels": labels, "shift_labels": labels}) == 6
