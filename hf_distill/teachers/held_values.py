"""Values for a student's trained parameters, kept beside it: a moving average, or the start.

Each process keeps what it holds of a parameter: all of it, or its piece where an engine has cut the
model. In checkpoints they are whole, so that these do not depend on the number of processes.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_distill.models import pieces
from hf_distill.models.structure import unwrap
from hf_distill.teachers.initial_adapters import holding, trainable


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {pieces.plain_name(name): p for name, p in trainable(unwrap(model)).items()}


class HeldValues:
    """Holds a value for each parameter of a student that is trained.

    Args:
        student: whose values are taken now, wrapped or not, cut by an engine or not yet.
        wide: whether they are kept in float32 at least, as a moving average must be: a small step
            would be lost in 16 bits.

    Attributes:
        values: by name, as they are held by this process.
    """

    def __init__(self, student: nn.Module, wide: bool) -> None:
        self.values: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name, p in _trained(student).items():
            dtype = torch.promote_types(p.dtype, torch.float32) if wide else p.dtype
            self.values[name] = pieces.piece(p).to(dtype, copy=True)
            self._shapes[name] = pieces.whole_shape(p)
        self._is_cut = pieces.lies_in_pieces(student)
        self._student = weakref.ref(student)

    def parameters(self, student: nn.Module) -> dict[str, nn.Parameter]:
        """Return the student's parameters, which must be those that there are values of.

        Where an engine has cut them nothing of them is joined afterwards, and the values are cut.

        Args:
            student: as its engine calls it. All processes must call this together.

        Raises:
            ValueError: others are trained than at the start.
        """
        self._student = weakref.ref(student)
        in_pieces = pieces.lies_in_pieces(student)
        if in_pieces:
            pieces.release(student)
        found = _trained(student)
        if found.keys() != self.values.keys():
            odd = sorted(found.keys() ^ self.values.keys())
            raise ValueError(
                "with teacher ema the same parameters must be trained from the first step to the "
                f"last; {len(odd)} differ, the first is {odd[0]!r}"
            )
        if in_pieces and not self._is_cut:
            self._is_cut, flat = True, pieces.lies_flat(student)
            for name, p in found.items():
                self.values[name] = pieces.cut(self.values[name], p, flat)
        return found

    def pairs(self, student: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter's value and what the student has, as this process holds both."""
        found = self.parameters(student)
        for name, value in self.values.items():
            yield value, pieces.piece(found[name])

    @contextmanager
    def inside(self, student: nn.Module) -> Iterator[None]:
        """Give the student these values inside the block."""
        found = self.parameters(student)
        if not self._is_cut:
            with holding(found, self.values):
                yield
            return
        # an engine reads the memory itself, and joins it anew once it has given up what it joined
        held = {name: pieces.piece(p) for name, p in found.items()}
        kept = {name: x.clone() for name, x in held.items()}
        try:
            for name, x in held.items():
                x.copy_(self.values[name])
            yield
        finally:
            pieces.release(student)
            for name, x in held.items():
                x.copy_(kept[name])

    @torch.no_grad()
    def move(self, student: nn.Module, share: float) -> None:
        """Move the values towards the student's by a share of the way."""
        for value, present in self.pairs(student):
            value.lerp_(present.to(value.dtype), share)

    @torch.no_grad()
    def distance(self, student: nn.Module) -> float:
        """Return the largest absolute difference to the student's, over all processes' pieces."""
        found = [(v - x).abs().max() for v, x in self.pairs(student) if v.numel()]
        largest = torch.stack(found).max() if found else torch.zeros(())
        if self._is_cut:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def whole(self) -> dict[str, Tensor]:
        """Return the values whole, by name. All processes must call it together."""
        if not self._is_cut:
            return dict(self.values)
        student, main = self._present(), dist.get_rank() == 0
        found, flat, joined = self.parameters(student), pieces.lies_flat(student), {}
        for name, value in self.values.items():
            one = pieces.join(value, found[name], self._shapes[name], flat)
            # only the process that writes them needs more than their shapes
            joined[name] = one.cpu() if main else one.to("meta")
        return joined

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Take values as `whole` gives them. All processes must call it together."""
        if not self._is_cut:
            for name, value in self.values.items():
                value.copy_(whole[name])
            return
        student = self._present()
        found, flat = self.parameters(student), pieces.lies_flat(student)
        for name, value in self.values.items():
            value.copy_(pieces.cut(whole[name].to(value.dtype), found[name], flat))

    def _present(self) -> nn.Module:
        student = self._student()
        assert student is not None
        return student
