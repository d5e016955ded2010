"""What a teacher on a server is sent of a batch: the rows that it scores."""

import torch
from torch import Tensor

from hf_distill.data.sides import Side, unpacked

SENT = ("input_ids", "attention_mask")  # of a side's inputs; the server numbers positions itself


def predicting_rows(side: Side) -> list[tuple[list[int], list[int]]]:
    """Return (ids without padding, places that predict scored tokens) of each row that has any.

    Raises:
        ValueError: the side has other inputs, or scores the first token of a row.
    """
    side = unpacked(side)
    unsent = sorted(side.inputs.keys() - set(SENT))
    if unsent:
        raise ValueError(
            f"a remote teacher takes {' and '.join(SENT)} only, the batch has {unsent[0]!r} too"
        )
    ids: Tensor = side.inputs["input_ids"]
    mask = side.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if bool((side.predicts & ~mask).any()):
        row = int((side.predicts & ~mask).nonzero()[0, 0])
        raise ValueError(
            f"row {row}: a remote teacher cannot score a row's first token, which nothing predicts"
        )
    rows = []
    for row, keep, predicts in zip(ids.cpu(), mask.cpu(), side.predicts.cpu(), strict=True):
        places = predicts[keep].nonzero()[:, 0].tolist()
        if places:
            rows.append((row[keep].tolist(), places))
    return rows
