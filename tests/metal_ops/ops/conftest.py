"""Memory that an op asks for without filling it starts as NaN."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils import _device

_device._device_constructors()  # torch keeps them at the first call, which must not be below


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args, **kwargs) -> Tensor:
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return poisoned


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that forgets to write an element returns a NaN there."""
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
