"""Rows for kernels/powers.metal, its launcher, and what it must return to the last bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.metal_ops.mslsim import Library

NAME = "powers.metal"
TEXT = (Path(__file__).parent / "kernels" / NAME).read_text()
FLOAT = TEXT.replace("INSTANTIATE(half)\nINSTANTIATE(bfloat)\n", "")  # compiles in less time
TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


class Results(NamedTuple):
    tops: Tensor  # [N] float32
    sums: Tensor  # [N] float32
    out: Tensor  # [N, V]


def rows(n: int, v: int, dtype: torch.dtype = torch.float32, gap: int = 0) -> Tensor:
    """[n, v] whole numbers from -4 to 0, but for a 4 somewhere; `gap` columns of NaN.

    So no two threads, simdgroups or rows see the same largest number and sum.
    """
    x = torch.full((n, v + gap), torch.nan, dtype=dtype)
    x[:, :v] = torch.randint(-4, 1, (n, v))
    x[torch.arange(n), torch.randint(0, v, (n,))] = 4
    return x[:, :v]


def run(
    library: Library, x: Tensor, weights: Tensor, group_size: int, gap: int = 0, **how: Any
) -> Results:
    """The kernel, a threadgroup a row; results start as NaN."""
    n, v = x.shape
    tops, sums = (torch.full((n,), torch.nan) for _ in range(2))
    out = torch.full((n, v + gap), torch.nan, dtype=x.dtype)[:, :v]
    function = getattr(library, f"powers_{TYPES[x.dtype]}")
    sizes = [v, x.stride(0), out.stride(0)]
    arguments = (x, weights, tops, sums, out, sizes, [1.0])
    function(*arguments, threads=n * group_size, group_size=group_size, **how)
    return Results(tops, sums, out)


def expected(x: Tensor, weights: Tensor) -> Results:
    top = x.double().amax(-1)
    out = (x.double() - top[:, None]).exp2()
    counts = (weights != 0).double()
    return Results(top * counts, out.sum(-1) * counts, out * counts[:, None])


def differences(found: Results, x: Tensor, weights: Tensor) -> Sequence[str]:
    """Names of the results that are not exact."""
    true = expected(x, weights)._asdict()
    return [k for k, v in found._asdict().items() if not torch.equal(v.double(), true[k])]
