"""What `linear_scratch_bytes` says is what `linear_divergence` allocates beside its results."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metal_ops import DivergenceSpec, Head, linear_scratch_bytes
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


def test_a_negative_number_of_tokens_is_an_error() -> None:
    head = Head(torch.randn(5, 2))
    assert linear_scratch_bytes(0, head, head) == 0
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        linear_scratch_bytes(-1, head, head)
