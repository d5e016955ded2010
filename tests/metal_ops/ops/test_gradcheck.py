"""Gradients against finite differences, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from metal_ops import (
    DivergenceSpec,
    Head,
    divergence,
    linear_divergence,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.selftest.inputs import missing_rules, randn, sparse

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5)] + [("jsd", b) for b in (0.0, 0.1, 0.5, 0.9, 1.0)]
KINDS += [("soft_ce", 0.5), ("tvd", 0.5), ("skew_kl", 0.0)]
KINDS += [(k, b) for k in ("skew_kl", "skew_reverse_kl", "mixed_kl", "alpha") for b in (0.1, 0.7)]


@pytest.mark.parametrize("scaling", ["none", "t2"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergence(kind, beta, scaling):
    student, teacher = (x.double() for x in randn(4, 7))
    spec = DivergenceSpec(kind, beta, 2.0, scaling)
    mask = torch.tensor([True, False, True, True])
    assert gradcheck(lambda x: divergence(x, teacher, spec, mask=mask), (student.requires_grad_(),))


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk", "union"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_supports(kind, beta, support):
    student, teacher = (x.double() for x in randn(2, 6))
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    student.requires_grad_()
    for missing in missing_rules(kind, beta):
        spec = DivergenceSpec(kind, beta, 2.0, "t2", support=support, top_k=3, missing=missing)
        assert gradcheck(lambda x, s=spec: divergence(x, teacher, s), (student,))
    spec = DivergenceSpec(kind, beta, 2.0, "t2", support=support, top_k=3)
    assert gradcheck(
        lambda x: weighted_divergence(x, teacher, spec, weights=weights).loss, (student,)
    )


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_sparse_divergence(kind, beta):
    student, teacher = (x.double() for x in randn(2, 6))
    known = sparse(teacher, 3, 2.0, torch.float64)
    student.requires_grad_()
    for missing in missing_rules(kind, beta):
        spec = DivergenceSpec(kind, beta, 2.0, "t2", missing=missing)
        assert gradcheck(lambda x, s=spec: sparse_divergence(x, known, s), (student,))


@pytest.mark.parametrize("level", ["vocab_entry", "token"])  # token_rescale is not a derivative
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_clipped_divergence(kind, beta, level):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, 7, dtype=torch.float64, generator=generator)
    clip = 0.02 if level == "vocab_entry" else 0.1
    spec = DivergenceSpec(kind, beta, 2.0, "t2", clip, level)
    assert gradcheck(lambda x: divergence(x, teacher, spec), (student.requires_grad_(),))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "beta"), [*KINDS[:2], ("jsd", 0.3), *KINDS[7:]])
def test_linear_divergence(kind, beta, alpha):
    hidden, teacher_hidden = torch.randn(2, 5, 3, dtype=torch.float64)
    weight, teacher_weight = torch.randn(2, 7, 3, dtype=torch.float64)
    bias, labels = torch.randn(7, dtype=torch.float64), torch.randint(7, (5,))

    def loss(h, w, b):
        return linear_divergence(
            h,
            Head(w, b, 0.7, 2.0),
            teacher_hidden,
            Head(teacher_weight, None, 1.3, 3.0),
            DivergenceSpec(kind, beta, 2.0, "t2"),
            weights=torch.tensor([0.5, 0.0, 1.0, 2.0, 0.1], dtype=torch.float64),
            labels=labels,
            alpha=alpha,
        ).loss

    assert gradcheck(loss, tuple(x.requires_grad_() for x in (hidden, weight, bias)))
