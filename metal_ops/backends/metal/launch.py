"""Composes the texts in msl/, compiles them, checks every argument and launches kernels.

torch binds arguments by position and looks at no dtype, size or stride, so all of that is done
here, by the parameters the text declares. Shapes: N rows of `width` entries.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metal_ops.backends import KERNEL_DEVICES
from metal_ops.backends.errors import KernelError
from metal_ops.spec import KINDS

TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
SCALARS = {"float": torch.float32, "int": torch.int32, "long": torch.int64}
SIMD = 32  # threads of a simdgroup, as the texts assume
READS = 4  # neighbours a thread reads at a time
# A dispatch that runs for long on a GPU that also drives a display is killed, and no error says so.
MAX_ENTRIES = 2**31
MAX_THREADS = 2**32 - 1  # of a dispatch: positions in the grid have 32 bits


class Host(NamedTuple):
    """Names what compiles MSL, and the device whose tensors it takes."""

    compile_shader: Callable[[str], Any]
    device: str


_host = Host(getattr(torch.mps, "compile_shader", None), "mps")  # pyright: ignore[reportArgumentType]


def host() -> Host:
    """Return the host in use."""
    return _host


@contextmanager
def simulated(compile_shader: Callable[[str], Any]) -> Iterator[None]:
    """Run kernels for tensors on the CPU, by another `torch.mps.compile_shader`."""
    global _host
    before, _host = _host, Host(compile_shader, "cpu")
    KERNEL_DEVICES["metal"].append("cpu")
    try:
        yield
    finally:
        _host = before
        KERNEL_DEVICES["metal"].remove("cpu")


class Source(NamedTuple):
    """Names a text: a file of kernels, the dtype of the rows, and for divergences the kind."""

    file: str
    dtype: torch.dtype
    kind: str = ""
    entries: bool = False  # of which some may be clipped


def sources() -> Iterator[Source]:
    """Yield the source of every text there is."""
    for dtype in TYPES:
        for kind in KINDS:
            for entries in (False, True):
                yield Source("divergence", dtype, kind, entries)
        yield Source("logits", dtype)
        yield Source("hidden", dtype)


@functools.cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "msl" / f"{name}.metal").read_text()


@functools.cache
def text(source: Source) -> str:
    """Compose the MSL of a source."""
    parts = [
        "#include <metal_stdlib>\nusing namespace metal;\n",
        f"using T = {TYPES[source.dtype]};\n",
        _file("common"),
    ]
    if source.kind:
        parts += [
            f"constant constexpr bool kEntries = {'true' if source.entries else 'false'};\n",
            _file("terms"),
            f"using Kind = {source.kind};\n",
        ]
    return "".join([*parts, _file(source.file)])


class Parameter(NamedTuple):
    """Describes a buffer of a kernel."""

    type: str
    name: str
    list: bool  # in the constant address space: a Python list
    written: bool


KERNEL = re.compile(r"^kernel void (\w+)\((.*?)\) \{", re.MULTILINE | re.DOTALL)
BUFFER = re.compile(r"(device|constant)( const)? (\w+)\* (\w+) \[\[buffer\(\d+\)\]\]")


@functools.cache
def parameters(source: Source, kernel: str) -> tuple[Parameter, ...]:
    """List the buffers of a kernel, in order."""
    declared = dict(KERNEL.findall(text(source)))[kernel]
    return tuple(
        Parameter(type_, name, space == "constant", space == "device" and not const)
        for space, const, type_, name in BUFFER.findall(declared)
    )


class Kernel(NamedTuple):
    """Holds a compiled kernel and the largest group it can run in."""

    call: Callable[..., None]
    max_group: int


@functools.cache
def _library(where: Host, source: Source) -> Any:
    return where.compile_shader(text(source))


@functools.cache
def _kernel(where: Host, source: Source, name: str) -> Kernel:
    try:
        call = getattr(_library(where, source), name)
        limit, width = call.max_threads_per_threadgroup, call.thread_execution_width
    except (SyntaxError, RuntimeError) as error:  # the text, or the pipeline made of it
        raise KernelError(_full_name(source, name), str(error)) from error
    if width != SIMD:
        raise KernelError(_full_name(source, name), f"needs simdgroups of {SIMD}, got {width}")
    if limit < SIMD:
        raise KernelError(_full_name(source, name), f"needs groups of {SIMD}, limit is {limit}")
    return Kernel(call, limit // SIMD * SIMD)


def _full_name(source: Source, kernel: str) -> str:
    parts = [kernel, source.kind, "entries" if source.entries else "", TYPES[source.dtype]]
    return " ".join(filter(None, parts))


def group_size(width: int, limit: int) -> int:
    """Count threads for a row: enough to read it in one step within the limit; whole simdgroups."""
    simdgroups = -(-width // (READS * SIMD))
    return min(limit, SIMD * max(1, simdgroups))


def _extent(x: Tensor) -> tuple[int, int, int]:
    """Return storage, first byte and the byte behind the last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    start = int(x.storage_offset()) * x.element_size()
    return x.untyped_storage().data_ptr(), start, start + int(last + 1) * x.element_size()


def _check_tensor(
    p: Parameter, x: Tensor, where: Host, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    want = dtype if p.type == "T" else SCALARS[p.type]
    if x.device.type != where.device:
        raise ValueError(f"{p.name} must be on {where.device}, got {x.device}")
    if x.dtype != want:
        raise TypeError(f"{p.name} must be {want}, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{p.name} must not be empty, got {tuple(x.shape)}")
    if p.type != "T":
        if not x.is_contiguous():
            raise ValueError(f"{p.name} must be contiguous, got strides {x.stride()}")
        return
    if tuple(x.shape) != shape:
        raise ValueError(f"{p.name} must be {shape}, got {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{p.name} must have contiguous rows, got strides {x.stride()}")
    if p.written and x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"rows of {p.name} must not overlap, got strides {x.stride()}")


def _check_overlap(declared: tuple[Parameter, ...], tensors: tuple[Tensor, ...]) -> None:
    """Check that no written buffer is part of another argument, as Apple's compiler assumes."""
    extents = [_extent(x) for x in tensors]
    for i, p in enumerate(declared):
        if not p.written:
            continue
        for j, q in enumerate(declared):
            (a, a0, a1), (b, b0, b1) = extents[i], extents[j]
            if i != j and a == b and a0 < b1 and b0 < a1:
                raise ValueError(f"{p.name} is written and must not overlap {q.name}")


def launch_kernel(
    source: Source,
    name: str,
    *tensors: Tensor,
    more: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
) -> None:
    """Run a kernel over all rows of its first tensor [N, width].

    Args:
        source: the text.
        name: the kernel.
        *tensors: its buffers but for the last, `ints`, and perhaps `floats`.
        more: what follows the sizes and strides in `ints`.
        floats: the list, for a kernel that takes one.

    Raises:
        KernelError: it does not compile, or needs another device.
        TypeError: an argument's type is not what the text declares.
        ValueError: an argument's device, shape, strides or memory are not what a kernel may get.
    """
    where, declared = host(), parameters(source, name)
    lists = [[p.type for p in declared if p.list], ["long", "float"][: 1 + bool(floats)]]
    buffers = tuple(p for p in declared if not p.list)
    if lists[0] != lists[1] or len(buffers) != len(tensors):
        raise TypeError(f"{name} takes {declared}, got {len(tensors)} tensors, {lists[1]} lists")
    rows, width = tensors[0].shape
    for p, x in zip(buffers, tensors, strict=True):
        _check_tensor(p, x, where, source.dtype, (rows, width))
    _check_overlap(buffers, tensors)
    kernel = _kernel(where, source, name)
    group = group_size(width, kernel.max_group)
    strides = [x.stride(0) for p, x in zip(buffers, tensors, strict=True) if p.type == "T"]
    step = max(1, min(MAX_ENTRIES // width, MAX_THREADS // group))
    for first in range(0, rows, step):
        ints = [int(i) for i in (width, rows, first, *strides, *more)]
        numbers = [[float(f) for f in floats]] if floats else []
        threads = group * min(step, rows - first)
        kernel.call(*tensors, ints, *numbers, threads=threads, group_size=group)
