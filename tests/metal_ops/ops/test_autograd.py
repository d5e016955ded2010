"""What autograd may ask of an op: again, later, elsewhere, under a checkpoint; never twice over."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from metal_ops import (
    DivergenceSpec,
    Head,
    SparseTeacher,
    divergence,
    divergence_with_stats,
    hidden_divergence,
    linear_divergence,
    sparse_divergence,
    weighted_divergence,
)

SPEC = DivergenceSpec("jsd", 0.3, 2.0, support="teacher_topk", top_k=4)
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 0.25, 1.5])
Loss = Callable[..., Tensor]


def plain(x: Tensor, y: Tensor) -> Tensor:
    return (WEIGHTS * divergence(x, y, SPEC)).sum()


def masked(x: Tensor, y: Tensor) -> Tensor:
    return (3 * divergence_with_stats(x, y, SPEC, mask=WEIGHTS > 0)[0]).sum()


def weighted(x: Tensor, y: Tensor) -> Tensor:
    return 0.3 * weighted_divergence(x, y, SPEC, weights=WEIGHTS).loss


def sparse(x: Tensor, y: Tensor) -> Tensor:
    log_p = (y.float() / SPEC.temperature).log_softmax(-1)
    known, ids = log_p.topk(4)
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return (WEIGHTS * sparse_divergence(x, SparseTeacher(ids, known, tail, 2.0), SPEC)).sum()


def hidden(x: Tensor, y: Tensor) -> Tensor:
    mask = WEIGHTS > 0
    mse = hidden_divergence(x, y, "mse", mask=mask)
    return (WEIGHTS * (mse + 2 * hidden_divergence(x, y, "cosine", mask=mask))).sum()


def linear(x: Tensor, head: Tensor, bias: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
    heads = Head(head, bias), Head(teacher_head)
    options = {"weights": WEIGHTS, "labels": torch.arange(5), "alpha": 0.5}
    return 0.3 * linear_divergence(x, heads[0], y, heads[1], SPEC, **options).loss


OPS = [plain, masked, weighted, sparse, hidden, linear]
ops = pytest.mark.parametrize("op", OPS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def inputs(op: Loss, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and what has no gradient."""
    if op is not linear:
        return [torch.randn(5, 9).to(dtype).requires_grad_()], [torch.randn(5, 9).to(dtype)]
    leaves = [torch.randn(*shape).to(dtype) for shape in ((5, 6), (9, 6), (9,))]
    return [x.requires_grad_() for x in leaves], [torch.randn(n, 7).to(dtype) for n in (5, 9)]


def gradients(loss: Tensor, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    return [x.clone() for x in torch.autograd.grad(loss, leaves, **options)]


def assert_equal(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    assert all(w is not None and w.any() for w in want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@ops
@dtypes
def test_a_second_backward_adds_the_same_gradient(op, dtype):
    leaves, others = inputs(op, dtype)
    loss = op(*leaves, *others)
    want = gradients(loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_equal([x.grad for x in leaves], [2 * x for x in want])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@ops
@dtypes
def test_a_gradient_scales_with_what_follows(op, dtype):
    leaves, others = inputs(op, dtype)
    want = gradients(op(*leaves, *others), leaves)
    assert_equal(gradients(4 * op(*leaves, *others), leaves), [4 * x for x in want])
    assert_equal(gradients(op(*[1 * x for x in leaves], *others), leaves), want)


@dtypes
@pytest.mark.parametrize("op", [masked, plain, sparse, weighted, hidden])
def test_a_token_that_does_not_count_has_no_gradient(op, dtype):
    (x,), (y,) = inputs(op, dtype)
    (grad,) = gradients(op(x, y), [x])
    assert torch.equal(grad.any(-1), WEIGHTS > 0)


@ops
@dtypes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_changes_nothing(op, dtype, use_reentrant):
    leaves, others = inputs(op, dtype)

    def loss(*leaves: Tensor) -> Tensor:
        return op(*[2 * x for x in leaves], *others)

    want = loss(*leaves)
    got = checkpoint(loss, *leaves, use_reentrant=use_reentrant)
    assert torch.equal(got, want)
    assert_equal(gradients_of(got, leaves), gradients_of(want, leaves))


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """By `backward`: a reentrant checkpoint knows no other way."""
    for x in leaves:
        x.grad = None
    loss.backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_under_autocast(use_reentrant):
    """The recomputation is in bfloat16 too, which `backward`, outside of autocast, must not see."""
    leaves, others = inputs(linear, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = linear(*leaves, *others)
        got = checkpoint(linear, *leaves, *others, use_reentrant=use_reentrant)
    rounded = linear(*[x.bfloat16() for x in leaves], *[x.bfloat16() for x in others])
    assert torch.equal(want, rounded)
    assert torch.equal(got, want)
    grads = gradients_of(got, leaves)
    assert all(x is not None and x.dtype == torch.float32 for x in grads)
    assert_equal(grads, gradients_of(want, leaves))


@ops
@dtypes
def test_saved_tensors_may_go_elsewhere(op, dtype):
    leaves, others = inputs(op, dtype)
    want = gradients(op(*leaves, *others), leaves)
    with save_on_cpu():
        loss = op(*leaves, *others)
    assert_equal(gradients(loss, leaves), want)
    stored = []

    def pack(x: Tensor) -> int:
        stored.append(x.detach().clone())
        return len(stored) - 1

    with saved_tensors_hooks(pack, lambda index: stored[index]):
        loss = op(*leaves, *others)
    assert stored
    assert_equal(gradients(loss, leaves, retain_graph=True), want)
    assert_equal(gradients(loss, leaves), want)  # the first left the store as it was


@ops
@dtypes
def test_second_derivatives_are_refused(op, dtype):
    leaves, others = inputs(op, dtype)
    for leaf in leaves:
        (grad,) = torch.autograd.grad(op(*leaves, *others), leaf, create_graph=True)
        assert grad.any()
        with pytest.raises(RuntimeError, match=r"no second derivatives.*metal_ops\.reference"):
            torch.autograd.grad(grad.float().square().sum(), leaf)


@ops
def test_a_gradient_penalty_is_refused(op):
    """Also where the loss beside it can be differentiated twice."""
    leaves, others = inputs(op, torch.float32)
    loss = op(*leaves, *others) + sum(x.square().sum() for x in leaves)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        (loss + sum(g.square().sum() for g in grads)).backward()


class Dropped(torch.autograd.Function):
    """The identity, whose input gets no gradient: not zeros, none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@ops
@dtypes
def test_a_loss_whose_gradient_is_dropped(op, dtype):
    leaves, others = inputs(op, dtype)
    loss = Dropped.apply(op(*leaves, *others))
    (loss + sum(x.sum() for x in leaves)).backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_a_scaled_16_bit_loss_is_scaled_in_full_precision():
    """The scale 1/3 is not a bfloat16."""
    student, teacher = (torch.randn(3, 33).bfloat16() for _ in range(2))
    student.requires_grad_()
    third, grads = torch.tensor(1.0) / 3, []
    for scale in (1.0, third):
        loss = weighted_divergence(student, teacher, DivergenceSpec("jsd"), weights=torch.ones(3))
        grads += torch.autograd.grad(loss.loss * scale, student)
    assert torch.equal(grads[1], (grads[0].float() * third).bfloat16())
    assert not torch.equal(grads[1], grads[0] * third.bfloat16())


def test_batched_upstream_gradients():
    """As `torch.autograd.grad(is_grads_batched=True)` gives, for a Jacobian in one call."""
    student, teacher = torch.randn(2, 3, 33)
    student.requires_grad_()
    loss = divergence(student, teacher, DivergenceSpec("jsd"))
    eye = torch.eye(3)
    want = [torch.autograd.grad(loss, student, row, retain_graph=True)[0] for row in eye]
    (got,) = torch.autograd.grad(loss, student, eye, is_grads_batched=True)
    assert torch.equal(got, torch.stack(want))
