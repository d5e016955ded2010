"""Differences of hidden states and of attention maps, layer by layer.

Shapes: N scored tokens, H hidden, A attention heads, T positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metal_ops import hidden_divergence

HIDDEN_LOSSES = ("mse", "cosine", "l1")


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str) -> Tensor:
    """[N] the mean over pairs of layers of the difference of hidden states.

    Args:
        student: of each pair [N, H], projected to the teacher's width.
        teacher: the same; without gradient.
        kind: "mse" and "l1" are means over H of squares and absolute differences, "cosine" is one
            less the cosine.
    """
    if kind == "l1":
        wide = torch.promote_types(student[0].dtype, torch.float32)
        pairs = zip(student, teacher, strict=True)
        found = [(s.to(wide) - t.detach().to(wide)).abs().mean(-1) for s, t in pairs]
    else:
        found = [hidden_divergence(s, t, kind) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(found).mean(0)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """[N] nats: the mean over pairs of layers of KL(teacher's map || student's).

    A head of the student is compared with the same head of the teacher, and the mean is taken over
    heads, as in MiniLM (arXiv:2002.10957). Where the numbers of heads differ, each side's heads
    are averaged first. 0 log 0 is 0; what the student's dropout has removed counts as 1e-12.

    Args:
        student: of each pair [N, A, T], the probabilities of the keys.
        teacher: the same rows; without gradient.
    """
    found = []
    for own, other in zip(student, teacher, strict=True):
        q, p = own.float(), other.detach().float()
        if q.shape[1] != p.shape[1]:
            q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
        log_ratio = p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log()
        found.append((p * log_ratio).sum(-1).mean(-1))
    return torch.stack(found).mean(0)
