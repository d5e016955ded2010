"""A backend that cuts the columns of rows into three parts, as three processes hold them."""

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from metal_ops import DivergenceSpec
from metal_ops.backends import kernels
from metal_ops.backends.blocks import split
from metal_ops.backends.blocks.rows import HardTerm, Wanted
from metal_ops.backends.blocks.split import SplitKernels
from tests.metal_ops.ops.torch_kernels import Torch

SUMMED = list(split.SUMMED)


class Parts(Torch):
    """Implements `kernels.Kernels` by `split.SplitKernels`; what these do not have, by PyTorch."""

    def __init__(self, own: SplitKernels) -> None:
        self.own = own

    def places(self, x: Tensor) -> list[slice]:
        """Parts of other sizes; of few columns some have none, and are left out."""
        vocab = x.shape[-1]
        ends = [0, vocab // 2, vocab // 2 + vocab // 7, vocab]
        return [slice(a, b) for a, b in pairwise(ends) if b > a]

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        places = self.places(student)
        parts = [(student[:, at].contiguous(), teacher[:, at].contiguous()) for at in places]
        own = torch.stack([self.own.normalisers(*part, spec) for part in parts])
        pairs = (
            split.join_normalisers(own[:, k], own[:, k + 1], 1 / spec.temperature) for k in (0, 2)
        )
        normalisers = torch.stack([x for pair in pairs for x in pair])
        whole = self._sums(parts, normalisers, spec, Wanted(True, False))
        whole[: kernels.NUM_VALUES, weights == 0] = 0.0
        return whole

    def _sums(
        self,
        parts: list[tuple[Tensor, Tensor]],
        normalisers: Tensor,
        spec: DivergenceSpec,
        wanted: Wanted,
    ) -> Tensor:
        values = [self.own.sums(*part, normalisers, spec, wanted) for part in parts]
        whole = values[0].clone()
        whole[SUMMED] = torch.stack([x[SUMMED] for x in values]).sum(0)
        whole[kernels.AGREEMENT : kernels.CLIPPED + 1].clamp_(max=1)
        again = None if wanted.exact else self.own.again(whole, normalisers, spec)
        if again is not None:
            few = [(x[again], y[again]) for x, y in parts]
            exactly = wanted._replace(exact=True)
            whole[:, again] = self._sums(few, normalisers[:, again], spec, exactly)
        return whole

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
        for at in self.places(student):
            mine = None if hard is None else hard._replace(labels=hard.labels - at.start)
            pair = student[:, at].contiguous(), teacher[:, at].contiguous()
            part = torch.empty_like(pair[0])
            self.own.backward(*pair, factor, values, spec, mine, part)
            out[:, at] = part


def backend(own: SplitKernels) -> ModuleType:
    """The ops of rows by these kernels."""
    made = Parts(own)

    def of(name: str) -> Any:
        return lambda *args: getattr(kernels, name)(made, *args)

    module = ModuleType("parts")
    for name in ("forward", "backward", "linear"):
        setattr(module, name, of(name))
    return module
