"""TAID's loss: beside a formula written out in loops, and at both ends of t."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.losses import DivergenceLoss, TaidLoss, Terms, Tokens, chunks, taid_target
from hf_distill.models.signals import Head, Signal
from metal_ops import DivergenceSpec, SparseTeacher, reference
from tests.metal_ops.ops.watching import Watch

N, V, H, TEACHER_H = 7, 23, 5, 9
T = 1.7
SPEC = DivergenceSpec("forward_kl", 0.5, T, "t2")
MEASURED = {"soft", "student_entropy", "teacher_entropy", "top1_agreement"}


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


def by_hand(
    student: Tensor, teacher: Tensor, t: float, temperature: float = T
) -> tuple[Tensor, Tensor]:
    """KL(p_t || q) of each row, and its derivatives for the student's logits, p_t constant."""
    values, slopes = [], []
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        mixed = [((1 - t) * s + t * z) / temperature for s, z in zip(ours, theirs, strict=True)]
        p, q = softmax(mixed), softmax([s / temperature for s in ours])
        values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        slopes.append([(b - a) / temperature for a, b in zip(p, q, strict=True)])
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (values, slopes))


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (2 * torch.randn(N, V, dtype=dtype)).requires_grad_(), 2 * torch.randn(N, V, dtype=dtype)


def tokens_of() -> Tokens:
    """Tokens of which one has no soft loss, and whose hard loss has other weights."""
    weights = torch.rand(N, dtype=torch.float64)
    weights[2] = 0.0
    targets, hard_weights = torch.randint(0, V, (N,)), torch.rand(N, dtype=torch.float64)
    return Tokens(targets, hard_weights, corrected=weights)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.97, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(t: float) -> None:
    student, teacher = logits()
    tokens = tokens_of()
    terms = TaidLoss(SPEC, 1.0, t=t)(Signal(logits=student), Signal(logits=teacher), tokens)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    values, slopes = by_hand(student, teacher, t)
    scale = T**2 * tokens.soft_weights
    assert abs(terms.loss.item() - (scale * values).sum().item()) < 1e-12
    assert float((gradient - scale[:, None] * slopes).abs().max()) < 1e-12
    if t > 0:
        assert terms.loss.item() > 1e-3
        assert float(gradient.abs().max()) > 1e-3


def test_the_target_is_between_the_logits() -> None:
    student, teacher = logits()
    target = taid_target(student, teacher, 0.3)
    assert not target.requires_grad
    student = student.detach()
    assert float((target - 0.7 * student - 0.3 * teacher).abs().max()) < 1e-14
    assert torch.equal(taid_target(student, teacher, 0.0), student)
    assert torch.equal(taid_target(student, teacher, 1.0), teacher)
    assert taid_target(student.bfloat16(), teacher.half(), 0.3).dtype == torch.float32


def from_hidden(
    loss: DivergenceLoss, leaves: tuple[Tensor, ...], teacher: Signal, tokens: Tokens
) -> Terms:
    hidden, weight, bias = leaves
    return loss(Signal(hidden=hidden, head=Head(weight, bias, 1.5, 4.0)), teacher, tokens)


def from_logits(
    loss: DivergenceLoss, leaves: tuple[Tensor, ...], teacher: Signal, tokens: Tokens
) -> Terms:
    hidden, weight, bias = leaves
    student = reference.head(hidden, weight, bias, 1.5, 4.0)
    return loss(Signal(logits=student), Signal(logits=teacher.dense()), tokens)


FORMS = {"hidden": from_hidden, "logits": from_logits}


def hidden() -> tuple[tuple[Tensor, ...], Signal]:
    """(hidden states, head and bias of the student), and a teacher of another width."""
    shapes = ((N, H), (V, H), (V,))
    leaves = tuple(torch.randn(*x, dtype=torch.float64).requires_grad_() for x in shapes)
    states, head, bias = (
        torch.randn(*x, dtype=torch.float64) for x in ((N, TEACHER_H), (V, TEACHER_H), (V,))
    )
    head.requires_grad_()  # of a teacher that shares the student's head
    return leaves, Signal(hidden=states, head=Head(head, bias, 0.8, 6.0))


def gradients(terms: Terms, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * terms.loss, leaves)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_hidden_states_give_what_logits_give(
    t: float, alpha: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", chunk * V)
    leaves, teacher = hidden()
    tokens, loss = tokens_of(), TaidLoss(SPEC, alpha, t=t)
    one, other = (make(loss, leaves, teacher, tokens) for make in FORMS.values())
    torch.testing.assert_close(one.loss, other.loss)
    assert one.metrics.keys() == MEASURED | {"taid_teacher_kl"} | ({"hard"} if alpha < 1 else set())
    torch.testing.assert_close(one.metrics, other.metrics)
    wanted = gradients(other, leaves)
    torch.testing.assert_close(gradients(one, leaves), wanted)
    if t > 0 or alpha < 1:
        assert all(float(x.abs().max()) > 1e-3 for x in wanted)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_at_one_it_is_the_forward_kl(make: Any, alpha: float) -> None:
    leaves, teacher = hidden()
    tokens = tokens_of()
    want = make(DivergenceLoss(SPEC, alpha), leaves, teacher, tokens)
    wanted = gradients(want, leaves)
    for t in (1.0, 1.0 - 1e-12):  # the second takes the other way
        got = make(TaidLoss(SPEC, alpha, t=t), leaves, teacher, tokens)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=0)
        for mine, theirs in zip(gradients(got, leaves), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    less = make(TaidLoss(SPEC, alpha, t=0.99), leaves, teacher, tokens)
    assert abs(less.loss.item() / want.loss.item() - 1) > 1e-3


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_at_zero_there_is_neither_loss_nor_gradient(make: Any) -> None:
    leaves, teacher = hidden()
    terms = make(TaidLoss(SPEC, 1.0, t=0.0), leaves, teacher, tokens_of())
    assert terms.loss.item() == 0.0
    assert all(float(x.abs().max()) < 1e-15 for x in gradients(terms, leaves))
    some = make(TaidLoss(SPEC, 1.0, t=0.01), leaves, teacher, tokens_of())
    assert all(float(x.abs().max()) > 1e-5 for x in gradients(some, leaves))


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_statistics_are_those_of_the_teacher(make: Any, t: float) -> None:
    leaves, teacher = hidden()
    tokens = tokens_of()
    found = dict(make(TaidLoss(SPEC, 0.3, t=t), leaves, teacher, tokens).metrics)
    plain = make(DivergenceLoss(SPEC, 0.3), leaves, teacher, tokens).metrics
    assert found.keys() == plain.keys() | {"taid_teacher_kl"}
    # what the loss would be at t = 1, and all others but the loss
    found["soft"] = found.pop("taid_teacher_kl")
    torch.testing.assert_close(found, dict(plain))


def test_a_clip_bounds_the_divergence_to_the_target() -> None:
    spec = replace(SPEC, clip=0.12, clip_level="token")
    student, teacher = logits()
    tokens = Tokens(torch.zeros(N, dtype=torch.int64), torch.ones(N))
    terms = TaidLoss(spec, 1.0, t=0.3)(Signal(logits=student), Signal(logits=teacher), tokens)
    values, _ = by_hand(student, teacher, 0.3)
    assert 0 < int((values > 0.12).sum()) < N
    torch.testing.assert_close(terms.metrics["soft"], T**2 * values.clamp(max=0.12))
    assert torch.equal(terms.metrics["clipped"] != 0, values > 0.12)


def test_a_hard_loss_that_is_given_takes_its_place() -> None:
    student, teacher = logits()
    tokens, loss, signal = tokens_of(), TaidLoss(SPEC, 0.3, t=0.4), Signal(logits=teacher)
    given = torch.tensor(5.0, dtype=torch.float64)
    mixed = loss(Signal(logits=student, own_loss=given), signal, tokens)
    soft = replace(loss, alpha=1.0)(Signal(logits=student), signal, tokens)
    torch.testing.assert_close(mixed.loss, 0.3 * soft.loss + 0.7 * given)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_entries_that_one_side_excludes(side: str, t: float) -> None:
    """Where the student has none, the forward KL is infinite, and so it is at t = 1 alone."""
    student, teacher = logits()
    student, teacher = student.detach().clone(), teacher.clone()
    for name, x in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            x[:, 4] = -torch.inf
    student.requires_grad_()
    tokens = Tokens(torch.zeros(N, dtype=torch.int64), torch.ones(N))
    terms = TaidLoss(SPEC, 1.0, t=t)(Signal(logits=student), Signal(logits=teacher), tokens)
    if side == "student" and t == 1.0:
        assert terms.loss.item() == math.inf
        return
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert bool(terms.loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of neither side."""
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", V)  # a token at a time
    count = 40
    hidden, weight = torch.randn(count, 2, requires_grad=True), torch.randn(V, 2)
    teacher = Signal(hidden=torch.randn(count, 3), head=Head(torch.randn(V, 3), None))
    tokens = Tokens(torch.randint(0, V, (count,)), torch.rand(count))
    with Watch() as mode:
        student = Signal(hidden=hidden, head=Head(weight, None))
        TaidLoss(SPEC, 0.5, t=0.4)(student, teacher, tokens).loss.backward()
    assert max(mode.sizes) < count * V // 2


@pytest.mark.parametrize("t", [0.4, 1.0])
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_of_no_tokens(make: Any, t: float) -> None:
    leaves, teacher = hidden()
    none = (leaves[0][:0], *leaves[1:])
    assert teacher.hidden is not None
    signal = replace(teacher, hidden=teacher.hidden[:0])
    empty = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0), corrected=torch.zeros(0))
    terms = make(TaidLoss(SPEC, 0.5, t=t), none, signal, empty)
    assert terms.loss.item() == 0.0
    assert terms.metrics.keys() == MEASURED | {"hard", "taid_teacher_kl"}
    assert all(value.shape == (0,) for value in terms.metrics.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [0.4, 1.0])
def test_a_sparse_teacher_is_refused(form: str, t: float) -> None:
    leaves, _ = hidden()
    ids, log_probs = torch.zeros(N, 2, dtype=torch.int64), torch.full((N, 2), -2.0)
    signal = Signal(sparse=SparseTeacher(ids, log_probs, torch.full((N,), -1.0)))
    student = Signal(logits=torch.zeros(N, V))
    if form == "hidden":
        student = Signal(hidden=leaves[0], head=Head(*leaves[1:]))
    with pytest.raises(ValueError, match=r"taid mixes the logits .* got 2 entries"):
        TaidLoss(SPEC, 1.0, t=t)(student, signal, tokens_of())


@pytest.mark.parametrize(
    ("kind", "t", "message"),
    [
        ("reverse_kl", 0.4, "taid needs divergence 'forward_kl', got 'reverse_kl'"),
        ("forward_kl", 1.1, r"t of taid must be in \[0, 1\], got 1.1"),
        ("forward_kl", -0.1, r"t of taid must be in \[0, 1\], got -0.1"),
        ("forward_kl", math.nan, r"t of taid must be in \[0, 1\], got nan"),
    ],
)
def test_what_is_out_of_range(kind: str, t: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaidLoss(DivergenceSpec(kind, 0.5), 1.0, t=t)
