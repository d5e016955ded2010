"""What holds for every input: drawn by Hypothesis, checked in float64."""

import math
from dataclasses import replace
from unittest.mock import patch

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metal_ops import DivergenceSpec, divergence, divergence_with_stats
from metal_ops.backends.blocks import sizes
from metal_ops.selftest.inputs import missing_rules
from metal_ops.spec import KINDS, MISSING, SUPPORTS

MANY = settings(deadline=None, max_examples=30, derandomize=True)

betas = st.floats(0.01, 0.99)


@st.composite
def specs(draw, missing: tuple[str, ...] = MISSING) -> DivergenceSpec:
    """Any kind over any support; `missing` are the choices for the entries outside."""
    kind, support = draw(st.sampled_from(KINDS)), draw(st.sampled_from(SUPPORTS))
    ends = [0.0] if kind.startswith("skew") else [0.0, 1.0]
    beta = draw(st.one_of(st.sampled_from(ends), betas))
    return DivergenceSpec(
        kind,
        beta,
        temperature=draw(st.floats(0.25, 8)),
        temperature_scaling=draw(st.sampled_from(["none", "t2"])),
        support=support,
        top_k=None if support == "full" else draw(st.integers(1, 8)),
        missing=draw(st.sampled_from([m for m in missing if m in missing_rules(kind, beta)])),
    )


DISTRIBUTIONS = ("tail", "renormalise")  # both sides sum to one: a divergence is not negative


@st.composite
def pairs(draw) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [5, vocab], float64."""
    vocab, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    size = draw(st.sampled_from([0.1, 1.0, 10.0]))
    generator = torch.Generator().manual_seed(seed)
    student, teacher = size * torch.randn(2, 5, vocab, dtype=torch.float64, generator=generator)
    return student, teacher


def value_and_grad(student: Tensor, teacher: Tensor, spec: DivergenceSpec, upstream=None):
    leaf = student.detach().requires_grad_()
    loss = divergence(leaf, teacher, spec)
    (grad,) = torch.autograd.grad(
        loss, leaf, torch.ones_like(loss) if upstream is None else upstream
    )
    return loss.detach(), grad


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@MANY
@given(pairs(), specs(DISTRIBUTIONS))
def test_not_negative(pair, spec):
    assert (divergence(*pair, spec) >= -1e-13).all()


@MANY
@given(pairs(), specs(DISTRIBUTIONS))
def test_zero_at_equality(pair, spec):
    student, _ = pair
    loss, grad = value_and_grad(student, student, spec)
    if spec.kind != "soft_ce":
        assert not loss.any()
    assert_close(grad, torch.zeros_like(grad))


@MANY
@given(pairs(), specs(("tail",)))
def test_zero_at_equality_only(pair, spec):
    student, teacher = pair
    assume(student.shape[1] > 1)
    assert (divergence(student, teacher, spec) > 0).all()


@MANY
@given(pairs(), st.floats(0.25, 8))
def test_soft_ce_at_equality_is_the_entropy(pair, temperature):
    student, _ = pair
    log_p = (student / temperature).log_softmax(-1)
    loss = divergence(student, student, DivergenceSpec("soft_ce", temperature=temperature))
    assert_close(loss, -(log_p.exp() * log_p).sum(-1))


@MANY
@given(pairs(), specs(), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_mask_is_a_selection(pair, spec, kept):
    student, teacher = pair
    mask = torch.tensor(kept)
    leaf = student.detach().requires_grad_()
    loss = divergence(leaf, teacher, spec, mask=mask)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    for got, want in zip(
        (loss.detach(), grad), value_and_grad(student[mask], teacher[mask], spec), strict=True
    ):
        assert_close(got[mask], want)
        assert not got[~mask].any()


@MANY
@given(pairs(), specs(), st.sampled_from(SUPPORTS[1:]))
def test_a_support_of_every_entry_is_the_full_vocabulary(pair, spec, support):
    student, teacher = pair
    full = replace(spec, support="full", top_k=None)
    everything = replace(spec, support=support, top_k=student.shape[1])
    for got, want in zip(
        value_and_grad(student, teacher, everything),
        value_and_grad(student, teacher, full),
        strict=True,
    ):
        assert_close(got, want)


@MANY
@given(pairs(), specs(), st.floats(-100, 100), st.floats(-100, 100))
def test_adding_a_constant_changes_nothing(pair, spec, a, b):
    student, teacher = pair
    shifted = value_and_grad(student + a, teacher + b, spec)
    for got, want in zip(shifted, value_and_grad(student, teacher, spec), strict=True):
        assert_close(got, want)


@MANY
@given(pairs(), specs())
def test_each_row_of_the_gradient_sums_to_zero(pair, spec):
    _, grad = value_and_grad(*pair, spec)
    assert_close(grad.sum(-1), torch.zeros(5, dtype=torch.float64))


@MANY
@given(pairs(), specs(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_columns_does_not_matter(pair, spec, random):
    student, teacher = pair
    columns, rows = list(range(student.shape[1])), list(range(5))
    random.shuffle(columns)
    random.shuffle(rows)
    loss, grad = value_and_grad(student, teacher, spec)
    got, got_grad = value_and_grad(student[rows][:, columns], teacher[rows][:, columns], spec)
    assert_close(got, loss[rows])
    assert_close(got_grad, grad[rows][:, columns])


@MANY
@given(pairs(), betas)
def test_jsd_swaps_sides_with_beta(pair, beta):
    student, teacher = pair
    one = divergence(student, teacher, DivergenceSpec("jsd", beta=beta))
    other = divergence(teacher, student, DivergenceSpec("jsd", beta=1 - beta))
    assert_close(one, other)


@MANY
@given(pairs(), st.floats(0.25, 8))
def test_the_kls_swap_sides(pair, temperature):
    student, teacher = pair
    one = divergence(student, teacher, DivergenceSpec("forward_kl", temperature=temperature))
    other = divergence(teacher, student, DivergenceSpec("reverse_kl", temperature=temperature))
    assert_close(one, other)


@MANY
@given(pairs(), betas)
def test_jsd_is_bounded_by_the_entropy_of_beta(pair, beta):
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    student, teacher = pair
    assert (
        divergence(5 * student, 5 * teacher, DivergenceSpec("jsd", beta=beta)) <= bound + 1e-12
    ).all()


@MANY
@given(pairs(), st.sampled_from(["forward_kl", "reverse_kl"]))
def test_normalised_jsd_tends_to_the_kls(pair, kind):
    student, teacher = (x / 10 for x in pair)
    beta = 1e-5 if kind == "forward_kl" else 1 - 1e-5
    jsd = divergence(student, teacher, DivergenceSpec("jsd", beta=beta)) / (beta * (1 - beta))
    want = divergence(student, teacher, DivergenceSpec(kind))
    torch.testing.assert_close(jsd, want, rtol=1e-2, atol=1e-9)


@MANY
@given(pairs(), specs(), st.integers(1, 6))
def test_the_size_of_a_block_does_not_matter(pair, spec, rows):
    vocab, upstream = pair[0].shape[1], torch.linspace(-1, 2, 5).double()
    results = []
    for block in (rows, 5):
        with patch.object(sizes, "buffer_bytes", lambda _, rows=block: 8 * vocab * rows):
            loss, stats = divergence_with_stats(*pair, spec)
            results.append((loss, *stats, value_and_grad(*pair, spec, upstream)[1]))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@MANY
@given(pairs(), specs(), st.floats(-10, 10))
def test_the_gradient_is_linear_in_the_upstream(pair, spec, factor):
    a, b = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = [value_and_grad(*pair, spec, up)[1] for up in (a, b, a + factor * b)]
    torch.testing.assert_close(grads[2], grads[0] + factor * grads[1], rtol=1e-9, atol=1e-11)


@MANY
@given(pairs(), specs(), st.floats(0.01, 3))
def test_a_clip_never_raises_the_value(pair, spec, clip):
    free = divergence(*pair, spec)
    for level in ("vocab_entry", "token", "token_rescale"):
        clipped = divergence(*pair, replace(spec, clip=clip, clip_level=level))
        assert (clipped <= free + 1e-12).all()
        if level != "vocab_entry":
            assert (clipped <= clip * spec.scale + 1e-12).all()
