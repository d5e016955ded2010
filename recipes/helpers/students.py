"""Students that are made from their teacher."""

import copy
from typing import cast

from torch import nn
from transformers import PreTrainedModel


def keep_layers(teacher: PreTrainedModel, every: int) -> PreTrainedModel:
    """Copy a model with only its first, and each `every`-th layer after it.

    Embeddings, norms and head are the teacher's. The copy shares no weights with it.

    Args:
        teacher: a decoder whose blocks are `model.layers`, as most have.
        every: 1 keeps all layers.

    Raises:
        ValueError: every is not in [1, number of layers], or the model has no `model.layers`.
    """
    layers = getattr(getattr(teacher, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"the model must have its blocks in model.layers: {type(teacher)}")
    if not 1 <= every <= len(layers):
        raise ValueError(f"every must be in [1, {len(layers)}], got {every}")
    kept = list(range(0, len(layers), every))
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in kept]
    student = type(teacher)(config)
    names = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    state = {}
    for name, value in teacher.state_dict().items():
        block = ".".join(name.split(".")[:3]) + "."
        if not name.startswith("model.layers."):
            state[name] = value
        elif block in names:
            state[names[block] + name.removeprefix(block)] = value
    student.load_state_dict(state)
    dtype = next(teacher.parameters()).dtype
    return cast(PreTrainedModel, nn.Module.to(student, dtype=dtype))
