"""Losses against sparse teachers: from hidden states as from logits, statistics, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import Objective, SampledObjective, Terms, chunks
from hf_distill.models.signals import Head, Signal, TailRule
from metal_ops import DivergenceSpec, SparseTeacher, reference, sparse_divergence
from tests.metal_ops.ops.tails import all_drawn, sampled, with_powers
from tests.metal_ops.ops.watching import Watch

N, V, H = 7, 23, 5
ORDERS = (0.5, 0.75, 2.0)


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, SparseTeacher]:
    """(hidden, weight and bias of the head, teacher at temperature 1)."""
    hidden, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((N, H), (V, H), (V,)))
    teacher = 2 * torch.randn(N, V, dtype=torch.float64)
    return hidden, weight, bias, with_powers(teacher, sampled(teacher, 4, 6, 1.0), ORDERS)


def tokens_of() -> tuple[Tensor, Tensor, Tensor]:
    weights, hard_weights = torch.rand(N), torch.rand(N)
    weights[2] = 0.0
    return torch.randint(0, V, (N,)), weights, hard_weights


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, leaves)


def both(
    objective: Objective, signal: Signal, inputs: tuple[Tensor, ...], scored: tuple[Tensor, ...]
) -> list[tuple[Terms, tuple[Tensor, ...]]]:
    hidden, weight, bias = leaves = tuple(x.requires_grad_() for x in inputs)
    one = objective.from_hidden(hidden, Head(weight, bias, 1.5, 4.0), signal, *scored)
    logits = reference.head(hidden, weight, bias, 1.5, 4.0)
    other = objective.from_logits(logits, signal, *scored)
    return [(terms, gradients(terms.loss, leaves)) for terms in (one, other)]


@pytest.mark.parametrize("rule", [TailRule(), TailRule("bucket"), TailRule("auto", None)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_hidden_states_give_what_logits_give(
    alpha: float, chunk: int, rule: TailRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", chunk * V)
    *inputs, teacher = parts()
    spec = DivergenceSpec("jsd", 0.3, 2.0, "t2", clip=0.8, clip_level="token")
    signal = Signal(sparse=teacher, tail=rule)
    pairs = both(Objective(spec, alpha), signal, tuple(inputs), tokens_of())
    (mine, my_gradients), (other, gradients_wanted) = pairs
    torch.testing.assert_close(mine.loss, other.loss)
    for name in ("soft", "hard"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name))
    torch.testing.assert_close(mine.stats, other.stats)
    torch.testing.assert_close(my_gradients, gradients_wanted)
    assert all(float(x.abs().max()) > 1e-3 for x in my_gradients)


def test_the_terms_are_the_divergence_and_the_cross_entropy() -> None:
    hidden, weight, bias, teacher = parts()
    targets, weights, hard_weights = tokens_of()
    spec = DivergenceSpec("forward_kl", 0.5, 2.0)
    rule = TailRule("sampled", 1.5)
    terms = Objective(spec, 0.3).from_hidden(
        hidden,
        Head(weight, bias),
        Signal(sparse=teacher, tail=rule),
        targets,
        weights,
        hard_weights,
    )
    logits = hidden @ weight.T + bias
    soft = sparse_divergence(logits, teacher.at(2.0), spec, tail="sampled", max_ratio=1.5)
    hard = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(terms.soft, soft)
    torch.testing.assert_close(terms.hard, hard)
    want = 0.3 * (weights * soft).sum() + 0.7 * (hard_weights * hard).sum()
    torch.testing.assert_close(terms.loss, want)
    bucket = sparse_divergence(logits, teacher.at(2.0), spec, tail="bucket")
    assert (soft - bucket).abs().max() > 1e-3


def test_the_rules_bound_reaches_the_gradient() -> None:
    """It bounds what a draw's gradient weighs, and not the value."""
    hidden, weight, bias, teacher = parts(torch.float32)
    targets, weights, hard_weights = tokens_of()
    found = []
    for max_ratio in (1.0, None):
        leaf = hidden.detach().clone().requires_grad_()
        terms = Objective(DivergenceSpec("forward_kl", 0.5, 2.0), 0.3).from_hidden(
            leaf,
            Head(weight, bias),
            Signal(sparse=teacher, tail=TailRule("sampled", max_ratio)),
            targets,
            weights,
            hard_weights,
        )
        found.append((terms.soft, torch.autograd.grad(terms.loss, leaf)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() > 1e-3


def test_no_token() -> None:
    hidden, weight, bias, teacher = parts(torch.float32)
    none = slice(0, 0)
    signal = Signal(sparse=teacher.rows(none))
    terms = Objective(DivergenceSpec(), 0.5).from_hidden(
        hidden[none].requires_grad_(), Head(weight, bias), signal, *(x[none] for x in tokens_of())
    )
    assert terms.loss == 0
    assert all(x.shape == (0,) for x in (terms.soft, terms.hard, *terms.stats))


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", V)  # a token at a time
    num_tokens = 40
    teacher = torch.randn(num_tokens, V, dtype=torch.float64)
    signal = Signal(sparse=sampled(teacher, 4, 6, 1.0))
    hidden = torch.randn(num_tokens, 2, requires_grad=True)
    weight = torch.randn(V, 2, requires_grad=True)
    targets, weights = torch.randint(0, V, (num_tokens,)), torch.rand(num_tokens)
    with Watch() as mode:
        terms = Objective(DivergenceSpec(), 0.5).from_hidden(
            hidden, Head(weight, None), signal, targets, weights
        )
        terms.loss.backward()
    assert max(mode.sizes) < num_tokens * V // 2


def test_statistics() -> None:
    """With the whole tail drawn the teacher is known entirely."""
    logits = torch.randn(N, V, dtype=torch.float64)
    teacher = 2 * torch.randn(N, V, dtype=torch.float64)
    targets, _, weights = tokens_of()
    objective = Objective(DivergenceSpec("jsd", 0.5, 1.5), 1.0)

    def stats(known: SparseTeacher) -> Any:
        return objective.from_logits(logits, Signal(sparse=known), targets, weights).stats

    exact = objective.from_logits(logits, Signal(logits=teacher), targets, weights).stats
    for top_k in (0, 4):
        known = all_drawn(teacher, top_k, 1.5)
        torch.testing.assert_close(stats(known), exact)
    bound = stats(known._replace(samples=None)).teacher_entropy
    assert (exact.teacher_entropy - bound).min() > 1e-3
    none = known._replace(samples=known.samples._replace(ids=known.samples.ids * 0 - 1))
    torch.testing.assert_close(stats(none).teacher_entropy, bound)
    agreeing = replace(objective).from_logits(teacher * 1.1, Signal(sparse=known), targets, weights)
    assert agreeing.stats.top1_agreement.all()


def test_what_a_bound_of_the_draws_lowers_is_not_clipped() -> None:
    hidden, weight, bias, teacher = parts()
    spec = DivergenceSpec("jsd", temperature=2.0, clip=1e3, clip_level="token")
    for ratio in (1.01, None):
        signal = Signal(sparse=teacher, tail=TailRule("sampled", ratio))
        objective = Objective(spec, 1.0)
        terms = objective.from_hidden(hidden, Head(weight, bias), signal, *tokens_of()[:2])
        assert not terms.stats.clipped.any()


def test_padding_is_no_entry_whatever_its_number() -> None:
    logits, (*_, teacher) = torch.randn(N, V), parts()
    padded = teacher._replace(
        ids=F.pad(teacher.ids, (0, 2), value=-1),
        log_probs=F.pad(teacher.log_probs, (0, 2), value=-1.0),
    )
    objective = Objective(DivergenceSpec("jsd"), 1.0)
    one, other = (
        objective.from_logits(logits, Signal(sparse=x), *tokens_of()[:2]) for x in (teacher, padded)
    )
    torch.testing.assert_close(one.soft, other.soft)
    torch.testing.assert_close(one.stats, other.stats)


def test_a_temperature_that_is_not_served() -> None:
    hidden, weight, bias, teacher = parts()
    objective = Objective(DivergenceSpec(temperature=5.0), 1.0)
    signal, scored = Signal(sparse=teacher), tokens_of()[:2]
    with pytest.raises(ValueError, match=r"serve temperatures from 0.5 to 4, got 5"):
        objective.from_hidden(hidden, Head(weight, bias), signal, *scored)
    with pytest.raises(ValueError, match=r"serve temperatures from 0.5 to 4, got 5"):
        objective.from_logits(hidden @ weight.T, signal, *scored)


def test_losses_of_sampled_tokens_need_logits() -> None:
    hidden, weight, bias, teacher = parts()
    objective = SampledObjective("k3", 1.0)
    signal, scored = Signal(sparse=teacher), tokens_of()[:2]
    with pytest.raises(ValueError, match="a sparse signal has no logits: it knows 4 entries"):
        objective.from_hidden(hidden, Head(weight, bias), signal, *scored)
    with pytest.raises(ValueError, match="a sparse signal has no logits: it knows 4 entries"):
        objective.from_logits(hidden @ weight.T, signal, *scored)
