"""Draws from a sparse teacher's tail: unbiased, zero at the teacher, as the reference says."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from metal_ops import (
    DivergenceSpec,
    SparseTeacher,
    TailSamples,
    divergence,
    reference,
    sparse_divergence,
)
from metal_ops.functional import sparse as module
from metal_ops.selftest.inputs import peaked, randn
from metal_ops.spec import KINDS
from tests.metal_ops.ops.tails import all_drawn, by_reference, draw, sampled, split

N, V, TOP, T = 6, 33, 5, 1.7
CASES = [(kind, 0.3) for kind in KINDS] + [("jsd", 0.9), ("alpha", 0.7), ("mixed_kl", 0.8)]
PAIRS = [(kind, beta) for kind, beta in CASES if kind != "soft_ce"]


def value_and_grad(function, student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf)
    upstream = torch.arange(1, len(loss) + 1)
    return loss.detach(), torch.autograd.grad((loss * upstream).sum(), leaf)[0]


def assert_same(got, want, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


def pair() -> tuple[Tensor, Tensor]:
    student, teacher = (x.double() for x in randn(N, V))
    return 1.5 * student, 2.5 * teacher


@pytest.mark.parametrize("max_ratio", [None, 4.0, 1.1])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_value_and_gradient_are_the_definitions(kind, beta, max_ratio):
    student, teacher = pair()
    spec = DivergenceSpec(kind, beta, T, "t2")
    known = sampled(teacher, TOP, 7, T, flat=0.5)
    bound = math.inf if max_ratio is None else max_ratio
    want = value_and_grad(lambda x: by_reference(x, known, spec, bound), student)
    got = value_and_grad(lambda x: sparse_divergence(x, known, spec, max_ratio=max_ratio), student)
    assert_same(got, want)
    unbounded = value_and_grad(lambda x: by_reference(x, known, spec, math.inf), student)
    bucket = value_and_grad(lambda x: sparse_divergence(x, known, spec, tail="bucket"), student)
    assert (want[1] - bucket[1]).abs().max() > 1e-3
    assert_same(got[:1], unbounded[:1])  # only the gradient is bounded
    if max_ratio is not None and kind != "tvd":  # whose corrections are few
        assert (want[1] - unbounded[1]).abs().max() > 1e-3  # the bound is met


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_slopes_are_the_derivatives_of_the_entries(kind, beta):
    log_p, log_q = (x.double().requires_grad_() for x in randn(4, 5))
    generator = "forward_kl" if kind == "soft_ce" else kind
    terms = reference.entries(log_p, log_q, generator, beta).sum()
    by_p, by_q = torch.autograd.grad(terms, (log_p, log_q))
    assert_same(
        reference.slopes(log_p.detach(), log_q.detach(), kind, beta),
        (by_p / log_p.exp(), by_q / log_q.exp()),
    )


@pytest.mark.parametrize("top_k", [1, TOP, V - 1])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_the_whole_tail_drawn_is_the_dense_divergence(kind, beta, top_k):
    student, teacher = pair()
    spec = DivergenceSpec(kind, beta, T)
    want = value_and_grad(lambda x: divergence(x, teacher, spec), student)
    known = all_drawn(teacher, top_k, T)
    got = value_and_grad(lambda x: sparse_divergence(x, known, spec, max_ratio=None), student)
    assert_same(got, want)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_unbiased_over_redraws(kind, beta):
    """The mean over redraws of the value within 3 sigma, each of 33 gradients within 4."""
    redraws, draws = 4096, 4
    student, teacher = (x[:1] for x in pair())
    spec = DivergenceSpec(kind, beta, T)
    full = value_and_grad(lambda x: divergence(x, teacher, spec), student)
    log_p, known, shares = split(teacher, TOP, T)
    # draws from a flatter distribution: the weights matter
    proposal = (0.7 * shares).log_softmax(-1)
    many = SparseTeacher(*(x.expand(redraws, *x.shape[1:]) for x in known[:3]), T)
    tiled = (x.expand(redraws, V) for x in (log_p, proposal))
    many = many._replace(samples=draw(*tiled, draws))
    leaf = student.expand(redraws, V).clone().requires_grad_()
    loss = sparse_divergence(leaf, many, spec, max_ratio=None)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    bucket = value_and_grad(lambda x: sparse_divergence(x, known, spec), student)
    for estimates, want, biased in zip((loss.detach(), grad), full, bucket, strict=True):
        sigma = estimates.std(0) / math.sqrt(redraws)
        z = (estimates.mean(0) - want[0]) / sigma.clamp_min(1e-12)
        assert z.abs().max() < (4 if z.ndim else 3), z
        off = ((biased - want)[0].abs() / sigma.clamp_min(1e-12)).max()
        assert off > 9  # the tail as one category would not pass


@pytest.mark.parametrize("max_ratio", [None, 4.0])
@pytest.mark.parametrize(("kind", "beta"), PAIRS)
def test_zero_at_the_teacher(kind, beta, max_ratio):
    _, teacher = pair()
    spec = DivergenceSpec(kind, beta, T)
    known = sampled(teacher, TOP, 7, T, flat=0.5)
    call = lambda x: sparse_divergence(x, known, spec, max_ratio=max_ratio)
    loss, grad = value_and_grad(call, teacher + 3.0)
    assert loss.abs().max() < 1e-14
    assert kind == "tvd" or grad.abs().max() < 1e-14  # at its kink the sign is that of a rounding
    moved = teacher.clone()
    moved[:, : V // 2] += 0.1
    assert call(moved).min() > 1e-5


def test_the_soft_cross_entropy_is_the_forward_kl_and_the_entropy():
    student, teacher = pair()
    known = all_drawn(teacher, TOP, T)
    soft, kl = (
        value_and_grad(lambda x, s=spec: sparse_divergence(x, known, s), student)
        for spec in (DivergenceSpec("soft_ce", 0.5, T), DivergenceSpec("forward_kl", 0.5, T))
    )
    assert_same((soft[0] - kl[0], soft[1]), (reference.entropy(teacher, T), kl[1]))


def test_a_teacher_of_draws_only():
    """Without entries the forward KL is the mean over draws of r - 1 - log r, r = q / p."""
    student, teacher = pair()
    known = sampled(teacher, 0, 50, T)
    assert known.ids.shape == (N, 0)
    spec = DivergenceSpec("forward_kl", 0.5, T)
    log_q = (student / T).log_softmax(-1)
    log_r = log_q.gather(-1, known.samples.ids) - known.samples.log_probs
    want = (log_r.exp() - 1 - log_r).mean(-1)
    got = sparse_divergence(student, known, spec, max_ratio=None)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    assert gradcheck(
        lambda x: sparse_divergence(x, known, spec, max_ratio=None), (student.requires_grad_(),)
    )
    for tail, asked in [("bucket", spec), ("renorm", spec)]:
        with pytest.raises(ValueError, match="a teacher without entries has a loss by its samples"):
            sparse_divergence(student, known, asked, tail=tail)


def test_padding_and_missing_draws_say_nothing():
    student, teacher = pair()
    spec = DivergenceSpec("jsd", 0.3, T)
    known = sampled(teacher, TOP, 7, T)
    want = value_and_grad(lambda x: sparse_divergence(x, known, spec), student)
    pad = torch.nn.functional.pad
    ids, log_probs, log_weights = known.samples
    padded = known._replace(
        ids=pad(known.ids, (1, 2), value=-1),
        log_probs=pad(known.log_probs, (1, 2), value=-0.5),
        samples=TailSamples(
            pad(ids, (2, 1), value=-3), pad(log_probs, (2, 1)), pad(log_weights, (2, 1))
        ),
    )
    assert_same(value_and_grad(lambda x: sparse_divergence(x, padded, spec), student), want)
    none = known._replace(samples=known.samples._replace(log_weights=ids * 0.0 - math.inf))
    got = value_and_grad(lambda x: sparse_divergence(x, none, spec), student)
    bucket = value_and_grad(lambda x: sparse_divergence(x, known, spec, tail="bucket"), student)
    assert_same(got, bucket)


def test_a_row_whose_entries_are_all_padding_keeps_its_first_entry():
    student, teacher = pair()
    known = sampled(teacher, 0, 9, T)
    padded = known._replace(
        ids=torch.full((N, 3), -1), log_probs=torch.zeros(N, 3, dtype=torch.float64)
    )
    spec = DivergenceSpec("forward_kl", 0.5, T)
    want = value_and_grad(lambda x: sparse_divergence(x, known, spec), student)
    assert_same(value_and_grad(lambda x: sparse_divergence(x, padded, spec), student), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_low_precision_keeps_the_digits_of_float64(kind, beta, dtype):
    student, teacher = peaked(4, 1023)
    student = student.to(dtype)
    known = sampled(teacher.double(), TOP, 8, T)
    short = known._replace(
        log_probs=known.log_probs.float(),
        log_tail=known.log_tail.float(),
        samples=known.samples._replace(log_probs=known.samples.log_probs.float()),
    )
    spec = DivergenceSpec(kind, beta, T)
    want = value_and_grad(lambda x: by_reference(x, known, spec, 4.0), student.double())
    loss, grad = value_and_grad(lambda x: sparse_divergence(x, short, spec), student)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), want[0], rtol=2e-4, atol=1e-6)
    scale = want[1].abs().amax(-1, keepdim=True)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    assert ((grad.double() - want[1]).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("mask", [[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0], [0] * 6])
def test_mask_and_leading_dimensions(mask):
    student, teacher = pair()
    spec = DivergenceSpec("forward_kl", 0.5, T)
    known = sampled(teacher, TOP, 7, T)
    want = value_and_grad(lambda x: sparse_divergence(x, known, spec), student)
    keep = torch.tensor(mask, dtype=torch.bool)
    got = value_and_grad(lambda x: sparse_divergence(x, known, spec, mask=keep), student)
    assert_same(got, (want[0] * keep, want[1] * keep[:, None]))
    short = student.to(torch.bfloat16)  # whose gradient is formed in the backward
    wanted = value_and_grad(lambda x: sparse_divergence(x, known, spec), short)
    got = value_and_grad(lambda x: sparse_divergence(x, known, spec, mask=keep), short)
    assert_same(got, (wanted[0] * keep, wanted[1] * keep[:, None]))
    folded = known._replace(
        ids=known.ids.view(2, 3, -1),
        log_probs=known.log_probs.view(2, 3, -1),
        log_tail=known.log_tail.view(2, 3),
        samples=TailSamples(*(x.view(2, 3, -1) for x in known.samples)),
    )
    got = sparse_divergence(student.view(2, 3, V), folded, spec, mask=keep.view(2, 3))
    assert_same((got.view(-1),), (want[0] * keep,))


@pytest.mark.parametrize("level", ["token", "token_rescale"])
def test_a_clip_of_tokens_bounds_the_sum(level):
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, T)
    free = DivergenceSpec("jsd", 0.3, T, "t2")
    value, grad = value_and_grad(lambda x: sparse_divergence(x, known, free), student)
    bucket = sparse_divergence(student, known, free, tail="bucket")
    bound = float((bucket.max() + value.max()) / 2 / free.scale)
    over = value > bound * free.scale
    assert over.any()
    assert not (bucket > bound * free.scale).any()  # a clip of the category alone would do nothing
    bound = float(value.median() / free.scale)
    over = value > bound * free.scale
    factor = torch.where(over, 0.0 if level == "token" else bound * free.scale / value, 1.0)
    spec = replace(free, clip=bound, clip_level=level)
    got = value_and_grad(lambda x: sparse_divergence(x, known, spec), student)
    assert_same(got, (value.clamp(max=bound * free.scale), grad * factor[:, None]))


def test_tail_rules():
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, T)
    plain = known._replace(samples=None)
    spec = DivergenceSpec("jsd", 0.3, T)
    value = lambda t, s, **k: sparse_divergence(student, t, s, **k)
    assert torch.equal(value(known, spec), value(known, spec, tail="sampled"))
    assert torch.equal(value(known, spec, tail="bucket"), value(plain, spec))
    renormalised = replace(spec, missing="renormalise")
    assert torch.equal(value(known, spec, tail="renorm"), value(plain, renormalised))
    assert torch.equal(value(known, renormalised), value(plain, renormalised))
    top = replace(spec, support="teacher_topk", top_k=3)
    assert torch.equal(value(known, top), value(plain, top))
    assert not torch.equal(value(known, spec), value(plain, spec))


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"tail": "ghost"}, "tail must be one of .* got 'ghost'"),
        ({}, {"max_ratio": 0.5}, "max_ratio must be at least 1, or None, got 0.5"),
        ({"missing": "zero"}, {"tail": "sampled"}, "missing 'tail', got 'full' and 'zero'"),
        ({"missing": "zero"}, {"tail": "bucket"}, "'bucket' needs missing 'tail', got 'zero'"),
        ({"missing": "zero"}, {"tail": "renorm"}, "'renorm' needs missing .* got 'zero'"),
        (
            {"support": "teacher_topk", "top_k": 2},
            {"tail": "sampled"},
            "support 'full' and missing 'tail', got 'teacher_topk'",
        ),
        ({"clip": 0.5}, {}, "clip_level 'vocab_entry' bounds every entry"),
    ],
)
def test_rules_that_contradict(fields, options, message):
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, 1.0)
    with pytest.raises(ValueError, match=message):
        sparse_divergence(student, known, DivergenceSpec(**fields), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.full((N, 7), V)}, f"samples' ids must be below the vocabulary of {V}"),
        ({"ids": torch.zeros(N, 7)}, "samples' ids must be int64"),
        ({"log_weights": torch.zeros(N, 6)}, r"must be \[6, n\], got .*\[6, 6\]"),
        (None, "tail 'sampled' needs a teacher with samples"),
    ],
)
def test_samples_that_cannot_be(change, message):
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, 1.0)
    bad = None if change is None else known.samples._replace(**change)
    with pytest.raises(ValueError, match=message):
        sparse_divergence(student, known._replace(samples=bad), DivergenceSpec(), tail="sampled")


def test_reverse_kls_are_warned_of_once(caplog):
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, 1.0)
    module._warn_of_reverse.cache_clear()
    with caplog.at_level(logging.WARNING, "metal_ops"):
        for kind in ("forward_kl", "jsd", "reverse_kl", "reverse_kl"):
            sparse_divergence(student, known, DivergenceSpec(kind))
        sparse_divergence(student, known, DivergenceSpec("mixed_kl"), tail="bucket")
    assert [r.getMessage().split()[0] for r in caplog.records] == ["reverse_kl"]


def test_masked_vocabularies():
    """Entries of the student at -inf: a draw there is an infinite forward KL, nothing to a JSD."""
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, T)
    hit = student.scatter(-1, known.samples.ids[:, :1], -math.inf)
    assert sparse_divergence(hit, known, DivergenceSpec("forward_kl", 0.5, T)).isposinf().all()
    for kind in ("reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "alpha"):
        loss, grad = value_and_grad(
            lambda x, k=kind: sparse_divergence(x, known, DivergenceSpec(k, 0.3, T)), hit
        )
        assert loss.isfinite().all()
        assert grad.isfinite().all()
    # a student without a tail has the loss of the one category
    bare = torch.full_like(student, -math.inf).scatter(-1, known.ids, 0.0)
    spec = DivergenceSpec("jsd", 0.3, T)
    bucket = sparse_divergence(bare, known, spec, tail="bucket")
    torch.testing.assert_close(sparse_divergence(bare, known, spec), bucket)


def test_nearly_certain_teachers_keep_their_digits():
    """A tail of exp(-90) on one side only: odds beyond the range of float32."""
    _, teacher = pair()
    best = teacher.argmax(-1, keepdim=True)
    known = sampled(teacher.scatter(-1, best, 100.0), 1, 7, 1.0)
    assert known.log_tail.max() < -87
    student = torch.randn(N, V)
    for kind, beta in PAIRS:
        spec = DivergenceSpec(kind, beta)
        want = value_and_grad(
            lambda x, s=spec: by_reference(x, known, s, math.inf), student.double()
        )
        got = value_and_grad(
            lambda x, s=spec: sparse_divergence(x, known, s, max_ratio=None), student
        )
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got[1].double(), want[1], rtol=1e-3, atol=1e-5)


def test_opcheck_and_second_derivatives():
    student, teacher = pair()
    known = sampled(teacher, TOP, 7, 1.0)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0])
    text = DivergenceSpec("jsd", 0.3).resolved_text
    leaf = student.requires_grad_()
    for formed in (True, False):
        args = (leaf, *known[:3], *known.samples, weights, text, 4.0, formed, "auto")
        torch.library.opcheck(torch.ops.metal_ops.sampled_divergence, args)
    loss = sparse_divergence(leaf, known, DivergenceSpec("jsd", 0.3)).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()
