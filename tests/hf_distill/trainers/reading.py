"""Trainers that read their models by logits, though they could read hidden states."""

import pytest

from hf_distill import DistillTrainer, OPSDTrainer
from hf_distill.run import Run
from hf_distill.trainers import distill_trainer

REFUSAL = "the test asks for logits"


class ReadsLogits(DistillTrainer):
    def _set_up(self, run: Run) -> None:
        with pytest.MonkeyPatch.context() as patch:
            only_logits(patch)
            super()._set_up(run)
        assert self._reader._refusal == REFUSAL


class OPSDReadsLogits(ReadsLogits, OPSDTrainer):
    pass


def only_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that are made from now on read logits."""
    monkeypatch.setattr(distill_trainer, "hidden_states_refusal", lambda *_: REFUSAL)
