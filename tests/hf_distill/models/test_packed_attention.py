"""Attention in each block of a mask by itself is attention under the whole mask."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_distill.models.packed_attention import blocks_of, packed_sdpa

LENGTHS = (3, 1, 5)
ROWS = torch.tensor([0] * 3 + [1] + [2] * 5)
AT = torch.arange(9)
CAUSAL = AT[:, None] >= AT
BLOCKS = CAUSAL & (ROWS[:, None] == ROWS)


def masked(mask: torch.Tensor, function: object) -> torch.Tensor:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 4) for heads in (4, 2, 2))
    module = nn.Module()
    module.num_key_value_groups = 2  # pyright: ignore[reportArgumentType]
    return function(module, query, key, value, mask[None, None])[0]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("window", [2, 9])
def test_blocks_are_attended_alone(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = BLOCKS & (AT[:, None] - AT < window)
    assert blocks_of(mask[None, None]) == [(0, 3), (3, 4), (4, 9)]
    calls: list[int] = []

    def noted(module: nn.Module, query: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    want = masked(mask, sdpa_attention_forward)
    monkeypatch.setattr("hf_distill.models.packed_attention.sdpa_attention_forward", noted)
    assert torch.testing.assert_close(masked(mask, packed_sdpa), want) is None
    assert calls == [*LENGTHS]


def test_masks_of_other_forms_stay_whole() -> None:
    seen = BLOCKS.clone()
    seen[8, 1] = True  # a token of the last row sees the first
    assert blocks_of(seen[None, None]) == [(0, 9)]
    assert blocks_of(CAUSAL[None, None]) == [(0, 9)]
    torch.testing.assert_close(masked(seen, packed_sdpa), masked(seen, sdpa_attention_forward))
