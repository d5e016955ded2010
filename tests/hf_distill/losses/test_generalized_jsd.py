"""generalized_jsd_loss against a second statement of the seed; the loss on both of its paths."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill import generalized_jsd_loss
from hf_distill.losses import DivergenceLoss, Tokens
from hf_distill.models.signals import Head, Signal
from metal_ops import DivergenceSpec

B, T, V = 2, 5, 11
EPS = torch.finfo(torch.float32).eps


def seed_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    top_k: int | None = None,
    token_clip: float | None = None,
) -> Tensor:
    """The seed's function from its description, in probability space where that is exact."""
    if logits_are_probs:
        log_q, log_p = student.clamp(min=1e-8).log(), teacher.clamp(min=1e-8).log()
    else:
        student, teacher = student / temperature, teacher / temperature
        if top_k:
            teacher, kept = torch.topk(teacher, top_k, dim=-1)
            student = torch.gather(student, -1, kept)
        log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        entries = p * (log_p - log_q)
    elif beta == 1:
        entries = q * (log_q - log_p)
    else:
        log_m = torch.logsumexp(
            torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]), dim=0
        )
        entries = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    if token_clip is not None:
        entries = torch.clamp(entries, max=token_clip)
    if labels is not None:
        entries = entries[labels != -100]
    if reduction == "batchmean":
        kept = len(student) if labels is None else (labels != -100).sum()
        return entries.sum() / kept
    return {"sum": torch.sum, "mean": torch.mean, "none": lambda x: x}[reduction](entries)


def inputs(probabilities: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    student, teacher = (2 * torch.randn(B, T, V, dtype=dtype) for _ in range(2))
    if probabilities:
        student, teacher = student.softmax(-1), teacher.softmax(-1)
    labels = torch.randint(0, V, (B, T))
    labels[0, :2] = labels[1, 3:] = -100
    return student, teacher, labels


COMBINATIONS = list(
    itertools.product(
        (False, True),
        (0.0, 0.3, 0.5, 1.0),
        (1.0, 2.0),
        ("batchmean", "mean", "sum", "none"),
        (False, True),
        (None, 3),
        (None, 0.05),
    )
)


def options(case: tuple) -> tuple[bool, dict[str, Any]]:
    names = ("beta", "temperature", "reduction", "logits_are_probs", "top_k", "token_clip")
    return case[0], dict(zip(names, case[1:], strict=True))


def value_and_gradients(loss: Any, *tensors: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    student, teacher = (x.clone().requires_grad_() for x in tensors[:2])
    value = loss(student, teacher, tensors[2], **settings)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), *torch.autograd.grad((value * upstream).sum(), (student, teacher))


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_both_gradients_are_the_seeds(reduction: str) -> None:
    """The path with a teacher that requires a gradient: float64, so only roundings differ."""
    for case in (c for c in COMBINATIONS if c[3] == reduction):
        with_labels, settings = options(case)
        student, teacher, labels = inputs(settings["logits_are_probs"])
        labels = labels if with_labels else None
        got = value_and_gradients(generalized_jsd_loss, student, teacher, labels, **settings)
        want = value_and_gradients(seed_loss, student, teacher, labels, **settings)
        for one, other in zip(got, want, strict=True):
            # roundings of 2.2e-16 in sums of 110 entries of order 1; measured: 1.4e-15
            torch.testing.assert_close(one, other, rtol=0, atol=1.5e-14, msg=str(case))


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_student_gradient_are_the_seeds(dtype: torch.dtype, reduction: str) -> None:
    """The path of training: the teacher requires no gradient; compared with float64."""
    # relative to the largest element; measured: 5.8e-16 and 3.3e-7
    tolerance = 1e-14 if dtype == torch.float64 else 3e-6
    for case in (c for c in COMBINATIONS if c[3] == reduction):
        with_labels, settings = options(case)
        student, teacher, labels = inputs(settings["logits_are_probs"], dtype)
        labels = labels if with_labels else None
        student.requires_grad_()
        value = generalized_jsd_loss(student, teacher, labels, **settings)
        (grad,) = torch.autograd.grad(value.sum(), student)
        exact = student.detach().double().requires_grad_()
        want = seed_loss(exact, teacher.double(), labels, **settings)
        (want_grad,) = torch.autograd.grad(want.sum(), exact)
        assert value.shape == want.shape
        for one, other in ((value, want), (grad, want_grad)):
            error = (one.double() - other).abs().max()
            assert error <= tolerance * (1 + other.abs().max()), (case, error)


def test_labels_that_are_all_ignored_give_nan() -> None:
    student, teacher, labels = inputs()
    nothing = torch.full_like(labels, -100)
    for reduction in ("batchmean", "mean"):
        assert generalized_jsd_loss(student, teacher, nothing, reduction=reduction).isnan()
        assert seed_loss(student, teacher, nothing, reduction=reduction).isnan()
    assert generalized_jsd_loss(student, teacher, nothing, reduction="sum") == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reduction": "median"},
            "reduction must be 'batchmean', 'sum', 'mean' or 'none', got 'me",
        ),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"token_clip": -1.0}, "clip must be positive and finite, or None, got -1.0"),
    ],
)
def test_bad_arguments_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generalized_jsd_loss(*inputs(), **settings)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_is_a_weighted_sum_on_both_paths(kind: str, alpha: float) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(7, 8), torch.randn(V, 8)
    teacher_hidden, teacher_weight = torch.randn(7, 6), torch.randn(V, 6)
    targets, weights = torch.randint(0, V, (7,)), torch.rand(7)
    loss = DivergenceLoss(DivergenceSpec(kind, 0.3, 2.0, "t2"), alpha)
    logits, teacher_logits = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    tokens = Tokens(targets, weights)
    one = loss(
        Signal(hidden=hidden, head=Head(weight, None)),
        Signal(hidden=teacher_hidden, head=Head(teacher_weight, None)),
        tokens,
    )
    other = loss(Signal(logits=logits), Signal(logits=teacher_logits), tokens)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}[kind]
    soft = 4 * seed_loss(
        logits[:, None].double(), teacher_logits[:, None].double(), None, beta, 2.0, "none"
    ).sum((1, 2))
    hard = F.cross_entropy(logits.double(), targets, reduction="none")
    want = (weights * (alpha * soft + (1 - alpha) * hard)).sum()
    for terms in (one, other):
        # sums of 7 x 11 terms of order 1 to 10 in float32
        torch.testing.assert_close(terms.loss.double(), want, rtol=50 * EPS, atol=0)
        metrics = terms.metrics
        torch.testing.assert_close(metrics["soft"].double(), soft, rtol=50 * EPS, atol=50 * EPS)
        assert ("hard" in metrics) == (alpha < 1)
        if alpha < 1:
            torch.testing.assert_close(metrics["hard"].double(), hard, rtol=50 * EPS, atol=0)
