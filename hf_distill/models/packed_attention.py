"""An attention implementation for packed rows on devices without FlashAttention: "packed_sdpa".

PyTorch's attention under a block mask computes the whole square of a sequence, most of which the
mask leaves out. This one calls it for each block by itself. What is a block is read from the mask,
so windows stay what they are; masks that are not made of blocks, and several sequences, are left
to "sdpa".
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_sdpa"

_BLOCKS: Any = WeakIdKeyDictionary()  # of masks, which all layers are given


def blocks_of(mask: Tensor) -> list[tuple[int, int]]:
    """Return (first token, token behind the last) of the blocks of a mask [1, 1, T, T] of bool.

    It is one block if a token sees another block's.
    """
    found = _BLOCKS.get(mask)
    if found is not None:
        return found
    seen, length = mask[0, 0], mask.shape[-1]
    # a row begins where a token does not see the one before
    starts = (~seen.diagonal(-1)).nonzero()[:, 0] + 1
    edges = [0, *starts.tolist(), length]
    found = list(pairwise(edges))
    inside = torch.stack([seen[a:b, a:b].sum() for a, b in found]).sum()
    if bool(inside != seen.sum()):
        found = [(0, length)]
    _BLOCKS[mask] = found
    return found


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in each block by itself.

    Args:
        module: the attention layer.
        query: [B, heads, T, D].
        key: [B, heads of keys, T, D].
        value: the same.
        attention_mask: [B, 1, T, T] bool, or None.
        **kwargs: of Transformers' "sdpa".

    Returns:
        [B, T, heads, D], and None for the attention maps.
    """
    mask, length = attention_mask, query.shape[2]
    square = mask is not None and mask.shape == (1, 1, length, length)
    whole = kwargs.get("position_bias") is not None  # of all tokens with all
    if mask is None or not square or whole or mask.dtype != torch.bool:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    parts = []
    for first, end in blocks_of(mask):
        q, k, v = (x[:, :, first:end] for x in (query, key, value))
        block = mask[:, :, first:end, first:end]
        parts.append(sdpa_attention_forward(module, q, k, v, block, **kwargs)[0])
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, packed_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
