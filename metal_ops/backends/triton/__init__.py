"""Computes the ops by Triton kernels on NVIDIA and AMD ("cuda" to torch) and Intel GPUs ("xpu").

With TRITON_INTERPRET=1, set before Triton is imported, tensors on the CPU are taken too, for tests:
the interpreter is slower than the chunked backend by orders of magnitude.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metal_ops.backends import kernels
from metal_ops.backends.blocks import split
from metal_ops.backends.blocks.rows import Wanted
from metal_ops.backends.errors import KernelError
from metal_ops.backends.kernels import HardTerm
from metal_ops.spec import DivergenceSpec

__all__ = [
    "backward",
    "forward",
    "hidden_states",
    "linear",
    "sparse",
    "split_linear",
    "unsupported",
]

DEVICES = ("cuda", "xpu")
MIN_BLOCK, MAX_BLOCK = 8, 2048  # columns of a row at a time, see `_block`
COLUMNS_PER_WARP = 256  # 8 a lane
REGISTERS = 128  # a thread, at most: then two programs of 8 warps fit an NVIDIA multiprocessor
LOGITS, HIDDEN = "rows", "hidden"  # modules, imported with Triton at first use


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Say why this backend cannot take these tensors, or None when it can."""
    device = student.device
    if device.type not in DEVICES and not (device.type == "cpu" and _interpreting()):
        return f"needs tensors on {' or '.join(DEVICES)}, got {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 0):
            return f"needs compute capability 7.0 or higher, got {capability[0]}.{capability[1]}"
    return kernels.unsupported(student, teacher)


@functools.cache
def _units(device: torch.device) -> int:
    """Count what runs programs side by side, up to a factor: multiprocessors; 0 if interpreted."""
    if device.type == "cpu":
        return 0
    properties: Any = getattr(torch, device.type).get_device_properties(device)
    if device.type == "xpu":
        return properties.gpu_subslice_count
    return properties.multi_processor_count


def _block(columns: int) -> tuple[int, int]:
    """Return (columns a step, warps a program), with 8 columns a thread.

    The kernels for sums then need 48 to 128 registers (ptxas, sm_90 and sm_100): with programs of 8
    warps two to five fit a multiprocessor, which have 16 KiB of 16-bit logits under way, or more.
    """
    power = 1 << max(columns - 1, MIN_BLOCK - 1).bit_length()
    block = min(power, MAX_BLOCK)
    return block, max(1, block // COLUMNS_PER_WARP)


def _fold(dtype: torch.dtype) -> int:
    """Return how many columns a thread loads at a time: 16 bytes."""
    return 16 // dtype.itemsize


def _splits(rows: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return (programs a row, columns of each): several if rows leave multiprocessors idle.

    Their number is a power of two, so that every GPU compiles the same few kernels, and at most
    that of the blocks.
    """
    blocks, units = -(-columns // block), _units(device)
    if rows == 0 or rows >= 2 * units:
        return 1, blocks * block
    wanted = min(blocks, 4 * units // rows)
    splits = 1 << (wanted.bit_length() - 1)
    return splits, -(-blocks // splits) * block


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _scalars(spec: DivergenceSpec) -> tuple[float, float, float, float]:
    """Return 1 / temperature, beta, 1 - beta, clip as float32, which the kernels know."""
    bound = spec.clip if spec.clip is not None else 0.0
    exact = (1 / spec.temperature, spec.beta, 1 - spec.beta, bound)
    inv_t, beta, rest, bound = map(_float32, exact)
    return inv_t, beta, rest, bound


def _cuts(spec: DivergenceSpec) -> bool:
    return spec.clip is not None and spec.clip_level == "vocab_entry"


def _compiler(device: torch.device) -> str:
    """Name Triton's backend for a device; none where it interprets."""
    if device.type == "cuda":
        return "hip" if torch.version.hip else "cuda"
    return "" if device.type == "cpu" else device.type


def _limits(name: str) -> dict[str, int]:
    """Return the options that hold a Triton backend's compiler to what the grid counts on."""
    return {"maxnreg": REGISTERS} if name == "cuda" else {}


def _launch(
    module: str, kernel: str, grid: tuple[int, ...], args: tuple[Any, ...], warps: int, **meta: Any
) -> None:
    """Run a kernel of a module on the device of its first argument, a tensor."""
    if 0 in grid:
        return
    device = args[0].device
    guard = contextlib.nullcontext()
    if device.type in DEVICES:
        guard = getattr(torch, device.type).device(device)
    try:
        with guard:
            function = getattr(importlib.import_module(f"{__package__}.{module}"), kernel)
            function[grid](*args, **meta, num_warps=warps, **_limits(_compiler(device)))
    except Exception as error:  # of Triton, ptxas, a C compiler or the driver
        raise KernelError(f"triton {kernel}", f"{type(error).__name__}: {error}") from error


class _Triton:
    """Implements `kernels.Kernels` and `split.SplitKernels`, whose docstrings hold."""

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        return self._forward(student, teacher, weights.contiguous(), None, spec)

    def sums(
        self,
        student: Tensor,
        teacher: Tensor,
        normalisers: Tensor,
        spec: DivergenceSpec,
        wanted: Wanted,
    ) -> Tensor:
        # always exact and with statistics, which cost no pass; logits are left as they are
        ones = torch.ones_like(normalisers[0])
        return self._forward(student, teacher, ones, normalisers.contiguous(), spec)

    def again(self, values: Tensor, normalisers: Tensor, spec: DivergenceSpec) -> Tensor | None:
        return None

    def normalisers(self, student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
        ones = student.new_ones(len(student), dtype=torch.float32)
        parts = self._normalise(student, teacher, ones, spec)
        inv_t = 1 / spec.temperature
        joined = [split.join_normalisers(top, total, inv_t) for top, total in parts]
        return torch.stack([x for pair in joined for x in pair])

    def log_sum(self, logits: Tensor) -> Tensor:
        nothing = logits.new_empty(len(logits), 0, dtype=torch.int32)
        return self.log_sums(logits, nothing, 1.0)[0]

    def _normalise(
        self, student: Tensor, teacher: Tensor, weights: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        """Return (largest, sum) of each split of the student's and the teacher's rows.

        They are [2, 2, splits, N].
        """
        rows, vocab = student.shape
        block, warps = _block(vocab)
        splits, columns = _splits(rows, vocab, block, student.device)
        partials = weights.new_empty(4, rows, splits)
        sizes = (vocab, student.stride(0), teacher.stride(0), columns, _scalars(spec)[0])
        inputs, meta = (student, teacher, weights, partials), {"SPLITS": splits, "BLOCK": block}
        _launch(LOGITS, "normalise", (rows, splits), (*inputs, *sizes), warps, **meta)
        return partials.view(2, 2, rows, splits).transpose(2, 3)

    def _forward(
        self,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        normalisers: Tensor | None,
        spec: DivergenceSpec,
    ) -> Tensor:
        rows, vocab = student.shape
        block, warps = _block(vocab)
        splits, columns = _splits(rows, vocab, block, student.device)
        inv_t, *numbers = _scalars(spec)
        values = weights.new_empty(kernels.NUM_VALUES, rows, splits)
        partials, given = values, normalisers is not None
        if normalisers is not None:
            partials = normalisers
        elif splits > 1:
            partials = self._normalise(student, teacher, weights, spec)
            partials = partials.transpose(2, 3)  # as it lies in memory
        _launch(
            LOGITS,
            "forward",
            (rows, splits),
            (
                *(student, teacher, weights, partials, values),
                *(vocab, student.stride(0), teacher.stride(0), columns, inv_t),
                *numbers,
            ),
            warps,
            KIND=spec.kind,
            CLIP=_cuts(spec),
            SPLITS=splits,
            GIVEN=given,
            BLOCK=block,
            FOLD=_fold(student.dtype),
        )
        if splits == 1:
            return values[:, :, 0]
        values = values.sum(-1)
        values[kernels.AGREEMENT :].clamp_(max=1)
        return values

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        factor: Tensor,
        values: Tensor,
        spec: DivergenceSpec,
        hard: HardTerm | None,
        out: Tensor,
    ) -> None:
        (rows, vocab), factor = student.shape, factor.contiguous()
        block, warps = _block(vocab)
        terms = (factor, factor, factor)  # not read
        if hard is not None:
            terms = (hard.labels.contiguous(), hard.log_sum.contiguous(), hard.share.contiguous())
        strides = (vocab, student.stride(0), teacher.stride(0), out.stride(0))
        _launch(
            LOGITS,
            "backward",
            (rows, -(-vocab // block)),
            (student, teacher, factor, values.contiguous(), *terms, out, *strides, *_scalars(spec)),
            warps,
            KIND=spec.kind,
            CLIP=_cuts(spec),
            HARD=hard is not None,
            BLOCK=block,
        )

    def log_sums(self, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        (rows, vocab), kept = logits.shape, ids.shape[-1] > 0
        block, warps = _block(vocab)
        splits, columns = _splits(rows, vocab, block, logits.device)
        inv_t = _float32(1 / temperature)
        result = logits.new_empty(2, rows, dtype=torch.float32)
        bits = _bits(ids, vocab) if kept else result  # or nothing
        partials = result if splits == 1 else result.new_empty(4, rows, splits)
        inputs = (logits, bits, partials, result, vocab, logits.stride(0), bits.shape[-1], columns)
        meta = {"KEPT": kept, "SPLITS": splits, "BLOCK": block}
        _launch(LOGITS, "log_sums", (rows, splits), (*inputs, inv_t), warps, **meta)
        if splits > 1:
            _launch(LOGITS, "join_log_sums", (rows,), (partials, result, inv_t), 1, SPLITS=splits)
        return result[0], result[1]

    def spread(
        self, logits: Tensor, log_sum: Tensor, factor: Tensor, temperature: float, out: Tensor
    ) -> None:
        rows, vocab = logits.shape
        block, warps = _block(vocab)
        vectors, strides = (log_sum.contiguous(), factor.contiguous()), (logits.stride(0),)
        args = (logits, *vectors, out, vocab, *strides, out.stride(0), _float32(1 / temperature))
        _launch(LOGITS, "spread", (rows, -(-vocab // block)), args, warps, BLOCK=block)

    def hidden_states(
        self, student: Tensor, teacher: Tensor, weights: Tensor, kind: str, out: Tensor | None
    ) -> Tensor:
        (rows, size), weights = student.shape, weights.contiguous()
        block, warps = _block(size)
        loss = weights.new_empty(rows)
        grad = loss if out is None else out  # or nothing
        strides = (student.stride(0), teacher.stride(0), grad.stride(0))
        args = (student, teacher, weights, grad, loss, size, *strides)
        meta = {"GRAD": out is not None, "BLOCK": block}
        _launch(HIDDEN, kind, (rows,), args, warps, **meta)
        return loss


def _bits(ids: Tensor, vocab: int) -> Tensor:
    """Return the ids of `Kernels.log_sums` as a set: [N, words] int32, an entry a bit.

    A kernel then looks an entry up in one load, however many ids there are; the words are 1 / 16
    of the size of 16-bit logits. Padding lands behind the last entry, where nothing looks.
    """
    words = torch.zeros(len(ids), vocab // 32 + 1, dtype=torch.int32, device=ids.device)
    ids = ids.clamp(max=vocab)
    ones = torch.ones_like(ids).bitwise_left_shift_(ids & 31)
    ones[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], 0)  # so that a sum is the union
    return words.scatter_add_(1, (ids >> 5).long(), ones)


KERNELS = _Triton()

forward = partial(kernels.forward, KERNELS)
backward = partial(kernels.backward, KERNELS)
sparse = partial(kernels.sparse, KERNELS)
linear = partial(kernels.linear, KERNELS)
split_linear = partial(split.linear, KERNELS)
hidden_states = partial(kernels.hidden_states, KERNELS)
