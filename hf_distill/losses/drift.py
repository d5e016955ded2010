"""Weights by how far student and teacher have drifted apart before a token (IW-OPD)."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.data import packed_rows
from hf_distill.data.sides import places
from hf_distill.losses import chunks
from hf_distill.models.signals import Signal

DRIFT_NAME = "drift_factor"
MOST_NATS = 1e4  # of one token, where one side excludes what the other wrote


class Drift(NamedTuple):
    """Says how much more the tokens count that stand before the two sides drift apart.

    amplification: gamma, > 0. predicts: [B, T] bool, the outputs that predict the N scored tokens.
    rows: [B, T] int64, the row of each token where sequences hold several, see `data.packed_rows`.
    """

    amplification: float
    predicts: Tensor
    rows: Tensor | None = None


@torch.no_grad()
def drift_factors(drift: Drift, student: Signal, teacher: Signal, targets: Tensor) -> Tensor:
    """Return 1 + gamma * (1 - D_t / D) of each token.

    D_t is the sum of abs(log p(y) - log q(y)) over the scored tokens y of the row before token t,
    and D that over all of them, at temperature 1; p is the teacher, q the student. So the first
    token counts 1 + gamma times, and tokens behind all the drift count once. Where the two sides
    agree everywhere, each counts 1 + gamma times.

    Args:
        drift: the amplification, and where the N tokens stand.
        student: of the N tokens. Hidden states are projected once more.
        teacher: of the same; the same.
        targets: [N] int64.

    Returns:
        [N] float32 (float64 for float64 signals), in [1, 1 + gamma].

    Source:
        IW-OPD (arXiv:2606.22600), as TRL's `IWOPDTrainer` computes it, which amplifies the
        advantage of a sampled token and divides by the number of tokens. Here it multiplies a soft
        loss of any kind; q is the student at this step, which sampled the tokens if each rollout is
        used for one step.
    """
    apart = chunks.log_probs(teacher, targets) - chunks.log_probs(student, targets)
    apart = apart.abs().nan_to_num(0.0, posinf=MOST_NATS).clamp(max=MOST_NATS)
    rows, columns = places(drift.predicts)
    table = apart.new_zeros(drift.predicts.shape)
    table[rows, columns] = apart
    of_rows = table if drift.rows is None else packed_rows.pad_rows(table, drift.rows, 0.0)
    total = of_rows.sum(1, keepdim=True)
    before = (of_rows.cumsum(1) - of_rows) / torch.where(total > 0, total, 1.0)
    if drift.rows is not None:
        before = packed_rows.pack_again(before, drift.rows)
    return 1 + drift.amplification * (1 - before[rows, columns]).clamp(0.0, 1.0)
