"""Whether a model with code of its own keeps the logits of a mask's positions is looked at."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from tests.hf_distill.models import numbering


class KeepsOneList(LlamaForCausalLM):
    """A model that takes one list of positions for all rows."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Any, attention_mask: Any = None, logits_to_keep: Any = None
    ) -> Any:
        outputs: Any = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if logits_to_keep is not None:
            outputs.logits = self.kept(outputs.logits, logits_to_keep)
        return outputs

    def kept(self, logits: Tensor, positions: Tensor) -> Tensor:
        return logits[:, positions]


class KeepsTheNext(KeepsOneList):
    """A model that keeps as many logits as the mask has, but those of the next positions."""

    def kept(self, logits: Tensor, positions: Tensor) -> Tensor:
        return logits[positions.roll(1, 1)]


@pytest.mark.parametrize("kind", [KeepsOneList, KeepsTheNext])
def test_a_model_that_does_not_is_read_by_all_logits(kind: type[KeepsOneList]) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**numbering.SIZES)).eval()
    ids = torch.randint(5, 90, (2, 9))
    predicts = torch.rand(2, 9) < 0.5
    with torch.no_grad():
        want = model(ids).logits[predicts]
        found = Reader("student").logits(model, Side({"input_ids": ids}, predicts))
    torch.testing.assert_close(found, want)
