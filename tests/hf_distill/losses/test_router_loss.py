"""Of which tokens the experts of student and teacher are compared."""

from dataclasses import replace

import torch
from torch import Tensor

from hf_distill.losses import Terms, Tokens
from hf_distill.losses.router_loss import AGREEMENT, add_router_loss
from hf_distill.models import Signal
from hf_distill.models.routers import Experts, RouterWatcher

N, ANCHORED, LAYERS, NUM_EXPERTS = 3, 2, 2, 4


def agreement(paired: Tensor | None = None) -> Tensor | None:
    """Return the shares of N tokens whose experts are the same; the student has others behind."""
    routers = RouterWatcher()
    chosen = torch.ones(LAYERS, N + ANCHORED, 1, dtype=torch.long)
    routers.experts = Experts(chosen, NUM_EXPERTS)
    teacher = Signal(logits=torch.zeros(N, 8), experts=Experts(chosen[:, :N], NUM_EXPERTS))
    tokens = Tokens(torch.arange(N), torch.ones(N))
    found = add_router_loss(
        Terms(torch.tensor(0.0), {}), routers, replace(teacher, paired=paired), tokens, 1
    )
    return found.metrics.get(AGREEMENT)


def test_tokens_of_an_anchor_are_left_out() -> None:
    found = agreement()
    assert found is not None
    assert found.tolist() == [1.0] * N


def test_tokens_that_are_paired_with_others_are_not_compared() -> None:
    assert agreement(paired=torch.ones(N, dtype=torch.bool)) is None
