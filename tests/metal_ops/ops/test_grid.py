"""Every kind through every op against float64: supports, weights, sparse teachers, heads."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, sparse_divergence, weighted_divergence
from metal_ops.selftest.inputs import FAMILIES, REAL_SHAPE, SHAPES, missing_rules, sparse, untied
from metal_ops.selftest.numerics import assert_matches_reference, exact, exact_sparse, unit_upstream
from metal_ops.spec import KINDS
from tests.metal_ops.ops import test_linear as linear
from tests.metal_ops.ops.test_special_values import BOUNDED
from tests.metal_ops.ops.test_values import DTYPES, check, check_per_token, name, out_dtype

TOP_K = 5
SUPPORTS = ("teacher_topk", "student_topk", "union")
SCALES = [(0.3, 1.0, "none"), (0.7, 2.0, "t2")]


def specs(kind: str, support: str = "full") -> list[DivergenceSpec]:
    """The kind at two betas and temperatures, with every legal way to treat the rest."""
    top_k, missing = (None, ("tail",)) if support == "full" else (TOP_K, missing_rules(kind))
    return [
        DivergenceSpec(kind, *scale, support=support, top_k=top_k, missing=m)
        for scale in SCALES
        for m in missing
    ]


def turns(
    choices: list[DivergenceSpec], dtype: torch.dtype, family: str
) -> Iterator[tuple[tuple[int, int], DivergenceSpec]]:
    """Each shape with one of the choices, which all have their turn in some dtype and family."""
    first = len(DTYPES) * list(FAMILIES).index(family) + DTYPES.index(dtype)
    for i, shape in enumerate(SHAPES):
        yield shape, choices[(first + i) % len(choices)]


def draw(
    family: str, shape: tuple[int, int], dtype: torch.dtype, spec: DivergenceSpec
) -> tuple[Tensor, Tensor]:
    student, teacher = FAMILIES[family](*shape)
    return part(student.to(dtype), teacher.to(dtype), spec)


def part(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """The logits with distinct entries at the border of the support."""
    if spec.support in ("student_topk", "union"):
        student = untied(student, TOP_K)
    if spec.support in ("teacher_topk", "union"):
        teacher = untied(teacher, TOP_K)
    return student, teacher


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_supports(kind, dtype, family):
    choices = [spec for support in SUPPORTS for spec in specs(kind, support)]
    for shape, spec in turns(choices, dtype, family):
        check(*draw(family, shape, dtype, spec), spec, (shape, spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_supports_with_masked_entries(kind, dtype):
    """Entries of -inf on both sides; on one side where the divergence stays finite."""
    for spec in [spec for support in SUPPORTS for spec in specs(kind, support)]:
        student, teacher = (x.to(dtype) for x in FAMILIES["peaked"](4, 66))
        student[:, ::3], teacher[:, ::3] = -torch.inf, -torch.inf
        check(*part(student, teacher, spec), spec, spec)
        if spec.missing == "tail" and kind in ("jsd", *BOUNDED):
            student[:, 1::6], teacher[:, 2::6] = -torch.inf, -torch.inf
            check(*part(student, teacher, spec), spec, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_counts(kind):
    student, teacher = FAMILIES["randn"](4, 33)
    student[0] = torch.nan
    for spec in specs(kind) + specs(kind, "union"):
        leaf = student.clone().requires_grad_()
        known = sparse(teacher, TOP_K, spec.temperature, torch.float32)
        full = replace(spec, support="full", top_k=None)
        nothing = torch.zeros(4)
        for loss in (
            weighted_divergence(leaf, teacher, spec, weights=nothing).loss,
            sparse_divergence(leaf, known, full, mask=nothing.bool()).sum(),
        ):
            (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.item() == 0
            assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_supports_of_a_real_vocabulary(kind, dtype):
    support = SUPPORTS[KINDS.index(kind) % 3]
    spec = specs(kind, support)[0]
    check(*draw("peaked", REAL_SHAPE, dtype, spec), spec, spec)


def check_weighted(student: Tensor, teacher: Tensor, spec: DivergenceSpec, context: object) -> None:
    want, wide = exact(student, teacher, spec), out_dtype(student.dtype)
    # powers of two: products with them are exact
    weights = unit_upstream(want, wide).log2().floor().exp2()
    if student.dtype == torch.float16 and len(weights):
        weights = weights / weights.max()
    leaf = student.detach().requires_grad_()
    got = weighted_divergence(leaf, teacher, spec, weights=weights)
    (grad,) = torch.autograd.grad(got.loss, leaf)
    x, w = want.x_max, weights.double()
    assert_matches_reference(got.per_token, want.loss, want.loss_magnitude, x, wide, context)
    assert_matches_reference(
        got.loss.detach(),
        (w * want.loss).sum(),
        (w * want.loss_magnitude).sum(),
        x.max() if len(x) else x.new_zeros(()),
        wide,
        f"sum {context}",
    )
    w = w[:, None]
    assert_matches_reference(
        grad, w * want.grad, w * want.grad_magnitude, x, student.dtype, f"grad {context}"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_weighted(kind, dtype, family):
    for shape, spec in turns(specs(kind) + specs(kind, "union")[:1], dtype, family):
        check_weighted(*draw(family, shape, dtype, spec), spec, (shape, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_of_a_real_vocabulary(kind, dtype):
    spec = specs(kind)[1]
    check_weighted(*draw("randn", REAL_SHAPE, dtype, spec), spec, spec)


def check_sparse(student: Tensor, teacher: Tensor, spec: DivergenceSpec, context: object) -> None:
    known = sparse(teacher, TOP_K, spec.temperature, out_dtype(student.dtype))
    want = exact_sparse(student, known, spec)
    check_per_token(lambda x: sparse_divergence(x, known, spec), student, want, context)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse(kind, dtype, family):
    choices = [
        DivergenceSpec(kind, *scale, missing=missing)
        for scale in SCALES
        for missing in missing_rules(kind)
    ]
    for shape, spec in turns(choices, dtype, family):
        check_sparse(*draw(family, shape, dtype, spec), spec, (shape, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_of_a_real_vocabulary(kind, dtype):
    spec = specs(kind)[0]
    check_sparse(*draw("planted", REAL_SHAPE, dtype, spec), spec, spec)


def head(logits: Tensor) -> tuple[Tensor, Tensor, None]:
    """Hidden states and weight with these logits, exactly: a head of one hidden unit per token."""
    hidden = torch.eye(len(logits), dtype=logits.dtype)
    return hidden.requires_grad_(), logits.T.contiguous().requires_grad_(), None


@pytest.mark.parametrize("family", ["randn", "peaked", "near", "shifted", "near_shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind, dtype, family):
    for shape, spec in turns(specs(kind) + specs(kind, "teacher_topk")[:1], dtype, family):
        rows, vocab = shape
        if not rows:
            continue  # a head of no hidden units; test_linear has a batch of no tokens
        student, teacher = draw(family, shape, dtype, spec)
        weights = unit_upstream(exact(student, teacher, spec), out_dtype(dtype))
        labels = torch.randint(vocab, (rows,))
        linear.check(linear.Case(head(student), head(teacher), weights, labels), spec, 1.0)
