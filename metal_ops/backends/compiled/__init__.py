"""Computes the ops by graphs that torch.compile makes: C++ on a CPU, Triton or Metal on a GPU.

The rows are walked as `chunked` walks them, a block at a time; a block over the full vocabulary is
one graph, with the same terms. `chunked` itself does the rest: supports, sparse teachers, hidden
states, heads in pieces.
"""

import functools
import importlib.util
import os
import shutil
import sys
from functools import partial

import torch
from torch import Tensor

from metal_ops.backends import chunked, kernels
from metal_ops.backends.blocks import linear as from_hidden
from metal_ops.backends.blocks.block import block_divergence
from metal_ops.backends.blocks.linear import BlockLoss, LossSettings, torch_block_loss
from metal_ops.backends.blocks.rows import Buffers
from metal_ops.backends.blocks.terms import MIXTURES
from metal_ops.backends.compiled import graphs, rows
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

# Kinds for which `blocks.full` has a path of few passes, that a graph does not beat.
SHORT = ("forward_kl", "reverse_kl", "soft_ce")
# How many blocks of `chunked` a graph is given at a time. It gets its memory at each call: where
# Inductor's C++ takes all loops of a row together that is for one row, else for all of them.
FEW_BLOCKS, MANY_BLOCKS = 4, 16


@functools.cache
def _no_compiler(device: str) -> str | None:
    """Say what is missing to compile for a device, as far as that is known without trying."""
    if device == "cpu":
        name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(
            sys.platform, "g++"
        )
        return None if shutil.which(name) else f"needs a C++ compiler, and there is no {name}"
    if device in ("cuda", "xpu") and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Say why this backend cannot take these tensors, or None when it can."""
    return _no_compiler(student.device.type) or kernels.unsupported(student, teacher)


def slower(op: str, spec: DivergenceSpec | None) -> str | None:
    """Say why `chunked` is preferred for an op, by what was measured on a CPU, or None."""
    if op not in ("forward", "backward", "linear") or spec is None or spec.support != "full":
        return "compiles losses over the full vocabulary only"
    if spec.kind in SHORT and not cuts_entries(spec):
        return f"is no faster for {spec.kind}"
    return None


def _example(key: graphs.Key, shape: torch.Size, kind: str) -> tuple[Tensor, ...]:
    """Make arguments of `rows.block` whose sizes are not taken for constants."""
    num_rows = max(2, shape[0])
    num_rows += num_rows == shape[1]  # equal sizes would be one
    sizes, device = (num_rows, shape[1]), key.device
    sides = [torch.zeros(sizes, dtype=dtype, device=device) for dtype in key.dtypes]
    factor = torch.ones(num_rows, device=device)
    for x in (*sides, factor):
        for dim in range(x.ndim):
            torch._dynamo.mark_dynamic(x, dim)
    return (*sides[:2], factor, rows.numbers(DivergenceSpec(kind), device), *sides[2:])


def cuts_entries(spec: DivergenceSpec) -> bool:
    """Say whether each entry of the sum has a bound."""
    return spec.clip is not None and spec.clip_level == "vocab_entry"


def _compute(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    weight: Tensor,
    out: Tensor | None,
    want_stats: bool,
) -> list[Tensor]:
    """Do `compiled_block` for contiguous rows, up to the sums that `rows.finish` takes."""
    targets = () if out is None else (out,)
    constants = rows.Constants(spec.kind, cuts_entries(spec), want_stats, out is not None)
    key = graphs.Key.of("block", constants, (student, teacher, *targets))
    graph = graphs.graph(
        key, partial(rows.block, constants), partial(_example, key, student.shape, spec.kind)
    )
    factor = (weight.float() * (spec.scale / spec.temperature)).contiguous()
    args = (student, teacher, factor, rows.numbers(spec, student.device), *targets)
    return list(graphs.run(graph, tuple(x.detach() for x in args)))


def compiled_block(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    buffers: Buffers,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    want_stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Do `block_divergence`, over the full vocabulary by a graph.

    Raises:
        KernelError: the graph cannot be compiled.
    """
    if spec.support != "full" or len(student) == 0 or student.shape[1] < 2:
        return block_divergence(student, teacher, spec, buffers, weight, out, want_stats)
    if weight is None:
        weight = student.new_ones(len(student), dtype=torch.float32)
    # a size of one would be a constant to torch.compile: a row alone is computed twice
    count, copies = len(student), 2 if len(student) == 1 else 1
    x, y, weight = (
        z.expand(copies * count, *z.shape[1:]).contiguous() for z in (student, teacher, weight)
    )
    target = out
    # Inductor's C++ of 2.13 fails on a graph that writes over what it reads
    if out is not None and (out is student or copies > 1 or not out.is_contiguous()):
        target = torch.empty_like(x, dtype=out.dtype)
    sums = _compute(x, y, spec, weight, target, want_stats)
    if out is not None and target is not None and target is not out:
        out.copy_(target[:count])
    loss, stats = rows.finish([x[:count] for x in sums], spec)
    return loss * spec.scale, stats


def _num_blocks(device: torch.device, spec: DivergenceSpec) -> int:
    if device.type != "cpu":
        return 1  # of memory for whole blocks
    return MANY_BLOCKS if spec.kind in MIXTURES and spec.support == "full" else FEW_BLOCKS


def forward(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do `chunked.forward` by graphs."""
    num_blocks = _num_blocks(student.device, spec)
    return chunked.forward(
        student, teacher, weights, spec, want_grad, want_stats, compiled_block, num_blocks
    )


def backward(upstream: Tensor, student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """Do `chunked.backward` by graphs."""
    num_blocks = _num_blocks(student.device, spec)
    return chunked.backward(upstream, student, teacher, spec, compiled_block, num_blocks)


def _make_block_loss(settings: LossSettings, tokens: int) -> tuple[int, BlockLoss]:
    num_blocks = _num_blocks(settings.heads[0].weight.device, settings.spec)
    return torch_block_loss(settings, tokens, compiled_block, num_blocks)


linear = partial(from_hidden.linear, make_block_loss=_make_block_loss)
sparse = chunked.sparse
hidden_states = chunked.hidden_states
split_linear = chunked.split_linear
