"""How a model's weights are stored."""

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_distill.models.precision import Stored, stored
from tests.hf_distill.trainers import models


def test_how_weights_are_stored() -> None:
    """Of a quantized model a few weights are in float32, of one of subclasses they seem to be."""
    model = models.llama()
    assert stored(model) == Stored(torch.float32, False)
    for layer in model.model.layers:
        layer.mlp.bfloat16()
        layer.self_attn.bfloat16()
    assert stored(model) == Stored(torch.bfloat16, False)
    packed = TwoTensor(torch.zeros(3, 3), torch.zeros(3, 3))
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(packed)
    assert stored(linear) == Stored(torch.float32, True)
    assert str(stored(linear)) == "float32, quantized"


def test_it_is_the_dtype_of_most_elements_not_of_most_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False).bfloat16(), nn.LayerNorm(64))
    assert stored(model) == Stored(torch.bfloat16, False)
