"""Losses against sparse teachers: from hidden states as from logits, statistics, refusals."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import DivergenceLoss, SampledTokenLoss, Terms, Tokens, chunks
from hf_distill.models.signals import Head, Signal, TailRule
from metal_ops import DivergenceSpec, SparseTeacher, reference, sparse_divergence
from tests.metal_ops.ops.tails import all_drawn, sampled, with_powers
from tests.metal_ops.ops.watching import Watch

N, V, H = 7, 23, 5
ORDERS = (0.5, 0.75, 2.0)
MEASURED = {"soft", "student_entropy", "teacher_entropy", "top1_agreement"}


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, SparseTeacher]:
    """(hidden, weight and bias of the head, teacher at temperature 1)."""
    hidden, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((N, H), (V, H), (V,)))
    teacher = 2 * torch.randn(N, V, dtype=torch.float64)
    return hidden, weight, bias, with_powers(teacher, sampled(teacher, 4, 6, 1.0), ORDERS)


def tokens_of(apart: bool = True) -> Tokens:
    """Tokens of which one has no soft loss; weights of the hard loss are others if `apart`."""
    weights, hard_weights = torch.rand(N), torch.rand(N)
    weights[2] = 0.0
    targets = torch.randint(0, V, (N,))
    return Tokens(targets, hard_weights, corrected=weights) if apart else Tokens(targets, weights)


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, leaves)


def both(
    loss: DivergenceLoss, teacher: Signal, inputs: tuple[Tensor, ...], tokens: Tokens
) -> list[tuple[Terms, tuple[Tensor, ...]]]:
    hidden, weight, bias = leaves = tuple(x.requires_grad_() for x in inputs)
    one = loss(Signal(hidden=hidden, head=Head(weight, bias, 1.5, 4.0)), teacher, tokens)
    logits = reference.head(hidden, weight, bias, 1.5, 4.0)
    other = loss(Signal(logits=logits), teacher, tokens)
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
    pairs = both(DivergenceLoss(spec, alpha), signal, tuple(inputs), tokens_of())
    (mine, my_gradients), (other, gradients_wanted) = pairs
    torch.testing.assert_close(mine.loss, other.loss)
    assert mine.metrics.keys() == MEASURED | {"clipped"} | ({"hard"} if alpha < 1 else set())
    torch.testing.assert_close(mine.metrics, other.metrics)
    torch.testing.assert_close(my_gradients, gradients_wanted)
    assert all(float(x.abs().max()) > 1e-3 for x in my_gradients)


def test_the_terms_are_the_divergence_and_the_cross_entropy() -> None:
    hidden, weight, bias, teacher = parts()
    tokens = tokens_of()
    spec = DivergenceSpec("forward_kl", 0.5, 2.0)
    student = Signal(hidden=hidden, head=Head(weight, bias))
    given = Signal(sparse=teacher, tail=TailRule("sampled", 1.5))
    terms = DivergenceLoss(spec, 0.3)(student, given, tokens)
    logits = hidden @ weight.T + bias
    soft = sparse_divergence(logits, teacher.at(2.0), spec, tail="sampled", max_ratio=1.5)
    hard = F.cross_entropy(logits, tokens.targets, reduction="none")
    counted = torch.where(tokens.soft_weights == 0, 0.0, soft)
    torch.testing.assert_close(terms.metrics["soft"], counted)
    torch.testing.assert_close(terms.metrics["hard"], hard)
    want = 0.3 * (tokens.corrected * soft).sum() + 0.7 * (tokens.weights * hard).sum()
    torch.testing.assert_close(terms.loss, want)
    bucket = sparse_divergence(logits, teacher.at(2.0), spec, tail="bucket")
    assert (soft - bucket).abs().max() > 1e-3


def test_the_rules_bound_reaches_the_gradient() -> None:
    """It bounds what a draw's gradient weighs, and not the value."""
    hidden, weight, bias, teacher = parts(torch.float32)
    tokens = tokens_of()
    found = []
    for max_ratio in (1.0, None):
        leaf = hidden.detach().clone().requires_grad_()
        student = Signal(hidden=leaf, head=Head(weight, bias))
        given = Signal(sparse=teacher, tail=TailRule("sampled", max_ratio))
        terms = DivergenceLoss(DivergenceSpec("forward_kl", 0.5, 2.0), 0.3)(student, given, tokens)
        found.append((terms.metrics["soft"], torch.autograd.grad(terms.loss, leaf)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() > 1e-3


def test_no_token() -> None:
    hidden, weight, bias, teacher = parts(torch.float32)
    none = slice(0, 0)
    student = Signal(hidden=hidden[none].requires_grad_(), head=Head(weight, bias))
    signal = Signal(sparse=teacher.rows(none))
    terms = DivergenceLoss(DivergenceSpec(), 0.5)(student, signal, tokens_of().rows(none))
    assert terms.loss == 0
    assert terms.metrics.keys() == MEASURED | {"hard"}
    assert all(x.shape == (0,) for x in terms.metrics.values())


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", V)  # a token at a time
    num_tokens = 40
    teacher = torch.randn(num_tokens, V, dtype=torch.float64)
    signal = Signal(sparse=sampled(teacher, 4, 6, 1.0))
    hidden = torch.randn(num_tokens, 2, requires_grad=True)
    weight = torch.randn(V, 2, requires_grad=True)
    tokens = Tokens(torch.randint(0, V, (num_tokens,)), torch.rand(num_tokens))
    with Watch() as mode:
        student = Signal(hidden=hidden, head=Head(weight, None))
        DivergenceLoss(DivergenceSpec(), 0.5)(student, signal, tokens).loss.backward()
    assert max(mode.sizes) < num_tokens * V // 2


def test_statistics() -> None:
    """With the whole tail drawn the teacher is known entirely."""
    logits = torch.randn(N, V, dtype=torch.float64)
    teacher = 2 * torch.randn(N, V, dtype=torch.float64)
    tokens = tokens_of()._replace(corrected=None)
    loss = DivergenceLoss(DivergenceSpec("jsd", 0.5, 1.5), 1.0)

    def stats(signal: Signal, logits: Tensor = logits) -> dict[str, Tensor]:
        metrics = loss(Signal(logits=logits), signal, tokens).metrics
        assert metrics.keys() == MEASURED
        return {name: value for name, value in metrics.items() if name != "soft"}

    exact = stats(Signal(logits=teacher))
    for top_k in (0, 4):
        known = all_drawn(teacher, top_k, 1.5)
        torch.testing.assert_close(stats(Signal(sparse=known)), exact)
    bound = stats(Signal(sparse=known._replace(samples=None)))["teacher_entropy"]
    assert (exact["teacher_entropy"] - bound).min() > 1e-3
    none = known._replace(samples=known.samples._replace(ids=known.samples.ids * 0 - 1))
    torch.testing.assert_close(stats(Signal(sparse=none))["teacher_entropy"], bound)
    assert stats(Signal(sparse=known), teacher * 1.1)["top1_agreement"].all()


def test_what_a_bound_of_the_draws_lowers_is_not_clipped() -> None:
    hidden, weight, bias, teacher = parts()
    spec = DivergenceSpec("jsd", temperature=2.0, clip=1e3, clip_level="token")
    for ratio in (1.01, None):
        signal = Signal(sparse=teacher, tail=TailRule("sampled", ratio))
        student = Signal(hidden=hidden, head=Head(weight, bias))
        terms = DivergenceLoss(spec, 1.0)(student, signal, tokens_of(apart=False))
        assert not terms.metrics["clipped"].any()


def test_padding_is_no_entry_whatever_its_number() -> None:
    logits, (*_, teacher) = torch.randn(N, V), parts()
    padded = teacher._replace(
        ids=F.pad(teacher.ids, (0, 2), value=-1),
        log_probs=F.pad(teacher.log_probs, (0, 2), value=-1.0),
    )
    loss = DivergenceLoss(DivergenceSpec("jsd"), 1.0)
    one, other = (
        loss(Signal(logits=logits), Signal(sparse=x), tokens_of(apart=False)).metrics
        for x in (teacher, padded)
    )
    assert one.keys() == MEASURED
    torch.testing.assert_close(one, other)


def test_a_temperature_that_is_not_served() -> None:
    hidden, weight, bias, teacher = parts()
    loss = DivergenceLoss(DivergenceSpec(temperature=5.0), 1.0)
    given = Signal(sparse=teacher), tokens_of(apart=False)
    with pytest.raises(ValueError, match=r"serve temperatures from 0.5 to 4, got 5"):
        loss(Signal(hidden=hidden, head=Head(weight, bias)), *given)
    with pytest.raises(ValueError, match=r"serve temperatures from 0.5 to 4, got 5"):
        loss(Signal(logits=hidden @ weight.T), *given)


def test_losses_of_sampled_tokens_need_logits() -> None:
    hidden, weight, bias, teacher = parts()
    loss = SampledTokenLoss("k3", 1.0)
    given = Signal(sparse=teacher), tokens_of(apart=False)
    with pytest.raises(ValueError, match="a sparse signal has no logits: it knows 4 entries"):
        loss(Signal(hidden=hidden, head=Head(weight, bias)), *given)
    with pytest.raises(ValueError, match="a sparse signal has no logits: it knows 4 entries"):
        loss(Signal(logits=hidden @ weight.T), *given)
