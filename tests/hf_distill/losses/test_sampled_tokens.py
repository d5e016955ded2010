"""Losses of sampled tokens: their gradients in expectation, both paths, clip and memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.losses import (
    SAMPLED_KINDS,
    SampledTokenLoss,
    Terms,
    Tokens,
    chunks,
    not_finite,
)
from hf_distill.models.signals import Head, Signal
from metal_ops import reference
from tests.metal_ops.ops.watching import Watch

N, V, H = 7, 11, 8


def draw(dtype: torch.dtype = torch.float64, vocab: int = V, count: int = N) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(count, H, dtype=dtype),
        "weight": torch.randn(vocab, H, dtype=dtype),
        "bias": torch.randn(vocab, dtype=dtype),
        "teacher_hidden": torch.randn(count, 6, dtype=dtype),
        "teacher_weight": torch.randn(vocab, 6, dtype=dtype),
        "targets": torch.randint(0, vocab, (count,)),
        "weights": torch.rand(count, dtype=dtype),
        "hard_weights": torch.rand(count, dtype=dtype),
    }


def signal(given: dict[str, Tensor]) -> Signal:
    return Signal(hidden=given["teacher_hidden"], head=Head(given["teacher_weight"], None, 0.8))


def run(loss: SampledTokenLoss, given: dict[str, Tensor], path: str) -> tuple[Terms, list[Tensor]]:
    """The terms, and the gradients of hidden states, weight and bias times 3."""
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    tokens = Tokens(given["targets"], given["hard_weights"], corrected=given["weights"])
    student = Signal(hidden=leaves[0], head=Head(*leaves[1:], 0.7, 3.0))
    if path == "logits":
        student = Signal(logits=reference.head(*leaves, 0.7, 3.0))
    terms = loss(student, signal(given), tokens)
    return terms, list(torch.autograd.grad(3 * terms.loss, leaves))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "limit"), [("policy_gradient", "reverse"), ("k3", "forward")])
def test_the_expected_gradient_is_that_of_a_kl(kind: str, limit: str, temperature: float) -> None:
    """Every token once, with its probability as weight: the expectation over y ~ q, exactly."""
    torch.manual_seed(1)
    z, w = (2 * torch.randn(V, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    log_q, log_p = (x.div(temperature).log_softmax(-1) for x in (z, w))
    kl = {
        "reverse": (log_q.exp() * (log_q - log_p)).sum(),
        "forward": (log_p.exp() * (log_p - log_q)).sum(),
    }
    grads = {
        name: torch.autograd.grad(temperature**2 * value, z, retain_graph=True)[0]
        for name, value in kl.items()
    }
    assert (grads["reverse"] - grads["forward"]).abs().max() > 0.1
    loss = SampledTokenLoss(kind, 1.0, temperature, "t2")
    every = Signal(logits=w.expand(V, V))
    weights = log_q.detach().exp()
    terms = loss(Signal(logits=z.expand(V, V)), every, Tokens(torch.arange(V), weights))
    (grad,) = torch.autograd.grad(terms.loss, z)
    # roundings of 2.2e-16 in sums of 11 terms of order 1 to 30; measured: 1.1e-15
    torch.testing.assert_close(grad, grads[limit], rtol=0, atol=2e-14)
    if kind == "k3":
        value = temperature**2 * kl["reverse"].detach()
        torch.testing.assert_close(terms.loss.detach(), value, rtol=1e-13, atol=0)
        assert (terms.metrics["soft"] >= 0).all()
    mean = (weights * terms.metrics["advantage"]).sum()
    torch.testing.assert_close(mean, -kl["reverse"].detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", SAMPLED_KINDS)
def test_both_paths_are_a_plain_statement(
    monkeypatch: pytest.MonkeyPatch, kind: str, alpha: float, clip: float | None
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 3 * V)  # 3, 3 and 1 tokens
    given = draw()
    z = reference.head(given["hidden"], given["weight"], given["bias"], 0.7, 3.0)
    w = 0.8 * given["teacher_hidden"] @ given["teacher_weight"].T
    picked = torch.arange(N), given["targets"]
    log_q, log_p = ((x / 2).softmax(-1)[picked].log() for x in (z, w))
    advantage = log_p - log_q
    if kind == "policy_gradient":
        bounded = advantage if clip is None else advantage.clamp(-clip, clip)
        soft = -bounded * log_q
        clipped = bounded != advantage
    else:
        value = advantage.exp() - 1 - advantage
        soft = value if clip is None else value.clamp(max=clip)
        clipped = soft != value
    hard = -z.softmax(-1)[picked].log()
    want = alpha * (given["weights"] * 4 * soft).sum()
    want = want + (1 - alpha) * (given["hard_weights"] * hard).sum()
    loss = SampledTokenLoss(kind, alpha, 2.0, "t2", clip)
    terms, grads = run(loss, given, "hidden")
    other, other_grads = run(loss, given, "logits")
    measured = {"soft", "advantage"}
    measured |= set() if alpha == 1.0 else {"hard"}
    measured |= set() if clip is None else {"clipped"}
    # roundings of 2.2e-16 in sums of some ten terms of order 1 to 30; measured: 1.1e-14
    close: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-13}
    for found in (terms, other):
        torch.testing.assert_close(found.loss.detach(), want, **close)
        assert found.metrics.keys() == measured
        torch.testing.assert_close(found.metrics["soft"], 4 * soft, **close)
        torch.testing.assert_close(found.metrics["advantage"], advantage, **close)
        if alpha < 1:
            torch.testing.assert_close(found.metrics["hard"], hard, **close)
        if clip is not None:
            assert torch.equal(found.metrics["clipped"], clipped.double())
    assert clip is None or 0 < clipped.sum() < N
    for one, two in zip(grads, other_grads, strict=True):
        assert one.abs().max() > 0.05
        torch.testing.assert_close(one, two, **close)


@pytest.mark.parametrize("kind", SAMPLED_KINDS)
def test_a_token_that_is_cut_has_no_gradient_or_a_bounded_one(kind: str) -> None:
    given = draw()
    plain, cut = (SampledTokenLoss(kind, 1.0, clip=clip) for clip in (None, 0.5))
    z = (given["hidden"] @ given["weight"].T).requires_grad_()
    tokens = Tokens(given["targets"], torch.ones(N, dtype=torch.float64))
    free, bound = (x(Signal(logits=z), signal(given), tokens) for x in (plain, cut))
    before, after = (torch.autograd.grad(x.loss, z)[0] for x in (free, bound))
    reached = bound.metrics["clipped"].bool()
    assert 0 < reached.sum() < N
    assert torch.equal(before[~reached], after[~reached])
    if kind == "k3":
        assert torch.equal(after[reached], torch.zeros_like(after[reached]))
    else:
        factor = 0.5 / free.metrics["advantage"][reached].abs()
        torch.testing.assert_close(after[reached], before[reached] * factor[:, None])


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize("kind", SAMPLED_KINDS)
def test_a_teacher_that_is_the_student_teaches_nothing(kind: str, path: str) -> None:
    given = draw()
    head = Head(given["weight"], given["bias"])
    same = Signal(hidden=given["hidden"], head=head)
    hidden = given["hidden"].clone().requires_grad_()
    student = Signal(hidden=hidden, head=head)
    if path == "logits":
        student = Signal(logits=reference.head(hidden, head.weight, head.bias, 1.0, None))
    terms = SampledTokenLoss(kind, 1.0)(student, same, Tokens(given["targets"], given["weights"]))
    assert torch.equal(terms.metrics["advantage"], torch.zeros(N, dtype=torch.float64))
    (grad,) = torch.autograd.grad(terms.loss, hidden)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("kind", SAMPLED_KINDS)
def test_a_token_without_weight_may_be_impossible(kind: str) -> None:
    given = draw()
    z = (given["hidden"] @ given["weight"].T).requires_grad_()
    w = given["teacher_hidden"] @ given["teacher_weight"].T
    w[2, given["targets"][2]] = -torch.inf
    weights = given["weights"].clone()
    loss, student, targets = SampledTokenLoss(kind, 1.0), Signal(logits=z), given["targets"]
    terms = loss(student, Signal(logits=w), Tokens(targets, weights))
    with pytest.raises(FloatingPointError, match=r"infinite at 1 of 7 tokens \(the teacher gives"):
        raise not_finite(terms)
    weights[2] = 0.0
    terms = loss(student, Signal(logits=w), Tokens(targets, weights))
    (grad,) = torch.autograd.grad(terms.loss, z)
    assert grad.isfinite().all()
    assert grad[2].abs().max() == 0
    assert terms.metrics["advantage"].isnan().tolist() == [i == 2 for i in range(N)]
    w[0], weights[2] = torch.nan, 1.0
    terms = loss(student, Signal(logits=w), Tokens(targets, weights))
    with pytest.raises(FloatingPointError, match="teacher logits are NaN at 1 of 7 tokens"):
        raise not_finite(terms)
    terms = loss(Signal(logits=z * torch.nan), student, Tokens(targets, weights))
    with pytest.raises(FloatingPointError, match="student logits are NaN at 7 of 7 tokens"):
        raise not_finite(terms)


def test_logits_exist_for_a_chunk_of_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    count, vocab = 256, 300
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 10 * vocab)
    given = draw(torch.float32, vocab, count)
    loss = SampledTokenLoss("k3", 0.5)
    with Watch() as watch:
        run(loss, given, "hidden")
        student = Signal(hidden=given["hidden"], head=Head(given["weight"], None))
        chunks.log_probs(student, given["targets"])
    assert max(watch.sizes) == 10 * vocab
    with Watch() as watch:
        run(loss, given, "logits")
    assert max(watch.sizes) == count * vocab


def test_log_probs_of_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 3 * V)
    given = draw()
    head = Head(given["weight"].requires_grad_(), given["bias"], 0.7, 3.0)
    found = chunks.log_probs(Signal(hidden=given["hidden"], head=head), given["targets"], 2.0)
    z = reference.head(given["hidden"], head.weight, head.bias, 0.7, 3.0).detach()
    want = (z / 2).softmax(-1)[torch.arange(N), given["targets"]].log()
    torch.testing.assert_close(found, want, rtol=1e-14, atol=1e-14)
    assert not found.requires_grad
    none = Signal(hidden=given["hidden"][:0], head=head)
    nothing = chunks.log_probs(none, given["targets"][:0])
    assert nothing.shape == (0,)


def test_no_tokens_have_a_loss_of_zero_with_a_gradient() -> None:
    given = draw(count=0)
    terms, grads = run(SampledTokenLoss("k3", 0.5), given, "hidden")
    assert terms.loss == 0
    assert [g.shape for g in grads] == [(0, H), (V, H), (V,)]
    assert all(g.abs().sum() == 0 for g in grads)


def test_weights_that_are_all_zero_have_a_gradient_of_zero() -> None:
    given = draw()
    given["weights"] = given["hard_weights"] = torch.zeros(N, dtype=torch.float64)
    terms, grads = run(SampledTokenLoss("k3", 0.5), given, "hidden")
    assert terms.loss == 0
    assert all(g.abs().sum() == 0 for g in grads)


def test_only_what_is_trained_gets_a_gradient() -> None:
    given = draw()
    hidden = given["hidden"].requires_grad_()
    rest = (given["targets"], given["weights"])
    student = Signal(hidden=hidden, head=Head(given["weight"], given["bias"]))
    loss, _ = chunks.cross_entropy(student, *rest)
    (grad,) = torch.autograd.grad(loss, hidden)
    want = given["hidden"].detach().requires_grad_()
    dense = torch.log_softmax(want @ given["weight"].T + given["bias"], -1)
    total = -(given["weights"] * dense[torch.arange(N), given["targets"]]).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(total, want)[0], rtol=0, atol=1e-14)
    with torch.no_grad():
        assert not chunks.cross_entropy(student, *rest)[0].requires_grad


def test_evaluation_forms_no_gradient() -> None:
    given = draw(torch.float32)
    hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))
    student = Signal(hidden=hidden, head=Head(weight, None))
    rest = (given["targets"], given["weights"])
    with torch.no_grad(), Watch() as watch:
        chunks.cross_entropy(student, *rest)
    assert watch.products == 1
    with Watch() as watch:
        chunks.cross_entropy(student, *rest)
    assert watch.products == 3


def test_a_second_derivative_is_an_error() -> None:
    given = draw()
    hidden = given["hidden"].requires_grad_()
    rest = (given["targets"], given["weights"])
    student = Signal(hidden=hidden, head=Head(given["weight"], None))
    loss, _ = chunks.cross_entropy(student, *rest)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_small_weights_do_not_vanish_in_float16() -> None:
    given = draw()
    small = {name: x.half() for name, x in given.items() if x.is_floating_point()}
    exact = draw()
    for name in ("hidden", "weight", "bias"):
        exact[name] = small[name].double()
    weights = 1e-6 * given["weights"]
    grads = []
    for each, factor in ((small, 2.0**16), (exact, 1.0)):
        hidden = each["hidden"].clone().requires_grad_()
        student = Signal(hidden=hidden, head=Head(each["weight"], each["bias"]))
        loss, _ = chunks.cross_entropy(student, given["targets"], weights)
        grads.append(torch.autograd.grad(loss * factor, hidden)[0].double() / factor)
    # float16 rounds by 2^-11, the product sums 11 entries; without the unit the gradient, of some
    # 1e-6, would have one digit (smallest float16: 6e-8)
    assert (grads[0] - grads[1]).abs().max() <= 2**-8 * grads[1].abs().max()


@pytest.mark.parametrize("kind", SAMPLED_KINDS)
def test_autocast_over_several_chunks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 3 * V)
    given = draw(torch.float32)
    loss = SampledTokenLoss(kind, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        terms, grads = run(loss, given, "hidden")
        _, other = run(loss, given, "logits")
    assert terms.loss.dtype == torch.float32
    _, exact = run(loss, given, "hidden")
    for one, two, want in zip(grads, other, exact, strict=True):
        assert one.dtype == torch.float32
        size = want.norm()
        # bfloat16 rounds by 2^-9, and the loss is exponential in logits of up to 3
        assert 0 < (one - want).norm() <= 2**-4 * size
        assert (one - two).norm() <= 2**-4 * size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "k2"}, r"kind must be one of \('policy_gradient', 'k3'\), got 'k2'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature_scaling": "t3"}, "temperature_scaling must be one of"),
        ({"clip": 0.0}, "clip must be positive and finite, or None, got 0.0"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampledTokenLoss(**{"kind": "k3", "alpha": 1.0} | settings)
