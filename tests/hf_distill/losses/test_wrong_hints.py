"""The mean probability over K wrong hints: its logarithm, weights of tokens and targets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_distill.losses.base import Tokens
from hf_distill.losses.contrast import (
    ContrastConfig,
    ContrastLoss,
    ContrastWeights,
    contrast_factors,
)
from hf_distill.losses.log_mean import LogMean
from hf_distill.losses.step import step_terms
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec, Head
from tests.hf_distill.losses.test_contrast import KL, TARGETS, H, N, V, drawn

ABSENT = torch.tensor([[False] * N, [False, True] + [False] * 5, [False, True, True] + [False] * 4])


def mean_of(values: list[Tensor]) -> Tensor:
    mean = LogMean()
    for each, absent in zip(values, ABSENT, strict=True):
        mean.add(each, absent)
    return mean.value()


def by_hand(values: list[Tensor]) -> Tensor:
    """In float64, row by row, over the values that a row has."""
    rows = []
    for i in range(N):
        own = [x[i].double().exp() for x, absent in zip(values, ABSENT, strict=True) if ~absent[i]]
        rows.append((sum(own) / len(own)).log())
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(N,), (N, V)])
def test_the_logarithm_of_the_mean(shape: tuple[int, ...]) -> None:
    values = [drawn(seed, *shape) * 20 for seed in (1, 2, 3)]
    values[0][3] = values[2][3] = -torch.inf
    values[1][3] = -200.0  # exp of it is 0 in float32
    # measured: 2e-7
    torch.testing.assert_close(mean_of(values), by_hand(values).float(), rtol=2e-6, atol=0.0)
    for x in values:
        x[4] = -torch.inf
    assert (mean_of(values)[4] == -torch.inf).all()


def test_the_mean_of_equal_values_is_that_value() -> None:
    """Bit for bit, whatever their number."""
    same = drawn(1)
    same[2, 5] = -torch.inf
    assert torch.equal(mean_of([same, same.clone(), same.clone()]), same)


def hidden_signals(*seeds: int) -> list[Signal]:
    head = Head(drawn(5, V, H))
    states = [Signal(hidden=drawn(seed, N, H), head=head) for seed in seeds]
    return [replace(x, absent=absent) for x, absent in zip(states[1:], ABSENT, strict=False)] + [
        states[0]
    ]


def teacher_of(*seeds: int) -> Signal:
    *wrong, right = hidden_signals(*seeds)
    return replace(right, contrast=wrong[0], more_contrasts=tuple(wrong[1:]))


def log_probs(signal: Signal) -> Tensor:
    return signal.dense().double().log_softmax(-1)


def test_a_tokens_weight_is_that_of_the_mean_over_wrong_hints() -> None:
    teacher = teacher_of(6, 7, 8, 9)
    found = contrast_factors(ContrastWeights(0.6, ContrastConfig(scale=3.0)), teacher, TARGETS)
    wrong = by_hand([log_probs(x) for x in teacher.contrasts])
    e = (log_probs(teacher) - wrong)[torch.arange(N), TARGETS]
    want = 0.4 + 0.6 * torch.tanh(e.abs() / 3.0)
    torch.testing.assert_close(found.double(), want, rtol=0.0, atol=2e-6)  # measured: 2e-7
    alone = contrast_factors(
        ContrastWeights(0.6, ContrastConfig(scale=3.0)),
        replace(teacher, more_contrasts=()),
        TARGETS,
    )
    assert (alone - found).abs().max() > 0.05


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_target_is_that_of_the_mean_over_wrong_hints(share: float) -> None:
    teacher, logits = teacher_of(6, 7, 8, 9), drawn(0).requires_grad_()
    config = ContrastConfig("target", strength=0.7, bound=1.5)
    tokens = Tokens(TARGETS, torch.full((N,), 1 / N))
    loss = ContrastLoss(KL, share=share, config=config)
    terms = step_terms(loss, Signal(logits=logits), teacher, tokens)
    terms.loss.backward()
    q, p = logits.detach().double().log_softmax(-1), log_probs(teacher)
    d = p - by_hand([log_probs(x) for x in teacher.contrasts])
    d = d - d.mean(-1, keepdim=True)
    target = ((1 - share) * p + share * (q + 0.7 * 1.5 * torch.tanh(d / 1.5))).log_softmax(-1)
    kl = (target.exp() * (target - q)).sum(-1)
    torch.testing.assert_close(terms.metrics["soft"].double(), kl, rtol=1e-5, atol=1e-6)
    gradient = (q.exp() - target.exp()) / N
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_equal_hints_give_no_signal_at_all(kind: str) -> None:
    """Losses and gradients are 0, bit for bit, for any number of wrong hints."""
    teacher, logits = teacher_of(6, 6, 6, 6), drawn(0).requires_grad_()
    tokens = Tokens(TARGETS, torch.full((N,), 1 / N))
    loss = ContrastLoss(DivergenceSpec(kind), config=ContrastConfig("target"))
    terms = step_terms(loss, Signal(logits=logits), teacher, tokens)
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert not logits.grad.any()
    weighed = contrast_factors(ContrastWeights(1.0, ContrastConfig()), teacher, TARGETS)
    assert weighed.tolist() == [0.0] * N


def test_further_contrasts_are_cut_like_the_first() -> None:
    signal = teacher_of(6, 7, 8, 9)
    one, two = signal.split([3, 4])
    for k, whole in enumerate(signal.contrasts):
        assert torch.equal(one.contrasts[k].hidden, whole.hidden[:3])
        assert torch.equal(two.contrasts[k].hidden, whole.hidden[3:])
        assert one.contrasts[k].absent.tolist() == ABSENT[k, :3].tolist()
