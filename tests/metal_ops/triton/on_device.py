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
split_linear = _moved(triton.split_linear)
hidden_states = _moved(triton.hidden_states)


class _Columns:
    """Triton's `split.SplitKernels`, there and back."""

    normalisers = staticmethod(_moved(triton.KERNELS.normalisers))
    log_sum = staticmethod(_moved(triton.KERNELS.log_sum))
    sums = staticmethod(_moved(triton.KERNELS.sums))
    again = staticmethod(triton.KERNELS.again)

    def backward(self, *args: Any) -> None:
        *given, out = args
        there = _to(DEVICE, out)
        triton.KERNELS.backward(*_to(DEVICE, tuple(given)), there)
        out.copy_(there)


COLUMNS: Any = _Columns()

MODULE = sys.modules[__name__]
