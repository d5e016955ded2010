"""Infinite, NaN and equal logits, and the statistics."""

import math

import pytest
import torch

from metal_ops import DivergenceSpec, divergence, divergence_with_stats
from metal_ops.backends.blocks import sizes
from metal_ops.selftest.inputs import FAMILIES, near, peaked, randn
from metal_ops.selftest.numerics import assert_matches_reference, exact, log_probs
from tests.metal_ops.ops.test_values import DTYPES, SPECS, check, name, out_dtype

JSDS = [DivergenceSpec("jsd", beta=b, temperature=2.0) for b in (0.1, 0.5, 0.9)]
BOUNDED = ("tvd", "skew_kl", "skew_reverse_kl", "alpha")  # finite, as is the JSD, if beta is inside


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_entries_masked_on_both_sides_contribute_nothing(spec, dtype):
    student, teacher = (x.to(dtype) for x in peaked(4, 66))
    student[:, ::3], teacher[:, ::3] = -math.inf, -math.inf
    check(student, teacher, spec)
    kept = torch.arange(66) % 3 != 0
    check(student[:, kept], teacher[:, kept], spec)
    loss, part = (
        divergence(*x, spec) for x in ((student, teacher), (student[:, kept], teacher[:, kept]))
    )
    torch.testing.assert_close(loss, part, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("spec", [*JSDS, *(s for s in SPECS if s.kind in BOUNDED)], ids=name)
def test_an_entry_masked_on_one_side(spec, side, dtype):
    student, teacher = (x.to(dtype) for x in peaked(4, 66))
    (student if side == "student" else teacher)[:, ::3] = -math.inf
    check(student, teacher, spec)


def test_disjoint_supports_reach_the_bound_of_the_jsd():
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[:, :2], teacher[:, 2:] = -math.inf, -math.inf
    for spec in JSDS:
        check(student, teacher, spec)
        bound = -spec.beta * math.log(spec.beta) - (1 - spec.beta) * math.log1p(-spec.beta)
        assert divergence(student, teacher, spec).item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_kl_with_its_reference_side_masked(dtype):
    """KL(a || b) is finite where a alone is zero and infinite where b alone is."""
    student, teacher = (x.to(dtype) for x in peaked(4, 66))
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, ::3], masked_teacher[:, ::3] = -math.inf, -math.inf
    check(student, masked_teacher, DivergenceSpec("forward_kl"))
    check(masked_student, teacher, DivergenceSpec("reverse_kl"))
    check(student, masked_teacher, DivergenceSpec("soft_ce"))
    inf = torch.full((4,), math.inf, dtype=out_dtype(dtype))
    for kind in ("reverse_kl", "mixed_kl"):
        assert torch.equal(divergence(student, masked_teacher, DivergenceSpec(kind)), inf)
    for kind in ("forward_kl", "soft_ce", "mixed_kl"):
        assert torch.equal(divergence(masked_student, teacher, DivergenceSpec(kind)), inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_equal_inputs_give_zero(spec, family, dtype):
    student = FAMILIES[family](5, 1023)[0].to(dtype)
    student.requires_grad_()
    loss = divergence(student, student.detach(), spec)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    want = exact(student.detach(), student.detach(), spec)
    if spec.kind == "soft_ce":  # the entropy
        x, wide = want.x_max, out_dtype(dtype)
        assert_matches_reference(loss.detach(), want.loss, want.loss_magnitude, x, wide)
    else:
        assert not loss.any()
    # forward KL: p - q sum(p), where sum(p) is one but for rounding
    assert_matches_reference(
        grad, torch.zeros_like(want.grad), want.grad_magnitude, want.x_max, dtype
    )


@pytest.mark.parametrize("vocab", [33, 4097])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_nearly_equal_rows_keep_three_digits(spec, vocab):
    student, teacher = near(8, vocab)
    got = divergence(student, teacher, spec).double()
    torch.testing.assert_close(got, exact(student, teacher, spec).loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_nearly_equal_rows_are_not_negative(spec, noise):
    student = torch.randn(64, 1023)
    teacher = student + noise * torch.randn(64, 1023)
    loss = divergence(student, teacher, spec)
    # each term is p d^2 / 2 and may be off by one rounding of p d, d = log p - log q
    eps = torch.finfo(torch.float32).eps
    assert (loss / spec.scale >= -2 * eps * noise).all()


@pytest.mark.parametrize("beta", [1e-9, 1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6, 1 - 1e-9])
@pytest.mark.parametrize("family", ["randn", "peaked", "planted"])
def test_jsd_near_the_ends_of_beta(beta, family):
    student, teacher = (4 * x for x in FAMILIES[family](4, 1023))
    check(student, teacher, DivergenceSpec("jsd", beta=beta))


def test_a_mixture_far_below_the_least_number():
    """Its logarithm counts though beta p + (1 - beta) q is no float32 number any more."""
    student, teacher = torch.zeros(1, 64), torch.full((1, 64), -200.0)
    student[0, 1:], teacher[0, 0] = -torch.linspace(66, 71, 63), 0.0  # 2e-29 to 1e-31
    spec = DivergenceSpec("jsd", beta=1 - 1e-9)
    found = divergence(student, teacher, spec)
    want = exact(student, teacher, spec).loss
    eps = torch.finfo(torch.float32).eps
    # the exponentials of 70 are off by 70 roundings, and the sum's terms by as many again
    assert float(found) == pytest.approx(float(want), rel=200 * eps, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("spec", [*SPECS, DivergenceSpec("jsd", clip=0.1)], ids=name)
def test_a_nan_stays_in_its_row(spec, side, value, monkeypatch):
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 4 * 33 * 2)
    student, teacher = peaked(5, 33)
    clean = student.clone().requires_grad_()
    want = divergence(clean, teacher, spec)
    (want_grad,) = torch.autograd.grad(want.sum(), clean)
    dirty = {"student": student.clone(), "teacher": teacher.clone()}
    dirty[side][2, 7] = value
    leaf = dirty["student"].requires_grad_()
    loss = divergence(leaf, dirty["teacher"], spec)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    others = torch.tensor([0, 1, 3, 4])
    assert loss[2].isnan()
    assert grad[2].isnan().any()
    assert torch.equal(loss[others], want[others])
    assert torch.equal(grad[others], want_grad[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("family", FAMILIES)
def test_stats(family, dtype):
    student, teacher = (x.to(dtype) for x in FAMILIES[family](6, 1023))
    student[:3], teacher[:2, 5] = teacher[:3], student[:2].amax(-1) + 1
    spec = DivergenceSpec("jsd", temperature=2.0, temperature_scaling="t2")
    loss, stats = divergence_with_stats(student, teacher, spec)
    assert torch.equal(loss, divergence(student, teacher, spec))
    x_max = exact(student, teacher, spec).x_max
    for got, logits in ((stats.student_entropy, student), (stats.teacher_entropy, teacher)):
        log_p = log_probs(logits, 2.0)
        want = -(log_p.exp() * log_p).sum(-1)
        magnitude = (log_p.exp() * (log_p.abs() + 1)).sum(-1)
        assert_matches_reference(got, want, magnitude, x_max, out_dtype(dtype), family)
    agreement = stats.top1_agreement.bool()
    largest = [x == x.amax(-1, keepdim=True) for x in (student, teacher)]
    assert torch.equal(agreement, (largest[0] & largest[1]).any(-1))
    assert agreement[2]
    assert not stats.clipped.any()


def test_top1_agreement_tells_rows_apart():
    student = torch.eye(4)
    _, stats = divergence_with_stats(student, student.roll(1, 0), DivergenceSpec())
    assert stats.top1_agreement.tolist() == [0, 0, 0, 0]
    _, stats = divergence_with_stats(student, student * 2, DivergenceSpec())
    assert stats.top1_agreement.tolist() == [1, 1, 1, 1]


def test_entropy_ignores_masked_entries():
    student, teacher = randn(2, 8)
    student[:, 4:], teacher[:, 2:] = -math.inf, -math.inf
    student[:, :4], teacher[:, :2] = 1.0, 2.0
    _, stats = divergence_with_stats(student, teacher, DivergenceSpec())
    assert stats.student_entropy.tolist() == pytest.approx([math.log(4)] * 2, rel=1e-6)
    assert stats.teacher_entropy.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)


def test_stats_carry_no_gradient():
    student, teacher = randn(2, 8)
    loss, stats = divergence_with_stats(student.requires_grad_(), teacher, DivergenceSpec())
    assert loss.requires_grad
    assert not any(x.requires_grad for x in stats)
