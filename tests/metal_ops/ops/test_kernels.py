"""What the kernel backends share, by kernels written in PyTorch."""

import pytest
import torch

from metal_ops import DivergenceSpec, divergence
from metal_ops.backends import chunked
from tests.metal_ops.ops import test_linear as linear
from tests.metal_ops.ops import torch_kernels
from tests.metal_ops.ops.again import again, run, use


@pytest.mark.parametrize(("test", "arguments"), again(every=5))
def test_again(test, arguments, monkeypatch):
    run(torch_kernels.MODULE, test, arguments, monkeypatch)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head", linear.HEADS)
@pytest.mark.parametrize("missing", ["tail", "renormalise", "zero"])
def test_a_support_and_labels_as_chunked(missing, head, alpha, monkeypatch):
    spec = DivergenceSpec("forward_kl", 0.5, 2.0, "t2", support="union", top_k=5, missing=missing)
    for dtype, digits in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        case = linear.make(head, dtype)
        for side in (case.student, case.teacher):  # so that no two logits tie
            side[0].data += torch.randn_like(side[0])
        results = []
        for backend in (chunked, torch_kernels.MODULE):
            use(backend, monkeypatch)
            out = case.terms(spec, alpha)
            grads = torch.autograd.grad(out.loss, case.leaves())
            results.append((out.loss.detach(), out.soft, out.hard, *out.stats, *grads))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(
                got, want, rtol=digits, atol=digits * float(want.abs().max())
            )


def test_an_infinite_divergence_without_a_share_is_silent(monkeypatch):
    use(torch_kernels.MODULE, monkeypatch)
    case = linear.make("bias", torch.float32)
    want = linear.compose(case, linear.SPECS[0], 0.0)
    case.teacher[2][3] = -torch.inf
    for support in ({}, {"support": "union", "top_k": 33}):
        spec = DivergenceSpec("reverse_kl", **support)
        out = case.terms(spec, 0.0)
        assert torch.equal(out.soft.isinf(), case.weights != 0)
        grads = torch.autograd.grad(out.loss, case.leaves())
        for got, e in zip((out.loss, *grads), (want.loss, *want.grads), strict=True):
            torch.testing.assert_close(got.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", ["tail", "renormalise", "zero"])
def test_a_support_with_nothing_outside(missing, monkeypatch):
    """All other entries are -inf, as padding of a vocabulary is."""
    student, teacher = torch.randn(2, 3, 10)
    student[:, 4:], teacher[:, 4:] = -torch.inf, -torch.inf
    spec = DivergenceSpec("forward_kl", support="teacher_topk", top_k=4, missing=missing)
    results = []
    for backend in (chunked, torch_kernels.MODULE):
        use(backend, monkeypatch)
        leaf = student.clone().requires_grad_()
        loss = divergence(leaf, teacher, spec)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
