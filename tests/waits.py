"""Counts where a step would wait for its device: `Waits` notes who asks for the values of tensors.

On a CPU nothing waits, so every question is counted as the wait that it is on an accelerator:
numbers and truth values of tensors, boolean indices (their number is asked for), copies to the
host. Copies to the device are not seen here.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
OURS = ("hf_distill", "metal_ops")
BACKWARD = "backward of an operator"
LOADER = "loader"  # whose tensors are on the host
FETCH = str(Path("torch", "utils", "data", "_utils", "fetch.py"))
TORCH = str(Path(torch.__file__).parent)

ASKING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
ASKING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}  # of ATen
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__)  # of torch functions


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _asks(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator needs values of its arguments on the host."""
    name = func.overloadpacket.__name__
    if name in ASKING:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and any(isinstance(x, Tensor) for x in args)
    if name not in INDEXING or not any(_is_mask(x) for x in args[1]):
        return False
    # one number at the places of a mask is filled in without counting them
    fills = len(args) > 2 and args[2].numel() == 1 and len([x for x in args[1] if x is not None])
    return not (fills == 1 and not any(args[3:4]))


def _collates(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith(FETCH):
            return True
        frame = frame.f_back
    return False


def _site(frame: FrameType | None) -> str:
    """Name the innermost caller outside of torch: module and function, or a package."""
    in_backward = False
    if _collates(frame):
        return LOADER
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(TORCH):
            in_backward = in_backward or frame.f_code.co_name == "_engine_run_backward"
        elif file != __file__:
            break
        frame = frame.f_back
    if in_backward:
        return BACKWARD
    if frame is None:
        return "nobody"
    module = frame.f_globals.get("__name__", "")
    if module.partition(".")[0] in OURS:
        return f"{module}.{frame.f_code.co_qualname}"
    return module.partition(".")[0]


class _Operators(TorchDispatchMode):
    def __init__(self, sites: list[str]) -> None:
        super().__init__()
        self.sites = sites

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _asks(func, args, kwargs or {}):
            self.sites.append(_site(sys._getframe(1)))
        if func.namespace == "metal_ops":  # inside of an op of torch no mode is on
            with _Operators(self.sites):
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, sites: list[str]) -> None:
        super().__init__()
        self.sites = sites

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = func is Tensor.to and "cpu" in (*args[1:2], kwargs.get("device"))
        if moves or func in COPYING:
            self.sites.append(_site(sys._getframe(1)))
        return func(*args, **kwargs)


class Waits:
    """Holds who has waited, in order: `module.function` of the project, or a package's name."""

    def __init__(self) -> None:
        self.sites: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note waits inside the block."""
        with _Functions(self.sites), _Operators(self.sites):
            yield

    def ours(self, since: int = 0, until: int | None = None) -> dict[str, int]:
        """Count those of the project, and of the backward, by who waits."""
        sites = self.sites[since:until]
        own = (x for x in sites if x == BACKWARD or x.partition(".")[0] in OURS)
        return dict(sorted(Counter(own).items()))
