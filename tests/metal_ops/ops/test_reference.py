"""Worked examples: numbers a reader can check by hand, for the reference and for the op."""

import math

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, divergence, divergence_with_stats, reference
from metal_ops.selftest.inputs import peaked
from metal_ops.selftest.numerics import definition

log = math.log


def logits(*probabilities: float) -> Tensor:
    """log of the probabilities, and a constant that softmax removes."""
    return torch.tensor([probabilities], dtype=torch.float64).log() + 3.0


# teacher p = (3/4, 1/4), student q = (1/2, 1/2)
EXAMPLES = [
    # 3/4 log(3/2) + 1/4 log(1/2)
    (DivergenceSpec("forward_kl"), 0.75 * log(1.5) - 0.25 * log(2)),
    # 1/2 log(2/3) + 1/2 log(2)
    (DivergenceSpec("reverse_kl"), 0.5 * log(4 / 3)),
    # beta 1/2: m = (5/8, 3/8)
    (
        DivergenceSpec("jsd", beta=0.5),
        0.5 * (0.75 * log(6 / 5) + 0.25 * log(2 / 3)) + 0.5 * (0.5 * log(4 / 5) + 0.5 * log(4 / 3)),
    ),
    # beta 1/5: m = (11/20, 9/20); the teacher has the weight beta
    (
        DivergenceSpec("jsd", beta=0.2),
        0.2 * (0.75 * log(15 / 11) + 0.25 * log(5 / 9))
        + 0.8 * (0.5 * log(10 / 11) + 0.5 * log(10 / 9)),
    ),
    (DivergenceSpec("jsd", beta=0.0), 0.75 * log(1.5) - 0.25 * log(2)),
    (DivergenceSpec("jsd", beta=1.0), 0.5 * log(4 / 3)),
    # temperature 1/2 squares the odds: p = (9/10, 1/10)
    (DivergenceSpec("forward_kl", temperature=0.5), 0.9 * log(1.8) + 0.1 * log(0.2)),
    (
        DivergenceSpec("forward_kl", temperature=0.5, temperature_scaling="t2"),
        0.25 * (0.9 * log(1.8) + 0.1 * log(0.2)),
    ),
    # the first entry, 3/4 log(3/2) = 0.30, is cut to 0.2; the negative one stays
    (DivergenceSpec("forward_kl", clip=0.2), 0.2 - 0.25 * log(2)),
    (DivergenceSpec("forward_kl", clip=0.1, clip_level="token"), 0.1),
    (DivergenceSpec("forward_kl", clip=0.1, clip_level="token_rescale"), 0.1),
    (DivergenceSpec("forward_kl", clip=0.2, clip_level="token"), 0.75 * log(1.5) - 0.25 * log(2)),
]


@pytest.mark.parametrize(("spec", "want"), EXAMPLES)
def test_worked_value(spec, want):
    student, teacher = logits(0.5, 0.5), logits(0.75, 0.25)
    assert divergence(student, teacher, spec).item() == pytest.approx(want, rel=1e-12)
    assert reference.divergence(student, teacher, spec).item() == pytest.approx(want, rel=1e-12)


GRADIENTS = [
    (DivergenceSpec("forward_kl"), -0.25),  # q - p
    # q (g - sum q g) with g = log(q/p): half of half of log(2/3) - log(2)
    (DivergenceSpec("reverse_kl"), -0.25 * log(3)),
    # half of half of half of log(4/5) - log(4/3)
    (DivergenceSpec("jsd", beta=0.5), 0.125 * log(3 / 5)),
    (DivergenceSpec("forward_kl", temperature=0.5), -0.4 / 0.5),
    (DivergenceSpec("forward_kl", temperature=0.5, temperature_scaling="t2"), -0.4 * 0.5),
    # only the second entry is left, with h = (0, -1/4): -q sum(h) = 1/8. A student below its
    # teacher is pushed further down.
    (DivergenceSpec("forward_kl", clip=0.2), 0.125),
    (DivergenceSpec("forward_kl", clip=0.1, clip_level="token"), 0.0),
    (
        DivergenceSpec("forward_kl", clip=0.1, clip_level="token_rescale"),
        -0.25 * 0.1 / (0.75 * log(1.5) - 0.25 * log(2)),
    ),
]


@pytest.mark.parametrize(("spec", "want"), GRADIENTS)
@pytest.mark.parametrize("function", [divergence, reference.divergence])
def test_worked_gradient(function, spec, want):
    student, teacher = logits(0.5, 0.5).requires_grad_(), logits(0.75, 0.25)
    (grad,) = torch.autograd.grad(function(student, teacher, spec).sum(), student)
    assert grad.tolist() == [pytest.approx([want, -want], rel=1e-12)]


def test_worked_statistics():
    _, stats = divergence_with_stats(logits(0.4, 0.6), logits(0.75, 0.25), DivergenceSpec())
    assert stats.student_entropy.item() == pytest.approx(-0.4 * log(0.4) - 0.6 * log(0.6))
    assert stats.teacher_entropy.item() == pytest.approx(-0.75 * log(0.75) - 0.25 * log(0.25))
    assert stats.top1_agreement.item() == 0
    assert stats.clipped.item() == 0


def test_reference_entropy():
    assert reference.entropy(logits(0.75, 0.25), 1.0).item() == pytest.approx(
        -0.75 * log(0.75) - 0.25 * log(0.25)
    )
    assert reference.entropy(logits(0.75, 0.25), 0.5).item() == pytest.approx(
        -0.9 * log(0.9) - 0.1 * log(0.1)
    )
    assert reference.entropy(torch.tensor([0.0, 0.0, -math.inf]), 1.0).item() == pytest.approx(
        log(2)
    )


def test_reference_head():
    hidden = torch.tensor([[1.0, 2.0]])
    weight, bias = torch.tensor([[1.0, 1.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0])
    assert reference.head(hidden, weight, None, 1.0, None).tolist() == [[3.0, -2.0]]
    assert reference.head(hidden, weight, bias, 2.0, None).tolist() == [[7.0, -4.0]]
    want = [2 * math.tanh(3.5), 2 * math.tanh(-2.0)]
    assert reference.head(hidden, weight, bias, 2.0, 2.0).tolist() == [pytest.approx(want)]


@pytest.mark.parametrize("level", ["vocab_entry", "token", "token_rescale"])
@pytest.mark.parametrize("clip", [None, 0.02, 0.5])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_reference_is_the_definition(kind, clip, level):
    student, teacher = (x.double() for x in peaked(6, 33))
    spec = DivergenceSpec(kind, 0.3, 2.0, "t2", clip, level)
    results = []
    for function in (reference.divergence, definition):
        leaf = student.clone().requires_grad_()
        loss = function(leaf, teacher, spec)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
