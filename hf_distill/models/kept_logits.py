"""Whether a model can be told of which positions logits are wanted.

Transformers' models take a mask of positions as `logits_to_keep`. Older code, which models with
code of their own keep, takes the number of last positions, or one list of positions for all rows.
"""

import torch
from torch import nn

from hf_distill.models.causality import narrow_head
from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.probe_rows import ProbeRow
from hf_distill.models.structure import causal_lm

KEEP = "logits_to_keep"

REFUSALS = (IndexError, RuntimeError, TypeError, ValueError)  # of code that expects a number


@torch.no_grad()
def takes_mask(model: nn.Module, row: ProbeRow, front: int) -> bool:
    """Return whether a mask [B, front + T] as `logits_to_keep` gives its positions' logits [N, V].

    Args:
        model: with its adapters, without parallel wrapper.
        row: of a batch.
        front: outputs before that of the first token.
    """
    ids = row.ids
    mask = torch.zeros(ids.shape[0], front + ids.shape[1], dtype=torch.bool, device=ids.device)
    mask[:, front] = mask[0, -1] = True
    with evaluating(model), kept_rng(ids.device), narrow_head(causal_lm(model), not row.is_cut):
        torch.manual_seed(0)
        whole = model(**row.inputs).logits
        torch.manual_seed(0)
        try:
            kept = model(**row.inputs, **{KEEP: mask}).logits
        except REFUSALS:
            return False
    wanted = whole[mask]
    if kept.shape != wanted.shape:
        return False
    # the same products, in other orders: what is wrong would be another position's logits
    largest = wanted.float().abs().max()
    apart = (kept.float() - wanted.float()).abs().nan_to_num(0, 0, 0).max()
    return bool(apart <= 64 * torch.finfo(wanted.dtype).eps * largest)
