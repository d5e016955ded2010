"""Tables of learnt positions end: longer rows are refused, padding may stand behind the last."""

import pytest
import torch

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from tests.hf_distill.models import numbering
from tests.hf_distill.models.test_positions import TOLERANCE, apart, read


@pytest.mark.parametrize("family", numbering.FAMILIES)
def test_learnt_positions_end(family: str) -> None:
    limit = numbering.LEARNT.get(family)
    model, reader = numbering.make(family), Reader("teacher")
    ids = torch.randint(5, 90, (2, (limit or 64) + 1))
    mask = torch.ones_like(ids)
    mask[:, -1:] = 0
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    if family in ("gpt2", "opt", "bert", "biogpt"):  # padding alone stands out
        reader.forward_inputs(model, {"input_ids": ids, "attention_mask": mask})
    if limit is not None:
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": everywhere}):
            message = rf"teacher: a row has {limit + 1} tokens, but the learnt .* for {limit}: sho"
            with pytest.raises(ValueError, match=message):
                reader.logits(model, Side(inputs, everywhere))
    elif family != "gptj":  # its sinusoids are a table too, that the library does not extend
        reader.logits(model, Side({"input_ids": ids}, everywhere))


@pytest.mark.parametrize("family", ["gpt2", "bert", "biogpt"])
def test_padding_may_stand_behind_the_last(family: str) -> None:
    """Also where the batch has padding on the left, so that the model is given positions."""
    model, limit = numbering.make(family), numbering.LEARNT[family]
    ids = torch.randint(5, 90, (2, limit + 3))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[0, 10:] = mask[1, limit:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert apart(read(model, batch), numbering.alone(model, batch)) < TOLERANCE
