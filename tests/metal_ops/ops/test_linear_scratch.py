"""What `linear_scratch_bytes` says is what `linear_divergence` allocates beside its results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from metal_ops import DivergenceSpec, Head, linear_scratch_bytes
from metal_ops.backends.blocks import split
from metal_ops.backends.blocks.columns import COLUMNS
from metal_ops.backends.blocks.linear import HardLabels, Needs, Projection, linear

TOKENS, HIDDEN, VOCAB = 70, 16, 30000


class Made(TorchDispatchMode):
    """Adds up the memory that is asked for in tensors as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "new_empty" in str(func) and made.shape[-1] == VOCAB:
            self.bytes += made.nbytes
        return made


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 1])
def test_scratch_is_what_is_allocated(tokens: int, shared: bool) -> None:
    student, other = (Head(torch.randn(VOCAB, HIDDEN)) for _ in range(2))
    teacher = student if shared else other
    hidden = torch.randn(2, tokens, HIDDEN)
    pairs = zip(hidden, (student, other), strict=True)
    sides = [Projection(x, head.weight, None, 1.0, None) for x, head in pairs]
    said = sides[1] if not shared else hidden[1]
    hard, needs = HardLabels(None, 1.0), Needs(True, True, False)
    with Made() as made:  # the op itself hides what is inside of it
        linear(sides[0], said, torch.ones(tokens), hard, DivergenceSpec(), needs, False)
    assert made.bytes == linear_scratch_bytes(tokens, student, teacher)
    meta = [Head(x.weight.to("meta")) for x in (student, teacher)]
    # an accelerator takes more rows at a time
    assert linear_scratch_bytes(tokens, meta[0], meta[1]) >= made.bytes


class Highest(TorchDispatchMode):
    """Notes the most that tensors as wide as the vocabulary's share hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._held = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.ndim > 1 and made.shape[-1] == VOCAB // 2:
            storage = made.untyped_storage()
            self._held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._held = {k: x for k, x in self._held.items() if not x[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._held.values()))
        return made


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield cast(dist.ProcessGroup, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_of_one_of_two_processes(
    group: dist.ProcessGroup, dtype: torch.dtype, softcap: float | None
) -> None:
    """The process alone has its rows; sides are read as they are, a block of tokens at a time."""
    weights = [torch.randn(VOCAB // 2, HIDDEN).to(x) for x in (torch.float32, dtype)]
    hidden = [torch.randn(TOKENS, HIDDEN).to(x.dtype) for x in weights]
    sides = [Projection(x, w, None, 1.0, softcap) for x, w in zip(hidden, weights, strict=True)]
    given = torch.ones(TOKENS), HardLabels(None, 1.0), DivergenceSpec().resolved()
    with Highest() as highest:
        split.linear(COLUMNS, *sides, *given, Needs(True, True, False), False, group, True)
    whole = [Head(torch.empty(VOCAB, HIDDEN, dtype=w.dtype), softcap=softcap) for w in weights]
    said = linear_scratch_bytes(TOKENS, *whole, processes=2)
    a_copy = TOKENS * VOCAB // 2 * 2  # of a chunk, in 16 bits
    assert said <= highest.bytes < said + a_copy  # an operation's own, in a block


def test_a_negative_number_of_tokens_is_an_error() -> None:
    head = Head(torch.randn(5, 2))
    assert linear_scratch_bytes(0, head, head) == 0
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        linear_scratch_bytes(-1, head, head)
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        linear_scratch_bytes(1, head, head, processes=0)
