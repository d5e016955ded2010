"""The Triton backend for tests whose tensors are on the CPU: there and back, if there is a GPU."""

import sys
from typing import Any

import torch
from torch.utils import _pytree

from metal_ops.backends import triton
from tests.metal_ops.triton.interpreter import DEVICE

unsupported = triton.unsupported


def _to(device: str, tree: Any) -> Any:
    return _pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), tree)


def _moved(function: Any) -> Any:
    return lambda *args: _to("cpu", function(*_to(DEVICE, args)))


forward = _moved(triton.forward)
backward = _moved(triton.backward)
sparse = _moved(triton.sparse)
linear = _moved(triton.linear)
hidden_states = _moved(triton.hidden_states)

MODULE = sys.modules[__name__]
