"""Tokens that a side finds impossible: what a clip or a weight of 0 takes away leaves no NaN."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.losses import (
    CrossTokenizerLoss,
    DivergenceLoss,
    FunctionLoss,
    Importance,
    Loss,
    SampledTokenLoss,
    TaidLoss,
    Terms,
    Tokens,
    generalized_jsd_loss,
    not_finite,
    step_terms,
)
from hf_distill.models import Signal
from metal_ops import DivergenceSpec, SparseTeacher
from metal_ops.spec import KINDS

N, V = 5, 8
TARGETS = torch.tensor([1, 2, 3, 4, 5])


def logits(size: float = 3.0, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(N, V) * size


def gradient(loss: Any, student: Tensor, teacher: Any, weights: Tensor) -> tuple[Terms, Tensor]:
    leaf = student.clone().requires_grad_()
    signal = teacher if isinstance(teacher, Signal) else Signal(logits=teacher)
    terms = step_terms(loss, Signal(logits=leaf), signal, Tokens(TARGETS, weights))
    (grad,) = torch.autograd.grad(terms.loss, leaf)
    return terms, grad


def far(student: bool, by: float = 1e4) -> Tensor:
    """One side's logits, at whose second token its target is (nearly) impossible."""
    made = logits(seed=1 - student)
    made[1, TARGETS[1]] -= by
    return made


@pytest.mark.parametrize("by", [50.0, 200.0, 1e4, 6e4, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_clipped_k3(side: str, dtype: torch.dtype, by: float) -> None:
    student = far(True, by) if side == "student" else logits()
    teacher = far(False, by) if side == "teacher" else logits(seed=1)
    loss = SampledTokenLoss("k3", clip=5.0)
    terms, grad = gradient(loss, student.to(dtype), teacher.to(dtype), torch.ones(N))
    assert terms.metrics["soft"].isfinite().all()
    assert terms.metrics["soft"][1] == 5.0
    assert terms.metrics["clipped"][1] == 1
    assert grad.isfinite().all()
    assert not grad[1].any()
    below = terms.metrics["soft"] < 5
    assert below.any()
    assert grad[below].any(-1).all()


@pytest.mark.parametrize("clip", [0.5, 5.0])
def test_the_clip_of_k3_changes_nothing_below_it(clip: float) -> None:
    student, teacher, ones = logits(), logits(seed=1), torch.ones(N)
    free, whole = gradient(SampledTokenLoss("k3"), student, teacher, ones)
    bound, cut = gradient(SampledTokenLoss("k3", clip=clip), student, teacher, ones)
    below = free.metrics["soft"] <= clip
    assert below.any()
    assert torch.equal(bound.metrics["soft"], free.metrics["soft"].clamp(max=clip))
    assert torch.equal(whole[below], cut[below])
    assert not cut[~below].any()


@pytest.mark.parametrize("by", [1e4, math.inf])
def test_clipped_policy_gradient(by: float) -> None:
    teacher = far(False, by)
    terms, grad = gradient(
        SampledTokenLoss("policy_gradient", clip=2.0), logits(), teacher, torch.ones(N)
    )
    assert terms.loss.isfinite()
    assert grad.isfinite().all()


def plain(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """The reverse KL in plain PyTorch."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def sparse(teacher: Tensor) -> Signal:
    log_p = teacher.log_softmax(-1)
    top = log_p.topk(2, dim=-1)
    rest = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    rest[1] = -math.inf
    return Signal(sparse=SparseTeacher(top.indices, top.values, rest))


LOSSES: dict[str, Loss] = {
    **{kind: DivergenceLoss(DivergenceSpec(kind, 0.3)) for kind in KINDS},
    "k3": SampledTokenLoss("k3"),
    "policy_gradient": SampledTokenLoss("policy_gradient"),
    "taid": TaidLoss(DivergenceSpec("forward_kl"), t=0.5),
    "uld": CrossTokenizerLoss(),
    "own": FunctionLoss(plain),
}


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_token_without_weight_may_be_infinite(name: str, side: str) -> None:
    student = far(True, math.inf) if side != "teacher" else logits()
    teacher = far(False, math.inf) if side != "student" else logits(seed=1)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])
    terms, grad = gradient(LOSSES[name], student, teacher, weights)
    assert terms.loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any()
    assert grad[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_weight_of_a_sparse_teacher(kind: str) -> None:
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])
    terms, grad = gradient(LOSSES[kind], logits(), sparse(logits(seed=1)), weights)
    assert terms.loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any()


@pytest.mark.parametrize("size", [1e4, 6e4])
@pytest.mark.parametrize("name", [x for x in LOSSES if x not in ("k3", "own")])
def test_large_logits(name: str, size: float) -> None:
    """All that is finite in mathematics; k3's exponential needs a clip."""
    teacher = logits(1, seed=1).sign() * size
    terms, grad = gradient(LOSSES[name], logits(1).sign() * size, teacher, torch.ones(N))
    assert terms.loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("behaviour", [-1e4, -math.inf, 0.0])
@pytest.mark.parametrize("by", [0.0, 1e4, math.inf])
def test_ratios_that_overflow(behaviour: float, by: float) -> None:
    known = logits().log_softmax(-1).gather(-1, TARGETS[:, None])[:, 0]
    known[1] = behaviour
    student = far(True, by)
    tokens = Tokens(TARGETS, torch.ones(N), importance=Importance(known, 2.0))
    leaf = student.clone().requires_grad_()
    signals = Signal(logits=leaf), Signal(logits=logits(seed=1))
    terms = step_terms(DivergenceLoss(DivergenceSpec("jsd")), *signals, tokens)
    (grad,) = torch.autograd.grad(terms.loss, leaf)
    assert terms.loss.isfinite()
    assert grad.isfinite().all()
    assert terms.metrics["importance_ratio"].isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_entries_of_the_releases_loss(beta: float, side: str) -> None:
    """Unreduced it is plain PyTorch, whose clip must not multiply infinity by 0."""
    student = far(side == "student", math.inf) if side == "student" else logits()
    teacher = far(False, math.inf) if side == "teacher" else logits(seed=1)
    leaf = student[None].clone().requires_grad_()
    values = generalized_jsd_loss(leaf, teacher[None], beta=beta, reduction="none", token_clip=0.1)
    assert (values <= 0.1).all()
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    assert grad.isfinite().all()


# --- what the error says


def said(loss: Loss, student: Tensor, teacher: Any, **changes: Any) -> str:
    signal = teacher if isinstance(teacher, Signal) else Signal(logits=teacher)
    terms = step_terms(loss, Signal(logits=student), signal, Tokens(TARGETS, torch.ones(N)))
    with pytest.raises(FloatingPointError) as caught:
        raise not_finite(terms, signal)
    return str(caught.value)


NAN = torch.where(torch.arange(N)[:, None] == 2, torch.nan, logits())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", [x for x in LOSSES if x != "own"])
def test_a_side_that_is_nan_is_named_and_no_other(name: str, share: float) -> None:
    loss = LOSSES[name].with_share(share, True)
    text = said(loss, NAN, logits(seed=1))
    assert text.endswith("student logits are NaN at 1 of 5 tokens")
    if share:
        text = said(loss, logits(), NAN)
        assert text.endswith("teacher logits are NaN at 1 of 5 tokens")


def test_who_makes_a_divergence_infinite_is_named() -> None:
    reverse, forward = (DivergenceLoss(DivergenceSpec(x)) for x in ("reverse_kl", "forward_kl"))
    text = said(reverse, logits(), far(False, math.inf))
    assert text.endswith("infinite at 1 of 5 tokens (the teacher gives a token probability 0)")
    assert "(the teacher gives a token probability 0)" in said(
        reverse, logits(), sparse(logits(seed=1))
    )
    for loss, by in ((forward, math.inf), (SampledTokenLoss("k3"), 1e4)):
        text = said(loss, far(True, by), logits(seed=1))
        assert "infinite at 1 of 5 tokens (the student gives a token probability 0, or" in text
        assert "labels" not in text
    text = said(reverse.with_share(0.0, True), far(True, math.inf), logits(seed=1))
    assert text.endswith(
        "cross-entropy is infinite at 1 of 5 tokens (the student gives a label probability 0)"
    )


def test_what_fills_rows_of_a_sparse_teacher_is_no_probability_of_0() -> None:
    known = logits(seed=1).log_softmax(-1)[:, :3]
    ids = torch.arange(3).expand(N, 3).clone()
    tail = known[:, :2].exp().sum(-1).neg().log1p()
    ids[:, 2], known[:, 2] = -1, -math.inf  # as where a row has fewer entries
    student = logits()
    student[1, 0] = -math.inf
    teacher = Signal(sparse=SparseTeacher(ids, known, tail))
    text = said(DivergenceLoss(DivergenceSpec("forward_kl")), student, teacher)
    assert "infinite at 1 of 5 tokens (the student gives a token probability 0, or" in text


def test_a_support_without_mass_is_named() -> None:
    spec = DivergenceSpec("forward_kl", support="student_topk", top_k=1, missing="renormalise")
    student, teacher = logits(), logits(seed=1)
    teacher[0, student[0].argmax()] = -math.inf
    text = said(DivergenceLoss(spec), student, teacher)
    assert text.endswith(
        "NaN at 1 of 5 tokens (neither side is NaN: the entries that are read have no mass, 0 / 0)"
    )


@pytest.mark.parametrize("name", ["hidden", "attention", "anchor", "aux"])
def test_another_part_of_the_loss_is_named(name: str) -> None:
    odd = torch.tensor([0.0, math.inf, math.nan])
    fine = {"soft": torch.zeros(3), "hard": torch.zeros(3), "student_entropy": torch.zeros(3)}
    terms = Terms(torch.tensor(math.nan), {**fine, name: odd})
    with pytest.raises(FloatingPointError, match=f"the loss '{name}' is not finite at 2 of 3 tok"):
        raise not_finite(terms)
