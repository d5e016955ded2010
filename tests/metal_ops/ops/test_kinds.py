"""Every kind, support and clip: against probabilities, against the reference."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from metal_ops import (
    DivergenceSpec,
    SparseTeacher,
    divergence,
    reference,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.selftest.inputs import FAMILIES, peaked, randn
from metal_ops.spec import KINDS

BETAS = (0.1, 0.5, 0.9)
NEW = ("soft_ce", "tvd", "skew_kl", "skew_reverse_kl", "mixed_kl", "alpha")


def by_probabilities(p: Tensor, q: Tensor, kind: str, a: float) -> Tensor:
    """The definitions of the table in docs/pages/losses.md, [N], for probabilities above zero."""

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x / y).log()).sum(-1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: a * kl(p, a * p + (1 - a) * q) + (1 - a) * kl(q, a * p + (1 - a) * q),
        "soft_ce": lambda: -(p * q.log()).sum(-1),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "skew_kl": lambda: kl(p, a * p + (1 - a) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - a) * p + a * q),
        "mixed_kl": lambda: a * kl(p, q) + (1 - a) * kl(q, p),
        "alpha": lambda: (1 - (p**a * q ** (1 - a)).sum(-1)) / (a * (1 - a)),
    }[kind]()


def value_and_grad(function, student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_same(got, want, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_its_definition(kind, beta):
    student, teacher = (x.double() for x in peaked(6, 33))
    spec = DivergenceSpec(kind, beta, 2.0, "t2")
    want = value_and_grad(
        lambda x: 4 * by_probabilities((teacher / 2).softmax(-1), (x / 2).softmax(-1), kind, beta),
        student,
    )
    assert_same(value_and_grad(lambda x: divergence(x, teacher, spec), student), want)
    assert_same(value_and_grad(lambda x: reference.divergence(x, teacher, spec), student), want)


@pytest.mark.parametrize("family", ["randn", "peaked", "planted", "near"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NEW)
def test_low_precision_keeps_the_digits_of_float64(kind, dtype, family):
    """Both sides are rounded first: what is left are the errors of the op."""
    student, teacher = (x.to(dtype) for x in FAMILIES[family](4, 1023))
    spec = DivergenceSpec(kind, 0.3, 2.0)
    want = value_and_grad(
        lambda x: reference.divergence(x, teacher.double(), spec), student.double()
    )
    loss, grad = value_and_grad(lambda x: divergence(x, teacher, spec), student)
    torch.testing.assert_close(loss.double(), want[0], rtol=2e-4, atol=1e-6)
    if kind == "tvd" and family == "near":
        return  # the gradient's signs change where the sides agree to the last bit
    scale = want[1].abs().amax(-1, keepdim=True)
    tolerance = 2e-4 if dtype == torch.float32 else 2.0**-8
    assert ((grad.double() - want[1]).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sides(kind):
    student = FAMILIES["peaked"](4, 1023)[0]
    loss, grad = value_and_grad(lambda x: divergence(x, student, DivergenceSpec(kind)), student)
    assert kind == "soft_ce" or not loss.any()
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", NEW)
def test_gradcheck(kind, beta):
    student, teacher = (x.double() for x in randn(4, 7))
    spec = DivergenceSpec(kind, beta, 1.5)
    assert gradcheck(lambda x: divergence(x, teacher, spec), (student.requires_grad_(),))


def specs(kind: str, beta: float):
    supports = [
        ("full", None),
        ("teacher_topk", 3),
        ("student_topk", 3),
        ("union", 3),
        ("union", 7),
    ]
    clips = [(None, "token"), (0.1, "vocab_entry"), (0.3, "token"), (0.3, "token_rescale")]
    for (support, k), missing, (clip, level) in itertools.product(
        supports, ("tail", "renormalise", "zero"), clips
    ):
        try:
            yield DivergenceSpec(kind, beta, 1.7, "t2", clip, level, support, k, missing)
        except ValueError as error:
            assert "missing 'zero'" in str(error)  # noqa: PT017 - the only one to leave out


@pytest.mark.parametrize("beta", [0.0, *BETAS, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_supports_and_clips_are_those_of_the_reference(kind, beta):
    if kind.startswith("skew") and beta == 1.0:
        with pytest.raises(ValueError, match="must be below 1"):
            DivergenceSpec(kind, beta)
        return
    student, teacher = (2 * x.double() for x in randn(6, 7))
    for spec in specs(kind, beta):
        want = value_and_grad(lambda x, s=spec: reference.divergence(x, teacher, s), student)
        assert_same(value_and_grad(lambda x, s=spec: divergence(x, teacher, s), student), want)


@pytest.mark.parametrize("missing", ["tail", "renormalise", "zero"])
@pytest.mark.parametrize("top_k", [None, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_teacher_is_the_dense_one_on_its_entries(kind, top_k, missing):
    if missing == "zero" and kind in ("reverse_kl", "skew_reverse_kl", "mixed_kl"):
        with pytest.raises(ValueError, match="missing 'zero'"):
            DivergenceSpec(kind, 0.3, missing=missing)
        return
    student, teacher = (2 * x.double() for x in randn(6, 9))
    log_p = (teacher / 1.7).log_softmax(-1)
    log_probs, ids = log_p.topk(4)
    others = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
    padding = torch.full((6, 1), -1)
    sparse = SparseTeacher(
        torch.cat([ids, padding], -1), torch.cat([log_probs, padding * 0.0], -1), others, 1.7
    )
    support = "full" if top_k is None else "teacher_topk"
    spec = DivergenceSpec(kind, 0.3, 1.7, support=support, top_k=top_k, missing=missing)
    dense = DivergenceSpec(
        kind, 0.3, 1.7, support="teacher_topk", top_k=top_k or 4, missing=missing
    )
    want = value_and_grad(lambda x: divergence(x, teacher, dense), student)
    assert_same(value_and_grad(lambda x: sparse_divergence(x, sparse, spec), student), want)
    mask = torch.tensor([True, False, True, True, False, True])
    loss, grad = value_and_grad(lambda x: sparse_divergence(x, sparse, spec, mask=mask), student)
    assert_same((loss, grad), (want[0] * mask, want[1] * mask[:, None]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_of_nothing_is_the_full_vocabulary(kind):
    student, teacher = (x.double() for x in peaked(5, 33))
    full = DivergenceSpec(kind, 0.3)
    all_kept = DivergenceSpec(kind, 0.3, support="teacher_topk", top_k=33)
    want = value_and_grad(lambda x: divergence(x, teacher, full), student)
    assert_same(value_and_grad(lambda x: divergence(x, teacher, all_kept), student), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 2.0}, "must be taken at the spec's temperature 1.0, got 2.0"),
        ({"ids": torch.tensor([[0, 9]])}, "ids must be below the vocabulary of 9, got 9"),
        ({"ids": torch.tensor([[0, 1]], dtype=torch.int32)}, "ids must be int64"),
        ({"log_tail": torch.zeros(2)}, r"log_tail \[1\], got"),
    ],
)
def test_sparse_errors(change, message):
    teacher = SparseTeacher(torch.tensor([[0, 1]]), torch.full((1, 2), -1.0), torch.tensor([-2.0]))
    assert sparse_divergence(torch.zeros(1, 9), teacher, DivergenceSpec()).isfinite().all()
    with pytest.raises(ValueError, match=message):
        sparse_divergence(torch.zeros(1, 9), teacher._replace(**change), DivergenceSpec())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_is_the_weighted_sum(dtype):
    student, teacher = (x.to(dtype) for x in peaked(6, 33))
    weights = torch.tensor([0.5, 0.0, 2.0, 0.25, 0.0, 1.0])
    spec = DivergenceSpec("jsd", 0.3, 2.0)
    want = value_and_grad(lambda x: weights * divergence(x, teacher, spec), student)
    leaf = student.clone().requires_grad_()
    got = weighted_divergence(leaf, teacher, spec, weights=weights)
    (grad,) = torch.autograd.grad(got.loss, leaf)
    torch.testing.assert_close(got.loss.detach().double(), want[0].sum().double())
    torch.testing.assert_close(grad, want[1])
    assert not got.per_token[weights == 0].any()


def test_opcheck():
    student, teacher = randn(4, 9)
    text = DivergenceSpec("mixed_kl", 0.3).to_text()
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
    args = (student.requires_grad_(), teacher, weights, text, True, True, "auto")
    torch.library.opcheck(torch.ops.metal_ops.weighted_divergence, args)
    log_probs, ids = teacher.log_softmax(-1).topk(3)
    sparse = (student, ids, log_probs, torch.full((4,), -1.0), weights, text, True, "auto")
    torch.library.opcheck(torch.ops.metal_ops.sparse_divergence, sparse)


def test_the_reverse_kl_of_dropped_entries_is_refused():
    with pytest.raises(ValueError, match="q = p / e"):
        DivergenceSpec("reverse_kl", support="teacher_topk", top_k=3, missing="zero")
    with pytest.raises(ValueError, match="q = p / e"):
        DivergenceSpec("jsd", beta=1.0, missing="zero")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"support": "teacher_topk"}, "support 'teacher_topk' needs top_k >= 1, got None"),
        ({"support": "union", "top_k": 0}, "support 'union' needs top_k >= 1, got 0"),
        ({"top_k": 3}, "top_k must be None with support 'full', got 3"),
        ({"support": "teacher"}, "support must be one of"),
        ({"missing": "drop"}, "missing must be one of"),
    ],
)
def test_support_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        DivergenceSpec(**fields)
