"""A trial of how a model counts positions is given what the batch has, and nothing else."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.position_trials import one_row
from tests.hf_distill.models import numbering


class OfIdsAlone(LlamaForCausalLM):
    """A model with code of its own, which takes no mask."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor
    ) -> CausalLMOutputWithPast:
        return super().forward(input_ids=input_ids)  # pyright: ignore[reportArgumentType]


def test_a_model_that_takes_no_mask_is_given_none() -> None:
    torch.manual_seed(0)
    model = OfIdsAlone(LlamaConfig(**numbering.SIZES)).eval()
    ids = torch.randint(5, 90, (2, 9))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        want = model(input_ids=ids).logits[everywhere]
        found = Reader("student").logits(model, Side({"input_ids": ids}, everywhere))
    assert torch.equal(found, want)


def test_it_has_what_the_batch_has_for_its_row() -> None:
    model, batch = numbering.make("llama"), numbering.batch("right")
    batch = {name: x.flip(0) for name, x in batch.items()}  # the longest row is the last
    inputs = batch | {"task_ids": torch.tensor([7, 8, 9])}
    assert one_row(model, model, inputs, "input_ids").others["task_ids"].tolist() == [9]
