"""The contrast as a weight and as a target: against float64 formulas, and equal hints."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.losses import (
    ContrastConfig,
    ContrastLoss,
    ContrastWeights,
    DivergenceLoss,
    Tokens,
    step_terms,
)
from hf_distill.losses.contrast import contrast_factors, contrast_target
from hf_distill.models import Signal
from metal_ops import DivergenceSpec, Head

N, V, H = 7, 23, 8
TARGETS = torch.arange(N) % V
KL = DivergenceSpec("forward_kl")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (N, V)), generator=torch.Generator().manual_seed(seed)) * 2


def said(right: Tensor, wrong: Tensor) -> Signal:
    return Signal(logits=right, contrast=Signal(logits=wrong))


def test_a_tokens_weight_is_that_of_the_difference_of_its_log_probabilities() -> None:
    right, wrong = drawn(1), drawn(2)
    wrong[3] = right[3] + 0.5  # the same distribution
    config = ContrastConfig(scale=0.7, threshold=0.3)
    found = contrast_factors(ContrastWeights(0.6, config), said(right, wrong), TARGETS)
    one, other = (x.double().log_softmax(-1) for x in (right, wrong))
    for i, factor in enumerate(found.tolist()):
        e = float(one[i, TARGETS[i]] - other[i, TARGETS[i]])
        g = float(torch.tanh(torch.tensor(abs(e) / 0.7, dtype=torch.float64)))
        g = g if g > 0.3 else 0.0
        assert factor == pytest.approx(0.4 + 0.6 * g, abs=1e-6)  # measured: 2e-7
    assert found[3] == pytest.approx(0.4)
    assert found.max() > 0.9


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_target_is_that_of_the_formula(share: float) -> None:
    own, right, wrong = drawn(0), drawn(1), drawn(2)
    config = ContrastConfig("target", strength=0.7, bound=1.5)
    found = contrast_target(own, right, wrong, share, config).double().softmax(-1)
    q, p, w = (x.double().log_softmax(-1) for x in (own, right, wrong))
    d = (p - w) - (p - w).mean(-1, keepdim=True)
    want = (1 - share) * p + share * (q + 0.7 * 1.5 * torch.tanh(d / 1.5))
    torch.testing.assert_close(found, want.softmax(-1), rtol=1e-5, atol=1e-9)  # measured: 6e-7


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_two_equal_hints_give_no_signal_at_all(kind: str, temperature: float) -> None:
    """Not even the rounding of a signal: losses and gradients are 0, bit for bit."""
    same, logits = drawn(1), drawn(0).requires_grad_()
    same[2, 5] = -torch.inf  # an entry that neither context allows
    spec, config = DivergenceSpec(kind, temperature=temperature), ContrastConfig("target")
    tokens = Tokens(TARGETS, torch.full((N,), 1 / N))
    terms = step_terms(
        ContrastLoss(spec, config=config), Signal(logits=logits), said(same, same), tokens
    )
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert not logits.grad.any()
    logits.grad = None
    weighed = ContrastWeights(1.0, ContrastConfig())
    plain = DivergenceLoss(DivergenceSpec("reverse_kl" if kind == "jsd" else "jsd"))
    terms = step_terms(plain, Signal(logits=logits), said(same, same), tokens, weighed)
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert not logits.grad.any()
    assert terms.metrics["contrast_factor"].tolist() == [0.0] * N


def test_entries_that_one_context_excludes_are_no_nan() -> None:
    right, wrong, logits = drawn(1), drawn(2), drawn(0).requires_grad_()
    right[0, 4], wrong[0, 4], wrong[1, 1] = -torch.inf, -torch.inf, -torch.inf
    right[2, 3] = -torch.inf
    tokens = Tokens(torch.tensor([4, 1, 3, 0, 0, 0, 0]), torch.full((N,), 1 / N))
    signal = said(right, wrong)
    weighed = contrast_factors(ContrastWeights(1.0, ContrastConfig()), signal, tokens.targets)
    assert weighed[:3].tolist() == pytest.approx([0.0, 1.0, 1.0])
    loss = ContrastLoss(KL, config=ContrastConfig("target"))
    terms = step_terms(loss, Signal(logits=logits), signal, tokens)
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_hidden_states_and_logits_give_the_same(share: float) -> None:
    """Of both sides: losses, and the gradients of hidden states and the head."""
    weight, config = drawn(5, V, H), ContrastConfig("target")
    states = [drawn(seed, N, H) for seed in (6, 7, 8)]
    tokens = Tokens(TARGETS, torch.rand(N, generator=torch.Generator().manual_seed(9)))
    found = []
    for as_logits in (False, True):
        hidden, head = states[0].clone().requires_grad_(), weight.clone().requires_grad_()
        frozen = Head(weight)
        if as_logits:
            student = Signal(logits=hidden @ head.T)
            teacher = said(*(x @ weight.T for x in states[1:]))
        else:
            student = Signal(hidden=hidden, head=Head(head))
            right, wrong = (Signal(hidden=x, head=frozen) for x in states[1:])
            teacher = Signal(hidden=right.hidden, head=frozen, contrast=wrong)
        loss = ContrastLoss(KL, share=share, config=config)
        terms = step_terms(loss, student, teacher, tokens)
        terms.loss.backward()
        found.append((terms.loss, terms.metrics["soft"], hidden.grad, head.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # measured: 4e-6


def test_at_share_0_it_is_the_plain_divergence() -> None:
    tokens, student = Tokens(TARGETS, torch.ones(N)), Signal(logits=drawn(0))
    plain = step_terms(DivergenceLoss(KL), student, Signal(logits=drawn(1)), tokens)
    off = ContrastLoss(KL, share=0.0, config=ContrastConfig("target"))
    for loss, signal in (
        (off, said(drawn(1), drawn(2))),
        (ContrastLoss(KL), Signal(logits=drawn(1))),
    ):
        assert torch.equal(step_terms(loss, student, signal, tokens).loss, plain.loss)


def test_a_signals_other_contexts_are_cut_like_it() -> None:
    signal = said(drawn(1), drawn(2))
    part = signal.rows(slice(2, 4))
    assert torch.equal(part.contrast.dense(), drawn(2)[2:4])
    _, second = signal.split([3, 4])
    assert torch.equal(second.contrast.dense(), drawn(2)[3:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "both"}, r"contrast.kind must be one of \('weight', 'target'\), got 'both'"),
        ({"scale": 0.0}, "contrast.scale must be positive and finite, got 0.0"),
        ({"strength": -1.0}, "contrast.strength must be positive and finite, got -1.0"),
        ({"bound": float("inf")}, "contrast.bound must be positive and finite, got inf"),
        ({"threshold": 1.0}, r"contrast.threshold must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastConfig(**settings)
