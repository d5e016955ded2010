"""Computes the ops by Metal kernels on Apple GPUs, which are compiled when first used.

Needs nothing but torch: the texts in msl/ go to `torch.mps.compile_shader`. Nobody has run them on
Apple hardware yet; what is known of them comes from executing the same texts on a CPU.
"""

import math
from functools import partial

import torch
from torch import Tensor

from metal_ops.backends import kernels
from metal_ops.backends.blocks import split
from metal_ops.backends.blocks.columns import COLUMNS
from metal_ops.backends.kernels import NUM_VALUES, HardTerm
from metal_ops.backends.metal.launch import Source, host, launch_kernel, simulated
from metal_ops.spec import DivergenceSpec

__all__ = ["backward", "forward", "hidden_states", "linear", "simulated", "sparse", "unsupported"]

# A row's values, and what the backward kernels need to form the same p and q: shift and logarithm
# of the sum, of either side. A log-sum alone has lost digits where a row is far from zero.
NUM_SAVED = NUM_VALUES + 4
MAX_WIDTH = 2**31 - 1  # columns have 32 bits, and a step more must not wrap


def _of(spec: DivergenceSpec, dtype: torch.dtype) -> tuple[Source, tuple[float, ...]]:
    """Find the text for a resolved spec, and its numbers."""
    bound = spec.clip if spec.clip_level == "vocab_entry" else None
    numbers = (1 / spec.temperature, spec.beta, 1 - spec.beta, math.inf if bound is None else bound)
    return Source("divergence", dtype, spec.kind, bound is not None), numbers


class Metal:
    """Implements `kernels.Kernels`, whose docstrings hold."""

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        values = student.new_empty(NUM_SAVED, len(student), dtype=torch.float32)
        if len(student):
            source, floats = _of(spec, student.dtype)
            launch_kernel(
                source, "divergence_forward", student, teacher, weights, values, floats=floats
            )
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
        if not len(student):
            return
        source, floats = _of(spec, student.dtype)
        name, tensors = "divergence_backward", [student, teacher, factor, values]
        if hard is not None:
            name, tensors = f"{name}_hard", [*tensors, *hard]
        if out.data_ptr() == student.data_ptr():
            name = f"{name}_in_place"
        else:
            tensors.append(out)
        launch_kernel(source, name, *tensors, floats=floats)

    def log_sums(self, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        whole, rest = logits.new_empty(2, len(logits), dtype=torch.float32)
        num_kept = ids.shape[-1]
        if not len(logits):
            return whole, rest
        if not num_kept:
            ids = ids.new_zeros(1)  # a buffer must not be empty; it is not read
        source, floats = Source("logits", logits.dtype), (1 / temperature,)
        launch_kernel(source, "log_sums", logits, ids, whole, rest, more=(num_kept,), floats=floats)
        return whole, rest

    def spread(
        self, logits: Tensor, log_sum: Tensor, factor: Tensor, temperature: float, out: Tensor
    ) -> None:
        if not len(logits):
            return
        source, floats = Source("logits", logits.dtype), (1 / temperature,)
        if out.data_ptr() == logits.data_ptr():
            launch_kernel(source, "spread_in_place", logits, log_sum, factor, floats=floats)
        else:
            launch_kernel(source, "spread", logits, log_sum, factor, out, floats=floats)

    def hidden_states(
        self, student: Tensor, teacher: Tensor, weights: Tensor, kind: str, out: Tensor | None
    ) -> Tensor:
        saved = student.new_empty(1 if kind == "mse" else 4, len(student), dtype=torch.float32)
        source = Source("hidden", student.dtype)
        if not len(student):
            return saved[0]
        launch_kernel(source, kind, student, teacher, weights, saved)
        if out is not None:
            needed = () if kind == "mse" else (saved,)
            launch_kernel(source, f"{kind}_gradient", student, teacher, weights, *needed, out)
        return saved[0]


KERNELS = Metal()

forward = partial(kernels.forward, KERNELS)
backward = partial(kernels.backward, KERNELS)
sparse = partial(kernels.sparse, KERNELS)
hidden_states = partial(kernels.hidden_states, KERNELS)
linear = partial(kernels.linear, KERNELS)
split_linear = partial(split.linear, COLUMNS)  # PyTorch has no process groups on MPS


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Say why this backend cannot take these tensors, or None when it can."""
    where = host()
    for x in (student, teacher):
        if x.device.type != where.device:
            return f"needs tensors on {where.device}, got {x.device.type}"
        if x.shape[-1] > MAX_WIDTH:
            return f"needs rows of at most {MAX_WIDTH} entries, got {x.shape[-1]}"
    if where.compile_shader is None:
        return f"torch {torch.__version__} has no torch.mps.compile_shader"
    return kernels.unsupported(student, teacher)
