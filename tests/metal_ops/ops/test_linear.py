"""`linear_divergence` against its plain composition: heads, divergence, cross-entropy."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metal_ops import DivergenceSpec, Head, LinearTerms, linear_divergence
from metal_ops.backends import chunked
from metal_ops.backends.blocks import sizes
from metal_ops.selftest.numerics import C, assert_matches_reference, definition, exact

SPECS = [
    DivergenceSpec("forward_kl"),
    DivergenceSpec("reverse_kl", temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("jsd", beta=0.3, temperature=0.7),
]
HEADS = ["plain", "bias", "scale", "softcap", "shared", "shared but bias", "all"]


@dataclass(frozen=True)
class Case:
    """Arguments of one call. Every logit before scale and softcap is a multiple of 1/4 below 16.

    So its projection is exact in every dtype, whatever the order of the sum.
    """

    student: tuple[Tensor, Tensor, Tensor | None]
    teacher: tuple[Tensor, Tensor, Tensor | None]
    weights: Tensor
    labels: Tensor
    scale: tuple[float, float] = (1.0, 1.0)
    softcap: tuple[float | None, float | None] = (None, None)

    def heads(self) -> tuple[Head, Head]:
        sides = zip((self.student, self.teacher), self.scale, self.softcap, strict=True)
        student, teacher = (Head(*side[1:], scale, cap) for side, scale, cap in sides)
        return student, teacher

    def terms(self, spec: DivergenceSpec, alpha: float, **options) -> LinearTerms:
        options = {"labels": self.labels, "alpha": alpha, "stats": True} | options
        sides = zip((self.student[0], self.teacher[0]), self.heads(), strict=True)
        arguments = [x for side in sides for x in side]
        return linear_divergence(*arguments, spec, weights=self.weights, **options)

    def call(self, spec: DivergenceSpec, alpha: float, **options) -> Tensor:
        out = self.terms(spec, alpha, stats=False, **options)
        assert out.stats is None
        return out.loss

    def leaves(self) -> list[Tensor]:
        return [x for x in self.student if x is not None and x.requires_grad]


def quarters(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randint(-2, 3, shape) / 2).to(dtype)


def make(head: str, dtype: torch.dtype, tokens: int = 9, vocab: int = 33) -> Case:
    bias = [
        quarters(vocab, dtype=dtype) if head in ("bias", "shared but bias", "all") else None
        for _ in range(2)
    ]
    student = (quarters(tokens, 8, dtype=dtype), quarters(vocab, 8, dtype=dtype), bias[0])
    for x in student:
        if x is not None:
            x.requires_grad_()
    width = 8 if head.startswith("shared") else 12
    teacher = (quarters(tokens, width, dtype=dtype), quarters(vocab, width, dtype=dtype), bias[1])
    if head == "shared":
        teacher = (teacher[0], *student[1:])
    if head == "shared but bias":
        teacher = (teacher[0], student[1], bias[1])
    weights = torch.rand(tokens) * (torch.arange(tokens) % 3 != 1)  # with zeros
    return Case(
        student,
        teacher,
        weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        torch.randint(vocab, (tokens,)),
        (0.5, 1.5) if head in ("scale", "all") else (1.0, 1.0),
        (3.0, 2.0) if head in ("softcap", "all") else (None, None),
    )


@dataclass(frozen=True)
class Composed:
    """Float64: what the op must return, and the size of the terms behind it."""

    loss: Tensor
    soft: Tensor
    hard: Tensor
    logits: tuple[Tensor, Tensor]
    grad_logits: Tensor
    magnitude: Tensor  # of grad_logits
    grads: list[Tensor]


def compose(case: Case, spec: DivergenceSpec, alpha: float) -> Composed:
    student = [None if x is None else x.detach().double() for x in case.student]
    teacher = [None if x is None else x.detach().double() for x in case.teacher]
    leaves = [x.requires_grad_() for x in student if x is not None]
    raw = F.linear(*student)
    sides = []
    for z, scale, cap in zip((raw, F.linear(*teacher)), case.scale, case.softcap, strict=True):
        sides.append(scale * z if cap is None else cap * torch.tanh(scale * z / cap))
    soft = definition(*sides, spec)
    hard = -sides[0].log_softmax(-1)[torch.arange(len(case.labels)), case.labels]
    weights = case.weights.double()
    loss = (weights * (alpha * soft + (1 - alpha) * hard)).sum()
    grad_logits, *grads = torch.autograd.grad(loss, [raw, *leaves])
    logits = (sides[0].detach(), sides[1].detach())
    one_hot = F.one_hot(case.labels, raw.shape[1]).double()
    ce = logits[0].softmax(-1) + one_hot
    # where float32 cannot tell the sign of p - q, the slope of the total variation may be off by q
    free = exact(*(z.to(case.weights.dtype) for z in logits), spec)
    magnitude = alpha * free.grad_magnitude + (1 - alpha) * ce
    magnitude = magnitude * weights[:, None] * case.scale[0]
    return Composed(loss, soft, hard, logits, grad_logits, magnitude, grads)


def check(case: Case, spec: DivergenceSpec, alpha: float, upstream: float = 1.0) -> None:
    want, dtype = compose(case, spec, alpha), case.student[1].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = case.terms(spec, alpha)
    free = exact(*(z.to(wide) for z in want.logits), spec)  # a sign is undecided in `wide`
    x, size = free.x_max, free.loss_magnitude
    log_q = want.logits[0].log_softmax(-1).abs().amax(-1) + 1
    counts = (case.weights != 0).double()  # nothing is computed for the other tokens
    assert_matches_reference(got.soft, counts * want.soft.detach(), size, x, wide, "soft")
    assert_matches_reference(got.hard, counts * want.hard.detach(), log_q, x, wide, "hard")
    total = (case.weights.double() * (alpha * size + (1 - alpha) * log_q)).sum()
    assert_matches_reference(got.loss.detach(), want.loss.detach(), total, x.max(), wide, "loss")
    grads = torch.autograd.grad(got.loss, case.leaves(), torch.tensor(upstream, dtype=wide))
    # the gradient of the logits is rounded to `dtype` and multiplied with the other factor
    ratio = torch.finfo(dtype).eps / torch.finfo(wide).eps / C
    per_logit = want.magnitude + ratio * want.grad_logits.abs()
    hidden, weight = (t.detach().double().abs() for t in case.student[:2])
    sizes = [per_logit @ weight, per_logit.T @ hidden, per_logit.sum(0)]
    for name, grad, expected, magnitude in zip(
        ("hidden", "weight", "bias"), grads, want.grads, sizes, strict=False
    ):
        context = f"gradient of {name}"
        assert_matches_reference(
            grad, upstream * expected, upstream * magnitude, x.max(), dtype, context
        )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_composition(dtype, head, alpha):
    for spec in SPECS:
        check(make(head, dtype), spec, alpha, upstream=2.75)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("head", HEADS)
def test_float64_to_twelve_digits(head, spec):
    case = make(head, torch.float64)
    want = compose(case, spec, 0.5)
    loss = case.call(spec, 0.5)
    torch.testing.assert_close(loss, want.loss, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(torch.autograd.grad(loss, case.leaves()), want.grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_uneven_chunks_equal_one(head, monkeypatch):
    case = make(head, torch.float64, tokens=23)
    whole = case.terms(SPECS[2], 0.5)
    want = torch.autograd.grad(whole.loss, case.leaves())
    monkeypatch.setattr(sizes, "MIN_TOKENS", 1)
    monkeypatch.setitem(sizes.CHUNK_BYTES, "cpu", 4 * 33 * 5)  # 5 + 5 + 5 + 5 + 3 tokens
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 8 * 33 * 2)  # 2 + 2 + 1 rows
    parts = case.terms(SPECS[2], 0.5)
    grads = torch.autograd.grad(parts.loss, case.leaves())
    pairs = [*zip(grads, want, strict=True), (parts.loss, whole.loss)]
    pairs += [(parts.soft, whole.soft), (parts.hard, whole.hard)]
    for got, expected in (*pairs, *zip(parts.stats, whole.stats, strict=True)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uneven_chunks_match_the_composition(dtype, monkeypatch):
    monkeypatch.setattr(sizes, "MIN_TOKENS", 4)
    monkeypatch.setitem(sizes.CHUNK_BYTES, "cpu", 1)
    check(make("all", dtype, tokens=10), SPECS[0], 0.5)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_a_frozen_input_gets_no_gradient_and_costs_nothing(frozen, monkeypatch):
    case = make("all", torch.float64)
    want = compose(case, SPECS[0], 0.5)
    for index in frozen:
        case.student[index].requires_grad_(False)
    asked = []
    original = chunked.linear
    monkeypatch.setattr(chunked, "linear", lambda *a: asked.append(a[5]) or original(*a))
    loss = case.call(SPECS[0], 0.5)
    assert asked == [tuple(i not in frozen for i in range(3))]
    torch.testing.assert_close(loss, want.loss, rtol=1e-12, atol=0)
    assert loss.requires_grad == (len(frozen) < 3)
    if len(frozen) == 3:
        return
    loss.backward()
    for index, (leaf, expected) in enumerate(zip(case.student, want.grads, strict=True)):
        if index in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-13)


def test_no_grad_mode_computes_no_gradient(monkeypatch):
    case, asked = make("all", torch.float64), []
    original = chunked.linear
    monkeypatch.setattr(chunked, "linear", lambda *a: asked.append(a[5]) or original(*a))
    with torch.no_grad():
        loss = case.call(SPECS[0], 0.5)
    assert asked == [(False, False, False)]
    torch.testing.assert_close(loss, compose(case, SPECS[0], 0.5).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["all", "shared"])
def test_the_teacher_receives_no_gradient(head):
    case = make(head, torch.float64)
    teacher = [x.requires_grad_() for x in case.teacher if x is not None]
    case.call(SPECS[0], 0.5).backward()
    assert case.student[0].grad.any()
    assert all(x.grad is None for x in teacher if x is not case.student[1])


def test_a_shared_head_is_not_differentiated_as_the_teacher():
    case = make("shared", torch.float64)
    apart = replace(case, teacher=(case.teacher[0], case.teacher[1].detach().clone(), None))
    grads = [torch.autograd.grad(c.call(SPECS[0], 1.0), c.leaves()) for c in (case, apart)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("change", [{"scale": (1.0, 1.5)}, {"softcap": (None, 2.0)}])
def test_one_weight_under_two_scales_or_softcaps_is_two_heads(change):
    check(replace(make("shared", torch.float64), **change), SPECS[0], 0.5)


@pytest.mark.parametrize("head", HEADS)
def test_no_tokens(head):
    case = make(head, torch.float32, tokens=0)
    out = case.terms(SPECS[0], 0.5)
    grads = torch.autograd.grad(out.loss, case.leaves())
    assert out.loss.item() == 0
    assert out.soft.shape == out.hard.shape == out.stats.clipped.shape == (0,)
    assert [g.shape for g in grads] == [x.shape for x in case.leaves()]
    assert not any(g.any() for g in grads)


def test_without_labels_hard_is_zero():
    case = make("plain", torch.float64)
    out = case.terms(SPECS[0], 1.0, labels=None)
    assert not out.hard.any()
    torch.testing.assert_close(out.loss, compose(case, SPECS[0], 1.0).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_of_no_weight_is_silent(dtype):
    case = make("plain", dtype)
    want = [torch.autograd.grad(case.call(s, 0.5), case.leaves()) for s in SPECS]
    case.teacher[0][case.weights == 0] = torch.nan
    for spec, expected in zip(SPECS, want, strict=True):
        loss = case.call(spec, 0.5)
        assert loss.isfinite()
        for got, e in zip(torch.autograd.grad(loss, case.leaves()), expected, strict=True):
            assert torch.equal(got, e)


def test_an_infinite_divergence_without_a_share_is_silent():
    case = make("bias", torch.float64)
    want = compose(case, SPECS[0], 0.0)
    case.teacher[2][3] = -torch.inf  # the reverse KL is infinite
    out = case.terms(DivergenceSpec("reverse_kl"), 0.0)
    assert torch.equal(out.soft.isinf(), case.weights != 0)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=0)
    for got, e in zip(torch.autograd.grad(out.loss, case.leaves()), want.grads, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("level", ["vocab_entry", "token", "token_rescale"])
def test_clip_passes_through(level):
    case = make("plain", torch.float64)
    spec = DivergenceSpec("forward_kl", clip=0.1, clip_level=level)
    out = case.terms(spec, 0.5)
    want = compose(case, replace(spec, clip=None), 0.0)
    assert out.stats.clipped.any()
    soft = definition(*want.logits, spec)
    torch.testing.assert_close(out.soft, soft * (case.weights != 0), rtol=1e-12, atol=0)
