"""Value and gradient of `divergence` against float64, and what `divergence_with_stats` adds."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, divergence, divergence_with_stats
from metal_ops.backends.blocks import sizes
from metal_ops.selftest.inputs import FAMILIES, REAL_SHAPE, SHAPES, peaked, randn
from metal_ops.selftest.numerics import (
    Exact,
    assert_matches_reference,
    definition,
    entries,
    exact,
    log_probs,
    unit_upstream,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECS = [
    DivergenceSpec("forward_kl"),
    DivergenceSpec("forward_kl", temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("reverse_kl", temperature=0.7),
    DivergenceSpec("jsd", beta=0.0, temperature=2.0),
    DivergenceSpec("jsd", beta=0.1),
    DivergenceSpec("jsd", beta=0.5, temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("jsd", beta=0.9, temperature=0.7),
    DivergenceSpec("jsd", beta=1.0),
    DivergenceSpec("soft_ce"),
    DivergenceSpec("soft_ce", temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("tvd"),
    DivergenceSpec("tvd", temperature=2.0),
    DivergenceSpec("skew_kl", beta=0.1),
    DivergenceSpec("skew_kl", beta=0.7, temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("skew_reverse_kl", beta=0.1),
    DivergenceSpec("skew_reverse_kl", beta=0.7, temperature=2.0),
    DivergenceSpec("mixed_kl", beta=0.3),
    DivergenceSpec("mixed_kl", beta=0.8, temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("alpha", beta=0.3),
    DivergenceSpec("alpha", beta=0.7, temperature=2.0),
]


def name(value: object) -> str:
    if isinstance(value, DivergenceSpec):
        return f"{value.kind}-{value.beta}-{value.temperature}-{value.temperature_scaling}"
    return str(value).removeprefix("torch.")


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(student: Tensor, teacher: Tensor, spec: DivergenceSpec, context: object = "") -> None:
    """Value and gradient of `divergence` by the rule."""
    want = exact(student, teacher, spec)
    check_per_token(lambda x: divergence(x, teacher, spec), student, want, context)


def check_per_token(
    function: Callable[[Tensor], Tensor], student: Tensor, want: Exact, context: object
) -> None:
    """Value and gradient of a function of the student's logits [N, V] to [N]."""
    leaf = student.detach().requires_grad_()
    loss = function(leaf)
    dtype = out_dtype(student.dtype)
    assert_matches_reference(
        loss.detach(), want.loss, want.loss_magnitude, want.x_max, dtype, f"loss {context}"
    )
    upstream = unit_upstream(want, dtype) if len(student) else loss.detach()
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    up = upstream.double()[:, None]
    assert_matches_reference(
        grad, want.grad * up, want.grad_magnitude * up, want.x_max, student.dtype, f"grad {context}"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_value_and_gradient(spec, dtype, family):
    for shape in SHAPES:
        student, teacher = FAMILIES[family](*shape)
        check(student.to(dtype), teacher.to(dtype), spec, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_value_and_gradient_of_a_real_vocabulary(spec, dtype):
    family = ("randn", "planted", "near", "peaked")[DTYPES.index(dtype)]
    student, teacher = FAMILIES[family](*REAL_SHAPE)
    check(student.to(dtype), teacher.to(dtype), spec, family)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_several_blocks_and_a_rest(spec, monkeypatch):
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 4 * 33 * 3)  # three rows a block
    student, teacher = peaked(11, 33)  # 3 + 3 + 3 + 2
    check(student, teacher, spec)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_mixed_dtypes(spec):
    student, teacher = peaked(4, 33)
    check(student, teacher.bfloat16(), spec)
    check(student.bfloat16(), teacher, spec)
    check(student.double(), teacher, spec)
    check(student, teacher.double(), spec)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_non_contiguous_rows_and_columns(spec):
    student, teacher = peaked(33, 5)
    check(student.T, teacher.T, spec, "transposed")
    student, teacher = peaked(8, 66)
    check(student[::2, ::2], teacher[1::2, 1::2], spec, "strided")
    check(student[:1].expand(4, 66), teacher[:4], spec, "expanded")


def test_leading_dimensions_are_kept():
    student, teacher = (x.view(2, 3, 33) for x in randn(6, 33))
    spec, mask = DivergenceSpec("jsd"), torch.rand(2, 3) > 0.5
    flat = divergence(student.view(6, 33), teacher.view(6, 33), spec, mask=mask.view(-1))
    loss, stats = divergence_with_stats(student, teacher, spec, mask=mask)
    assert torch.equal(loss, flat.view(2, 3))
    assert all(x.shape == (2, 3) for x in stats)
    assert divergence(student[0, 0], teacher[0, 0], spec).shape == ()


def gap(values: Tensor) -> float:
    """A clip that rounding cannot move a value across: the middle of the widest gap."""
    ordered = values.detach().flatten().sort().values
    ordered = ordered[len(ordered) // 2 :]
    widest = int(ordered.diff().argmax())
    return float(ordered[widest : widest + 2].mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("level", ["vocab_entry", "token", "token_rescale"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_clip_is_autograd_of_the_definition(kind, level, dtype):
    student, teacher = (x.to(dtype) for x in peaked(9, 33))
    plain = DivergenceSpec(kind, beta=0.3, temperature=2.0, temperature_scaling="t2")
    terms = entries(student, teacher, plain)
    clip = gap(terms if level == "vocab_entry" else terms.sum(-1))
    spec = DivergenceSpec(kind, 0.3, 2.0, "t2", clip, level)
    reference = student.double().requires_grad_()
    want = definition(reference, teacher, spec)
    (want_grad,) = torch.autograd.grad(want.sum(), reference)
    free = exact(student, teacher, plain)  # its magnitude bounds that of the clipped sum
    leaf = student.detach().requires_grad_()
    loss, stats = divergence_with_stats(leaf, teacher, spec)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    over = (terms if level == "vocab_entry" else terms.sum(-1, keepdim=True)) > clip
    assert torch.equal(stats.clipped.bool(), over.any(-1))
    assert over.any()
    assert not over.all()
    x = free.x_max
    assert_matches_reference(loss.detach(), want, free.loss_magnitude, x, out_dtype(dtype))
    magnitude = free.grad_magnitude
    if kind == "reverse_kl":  # clipped entries leave the + q of the derivative behind
        magnitude = magnitude + 4 * log_probs(student, 2.0).exp()
    assert_matches_reference(grad, want_grad.detach(), magnitude, x, dtype)


@pytest.mark.parametrize("level", ["vocab_entry", "token", "token_rescale"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_clip_above_every_value_changes_nothing(kind, level):
    student, teacher = peaked(5, 33)
    spec = DivergenceSpec(kind, clip=1e6, clip_level=level)
    want = exact(student, teacher, DivergenceSpec(kind))
    loss, stats = divergence_with_stats(student.requires_grad_(), teacher, spec)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert not stats.clipped.any()
    assert_matches_reference(
        loss.detach(), want.loss, want.loss_magnitude, want.x_max, torch.float32
    )
    assert_matches_reference(grad, want.grad, want.grad_magnitude, want.x_max, torch.float32)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_t2_multiplies_by_the_squared_temperature(temperature, clip):
    student, teacher = peaked(4, 33)
    results = []
    for scaling in ("none", "t2"):
        spec = DivergenceSpec("jsd", 0.5, temperature, scaling, clip, "token_rescale")
        leaf = student.double().requires_grad_()
        loss = divergence(leaf, teacher.double(), spec)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain * temperature**2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_mask_is_selection(spec, monkeypatch):
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 4 * 33 * 2)
    student, teacher = peaked(7, 33)
    mask = torch.tensor([True, False, True, True, False, False, True])
    leaf, part = student.clone().requires_grad_(), student[mask].requires_grad_()
    upstream = torch.randn(7)
    loss, stats = divergence_with_stats(leaf, teacher, spec, mask=mask)
    want, want_stats = divergence_with_stats(part, teacher[mask], spec)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    (want_grad,) = torch.autograd.grad(want, part, upstream[mask])
    for got, expected in zip((loss, grad, *stats), (want, want_grad, *want_stats), strict=True):
        # a row of its own or among others: the CPU's vector and scalar paths differ in the last bit
        torch.testing.assert_close(got[mask], expected, rtol=1e-5, atol=1e-7)
        assert not got[~mask].any()


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_masked_rows_may_hold_anything(spec):
    student, teacher = randn(3, 33)
    student[1], teacher[1] = math.nan, -math.inf
    mask = torch.tensor([True, False, True])
    loss, stats = divergence_with_stats(student.requires_grad_(), teacher, spec, mask=mask)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    for x in (loss, grad, *stats):
        assert x.isfinite().all()
        assert not x[1].any()


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_everything_masked_is_zero(spec):
    student, teacher = randn(3, 33)
    mask = torch.zeros(3, dtype=torch.bool)
    loss, stats = divergence_with_stats(student.requires_grad_(), teacher, spec, mask=mask)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.shape == (3,)
    assert not torch.cat([loss[:, None], torch.stack(stats, -1), grad], -1).any()
