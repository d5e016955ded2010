"""Arguments of a kernel by the rules of torch.mps.compile_shader.

Where torch would hand the GPU bytes that the kernel reads as something else, this raises.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.metal_ops.mslsim.signatures import Kernel, Parameter

# how a kernel may call the elements of a tensor
TENSOR_TYPES = {
    torch.float32: ("float",),
    torch.float16: ("half",),
    torch.bfloat16: ("bfloat",),
    torch.int64: ("long", "int64_t"),
    torch.int32: ("int", "int32_t"),
    torch.int16: ("short", "int16_t"),
    torch.int8: ("char", "int8_t"),
    torch.uint8: ("uchar", "uint8_t", "bool"),
    torch.bool: ("bool", "uchar", "uint8_t"),
    torch.uint16: ("ushort", "uint16_t"),
    torch.uint32: ("uint", "uint32_t"),
    torch.uint64: ("ulong", "uint64_t"),
}
# what torch makes of Python numbers, for each of its `arg_casts`; None is without
CASTS: dict[str | None, tuple[torch.dtype, tuple[str, ...]]] = {
    "int32": (torch.int32, ("int", "int32_t", "uint", "uint32_t")),
    "int16": (torch.int16, ("short", "int16_t", "ushort", "uint16_t")),
    "int8": (torch.int8, ("char", "int8_t")),
    "uint8": (torch.uint8, ("uchar", "uint8_t", "bool")),
    "fp16": (torch.float16, ("half",)),
    "bf16": (torch.bfloat16, ("bfloat",)),
}
MAX_BYTES = 4096  # of numbers in one argument


class Buffer(ctypes.Structure):
    """`Buffer` of shims/cpu/state.h."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("element", ctypes.c_size_t),
        ("pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("writable", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


class Bound(NamedTuple):
    """An argument in memory; `kept` owns it."""

    kept: Tensor
    writable: bool
    name: str

    @property
    def span(self) -> range:
        """Addresses from the first element to behind the last."""
        x = self.kept
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        return range(x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size())

    def buffer(self) -> Buffer:
        x, size = self.kept, self.kept.element_size()
        gaps = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) > x.shape[1]
        pitch, width = (x.stride(0) * size, x.shape[1] * size) if gaps else (0, 0)
        span = self.span
        name = self.name.encode()
        return Buffer(span.start, len(span), size, pitch, width, int(self.writable), name)


def _tensor(x: Tensor, p: Parameter, where: str) -> Tensor:
    names = TENSOR_TYPES.get(x.dtype)
    if names is None:
        raise TypeError(f"{where}: MPS has no {x.dtype}")
    if p.base not in names:
        raise TypeError(f"{where} is {p.base}, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{where} is empty: MPS would bind no buffer")
    if p.space == "constant" and x.storage_offset() * x.element_size() % 4:
        raise ValueError(f"{where}: constant memory starts at multiples of 4 bytes")
    return x


def _numbers(value: Any, cast: str | None, p: Parameter, where: str) -> Tensor:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
    if not all(isinstance(v, int | float) for v in values):
        raise RuntimeError("Unsupported argument type")
    whole = isinstance(values[0], int)  # torch looks at the first only
    if any(isinstance(v, int) != whole for v in values):
        raise TypeError(f"{where}: integers and floats in one list, {values}")
    plain = (torch.int64, ("long", "int64_t")) if whole else (torch.float32, ("float",))
    dtype, names = CASTS[cast] if cast else plain
    if p.space != "constant" and not p.constant:
        raise TypeError(f"{where}: numbers cannot be bound to memory that the kernel may write")
    if p.base not in names:
        raise TypeError(f"{where} is {p.base}, torch binds {values} as {names[0]}")
    bound = torch.tensor(values, dtype=dtype)
    if bound.nbytes > MAX_BYTES:
        raise ValueError(f"{where}: {bound.nbytes} bytes of numbers, at most {MAX_BYTES}")
    return bound


def _refuse_overlaps(kernel: Kernel, bound: Sequence[Bound]) -> None:
    """Apple's compiler takes it that buffers do not overlap."""
    for i, a in enumerate(bound):
        for j, b in enumerate(bound):
            apart = a.span.stop <= b.span.start or b.span.stop <= a.span.start
            if i != j and a.writable and not apart:
                raise ValueError(f"{kernel.name}: {a.name}, which is written, overlaps {b.name}")


def bind(kernel: Kernel, args: Sequence[Any], casts: str | dict[int, str] | None) -> list[Bound]:
    """The arguments in the order of the buffers."""
    if len(args) != len(kernel.buffers):
        raise TypeError(f"{kernel.name} has {len(kernel.buffers)} buffers, got {len(args)}")
    bound = []
    for i, (arg, p) in enumerate(zip(args, kernel.buffers, strict=True)):
        where = f"{kernel.name}: argument {i} ({p.name})"
        if isinstance(arg, Tensor):
            memory = _tensor(arg, p, where)
        else:
            cast = casts.get(i) if isinstance(casts, dict) else casts
            memory = _numbers(arg, cast, p, where)
        bound.append(Bound(memory, not p.constant, p.name))
    _refuse_overlaps(kernel, bound)
    return bound
