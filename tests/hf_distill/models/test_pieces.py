"""Names and memory of parameters in pieces.

Engines cut and join them in `tests/hf_distill/engines`.
"""

import torch
from torch import nn

from hf_distill.models import pieces


def test_names_without_wrappers() -> None:
    name = "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.weight"
    assert pieces.plain_name(name) == "model.layers.0.mlp.weight"


def test_a_whole_parameter_is_its_own_piece() -> None:
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert pieces.piece(parameter).data_ptr() == parameter.data_ptr()
    assert pieces.whole_shape(parameter) == (2, 3)
    made = pieces.cut(torch.ones(2, 3), parameter, flat=False)
    assert torch.equal(pieces.join(made, parameter, parameter.shape, flat=False), torch.ones(2, 3))
    assert not pieces.lies_in_pieces(nn.Linear(2, 2))


def test_a_parameter_of_zero_3_has_its_piece_beside_it() -> None:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_shape = torch.arange(3.0), torch.Size((5, 1))  # pyright: ignore
    assert pieces.piece(parameter).data_ptr() == parameter.ds_tensor.data_ptr()  # pyright: ignore
    assert pieces.whole_shape(parameter) == (5, 1)
    model = nn.Linear(2, 2)
    assert not pieces.lies_flat(model)
    model.weight = parameter
    assert pieces.lies_flat(model)
