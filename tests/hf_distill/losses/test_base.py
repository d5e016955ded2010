"""What every `Loss` does around its `per_token`."""

import torch
from torch import Tensor

from hf_distill.losses import Tokens, as_loss
from hf_distill.models import Signal


def test_a_token_without_weight_may_be_infinite() -> None:
    def square(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        return (student_logits - teacher_logits).square().mean(-1)

    def infinite(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        loss = square(student_logits, teacher_logits, targets)
        return loss + torch.where(targets == 1, torch.inf, 0.0)

    targets, weights = torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.0, 0.25])
    found = []
    for function in (square, infinite):
        logits = torch.arange(12.0).view(3, 4).requires_grad_()
        teacher = Signal(logits=torch.ones(3, 4))
        terms = as_loss(function)(Signal(logits=logits), teacher, Tokens(targets, weights))
        (gradient,) = torch.autograd.grad(terms.loss, logits)
        found.append((terms.loss.detach(), gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert float(found[0][0]) > 0
