"""`hidden_divergence` against exact numbers, value and gradient; the rows it must not read."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from metal_ops import hidden_divergence, reference
from metal_ops.backends import chunked
from metal_ops.backends.blocks import sizes
from metal_ops.reference import HIDDEN_KINDS, NORM_MIN
from metal_ops.selftest.hidden import exact_hidden
from metal_ops.selftest.inputs import FAMILIES, HIDDEN_FAMILIES, SHAPES, randn
from metal_ops.selftest.numerics import assert_matches_reference, needed_c, unit_upstream
from tests.metal_ops.ops import torch_kernels
from tests.metal_ops.ops.again import use
from tests.metal_ops.ops.test_values import DTYPES, check_per_token, name, out_dtype
from tests.metal_ops.ops.watching import Watch

kinds = pytest.mark.parametrize("kind", HIDDEN_KINDS)


def check(student: Tensor, teacher: Tensor, kind: str, context: object = "", **options) -> None:
    want = exact_hidden(student, teacher, kind)
    check_per_token(
        lambda x: hidden_divergence(x, teacher, kind, **options), student, want, context
    )


@kinds
@pytest.mark.parametrize("family", HIDDEN_FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_value_and_gradient(kind, dtype, family):
    for shape in SHAPES:
        student, teacher = HIDDEN_FAMILIES[family](*shape)
        check(student.to(dtype), teacher.to(dtype), kind, (family, shape))


@kinds
@pytest.mark.parametrize("family", HIDDEN_FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_kernels(kind, dtype, family, monkeypatch):
    use(torch_kernels.MODULE, monkeypatch)
    test_value_and_gradient(kind, dtype, family)


@kinds
def test_mixed_dtypes(kind):
    student, teacher = FAMILIES["near"](4, 33)
    for x, y in ((student, teacher.bfloat16()), (student.bfloat16(), teacher)):
        check(x, y, kind)
    check(student.double(), teacher, kind)
    # a teacher in float64 is not rounded to the student's dtype first
    close = student.double() * (1 + 1e-9 * torch.randn(4, 33, dtype=torch.float64))
    check(student, close, kind, "a float64 teacher")
    mask = torch.tensor([True, False, True, True])
    got = hidden_divergence(student, close, kind, mask=mask)
    assert torch.equal(got[mask], hidden_divergence(student[mask], close[mask], kind))


@kinds
def test_non_contiguous_rows_and_columns(kind):
    student, teacher = randn(33, 5)
    check(student.T, teacher.T, kind, "transposed")
    student, teacher = randn(8, 66)
    check(student[::2, ::2], teacher[1::2, 1::2], kind, "strided")
    check(student[:1].expand(4, 66), teacher[:4], kind, "expanded")


@kinds
def test_several_blocks_and_a_rest(kind, monkeypatch):
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 4 * 33 * 3)  # three rows a block
    student, teacher = randn(11, 33)  # 3 + 3 + 3 + 2
    check(student, teacher, kind)
    mask = torch.arange(11) % 3 != 1
    got = hidden_divergence(student, teacher, kind, mask=mask)
    assert torch.equal(got[mask], hidden_divergence(student[mask], teacher[mask], kind))
    assert not got[~mask].any()


# student, teacher, mse, cosine; by hand
EXAMPLES = [
    ([3.0, 4.0], [4.0, 3.0], 1.0, 1 - 24 / 25),
    ([1.0, 0.0], [0.0, 2.0], 2.5, 1.0),
    ([1.0, 1.0], [-2.0, -2.0], 9.0, 2.0),
    ([2.0, 0.0], [1.0, 0.0], 0.5, 0.0),
    ([0.0, 0.0], [1.0, 0.0], 0.5, 1.0),
    ([0.0, 0.0], [0.0, 0.0], 0.0, 1.0),
    ([5e-9, 0.0], [1.0, 0.0], 0.5, 0.5),  # counts as one of length 1e-8
]


@pytest.mark.parametrize(("student", "teacher", "mse", "cosine"), EXAMPLES)
def test_worked_value(student, teacher, mse, cosine):
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (student, teacher))
    for kind, want in (("mse", mse), ("cosine", cosine)):
        for function in (hidden_divergence, reference.hidden_divergence):
            got = function(student, teacher, kind).item()
            assert got == pytest.approx(want, rel=1e-7, abs=1e-15), function


@kinds
def test_the_reference_is_what_torch_has(kind):
    student, teacher = (x.double() for x in randn(5, 33))
    if kind == "mse":
        want = F.mse_loss(student, teacher, reduction="none").mean(-1)
    else:
        want = 1 - F.cosine_similarity(student, teacher, dim=-1)
    got = reference.hidden_divergence(student, teacher, kind)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


@kinds
def test_exact_numbers_are_the_reference(kind):
    """Of which autograd takes the gradient; also for rows that are shorter than NORM_MIN."""
    student, teacher = (x.double() for x in HIDDEN_FAMILIES["lengths"](7, 33))
    leaf = student.clone().requires_grad_()
    loss = reference.hidden_divergence(leaf, teacher, kind)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    want = exact_hidden(student, teacher, kind)
    assert (student.norm(dim=-1) < NORM_MIN).any()
    torch.testing.assert_close(loss.detach(), want.loss, rtol=1e-13, atol=1e-15)
    size = want.grad.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(grad / size, want.grad / size, rtol=1e-12, atol=1e-14)


@kinds
def test_near_identical_rows_keep_their_digits(kind):
    teacher = torch.randn(6, 4096)
    student = teacher * (1 + 1e-4 * torch.randn(6, 4096))
    check(student, teacher, kind)
    want = exact_hidden(student, teacher, kind)
    # so that the rule allows float32 a few millionths of it
    assert (want.loss_magnitude < 10 * want.loss).all()
    assert not hidden_divergence(teacher, teacher, kind).any()


def by_one_less_a_product(s: Tensor, t: Tensor) -> Tensor:
    return reference.hidden_divergence(s, t, "cosine")


def of_any_length(s: Tensor, t: Tensor) -> Tensor:
    s, t = (x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-30) for x in (s, t))
    return 1 - (s * t).sum(-1)


WRONG: dict[str, tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = {
    "sum for mean": ("mse", "randn", lambda s, t: (s - t).square().sum(-1)),
    "last entry": (
        "mse",
        "randn",
        lambda s, t: reference.hidden_divergence(s[:, :-1], t[:, :-1], "mse"),
    ),
    "in bfloat16": ("mse", "randn", lambda s, t: (s.bfloat16() - t).square().mean(-1).float()),
    "one less a product": ("cosine", "near", by_one_less_a_product),
    "short rows as long ones": ("cosine", "lengths", of_any_length),
    "sign": ("cosine", "randn", lambda s, t: reference.hidden_divergence(t.abs(), s, "cosine")),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_rule_finds_a_wrong_formula(mistake):
    kind, family, function = WRONG[mistake]
    student, teacher = HIDDEN_FAMILIES[family](7, 1023)
    want = exact_hidden(student, teacher, kind)
    got = function(student, teacher).float()
    needed = needed_c(got, want.loss, want.loss_magnitude, want.x_max, torch.float32)
    assert needed.max() > 100


@kinds
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
@pytest.mark.parametrize("scale", [1.02, 0.0, -1.0])
def test_the_rule_finds_a_wrong_gradient(kind, dtype, scale):
    student, teacher = (x.to(dtype) for x in FAMILIES["near"](6, 1023))
    want = exact_hidden(student, teacher, kind)
    upstream = unit_upstream(want, torch.float32).double()[:, None]
    wrong = (scale * upstream * want.grad).to(dtype)
    got = (upstream * want.grad).to(dtype)
    sizes = upstream * want.grad, upstream * want.grad_magnitude, want.x_max, dtype
    assert_matches_reference(got, *sizes)
    with pytest.raises(AssertionError, match="needs c"):
        assert_matches_reference(wrong, *sizes)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", [chunked, torch_kernels.MODULE])
def test_masked_rows_may_hold_anything(kind, dtype, backend, monkeypatch):
    if backend is not chunked and dtype == torch.float64:
        return
    use(backend, monkeypatch)
    student, teacher = (x.to(dtype) for x in randn(4, 9))
    mask = torch.tensor([True, False, True, False])
    want = exact_hidden(student[mask], teacher[mask], kind)
    student[1], teacher[3, 0], student[3] = math.nan, math.inf, -math.inf
    leaf = student.requires_grad_()
    loss = hidden_divergence(leaf, teacher, kind, mask=mask)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert not loss[~mask].any()
    assert not grad[~mask].any()
    wide = out_dtype(dtype)
    got = loss.detach()[mask]
    assert_matches_reference(got, want.loss, want.loss_magnitude, want.x_max, wide)
    assert_matches_reference(grad[mask], want.grad, want.grad_magnitude, want.x_max, dtype)


@kinds
def test_a_nan_stays_in_its_row(kind):
    student, teacher = randn(4, 9)
    clean = hidden_divergence(student, teacher, kind)
    student[1, 3], teacher[2, 0] = math.nan, math.inf
    leaf = student.requires_grad_()
    loss = hidden_divergence(leaf, teacher, kind)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(loss[[0, 3]], clean[[0, 3]])
    assert not loss[[1, 2]].isfinite().any()
    assert torch.equal(grad.isfinite().all(-1), torch.tensor([True, False, False, True]))


@kinds
def test_no_rows_and_leading_dimensions(kind):
    empty = torch.zeros(0, 3, 5, requires_grad=True)
    loss = hidden_divergence(empty, empty.detach(), kind)
    assert loss.shape == (0, 3)
    loss.sum().backward()
    assert empty.grad.shape == empty.shape
    student, teacher = (x.view(2, 3, 9) for x in randn(6, 9))
    mask = torch.rand(2, 3) > 0.5
    got = hidden_divergence(student, teacher, kind, mask=mask)
    flat = hidden_divergence(student.view(6, 9), teacher.view(6, 9), kind, mask=mask.view(-1))
    assert torch.equal(got, flat.view(2, 3))
    row = hidden_divergence(student[0, 0], teacher[0, 0], kind)
    assert row.shape == ()


@kinds
def test_gradcheck(kind):
    student, teacher = (x.double() for x in randn(5, 7))
    teacher[1] = 3 * student[1] + 0.01 * teacher[1]
    teacher[2] = 0.0
    mask = torch.tensor([True, True, True, False, True])
    assert gradcheck(
        lambda x: hidden_divergence(x, teacher, kind, mask=mask), (student.requires_grad_(),)
    )


@kinds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("want_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(kind, dtype, want_grad, masked):
    student, teacher = (x.to(dtype) for x in randn(4, 9))
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0]) if masked else None
    args = (student.requires_grad_(), teacher, weights, kind, want_grad, "auto")
    torch.library.opcheck(torch.ops.metal_ops.hidden_divergence, args)


@kinds
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name)
def test_a_block_at_a_time(kind, dtype, monkeypatch):
    rows, hidden = 40, 300
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 4 * hidden)  # a row at a time
    student, teacher = (x.to(dtype) for x in randn(rows, hidden))
    with Watch() as mode:
        chunked.hidden_states(student, teacher, kind, torch.ones(rows), True)
    assert [size for size in mode.sizes if size > hidden] == [rows * hidden]


def raises(text: str):
    return pytest.raises(ValueError, match=f"^{re.escape(text)}")


def test_errors():
    x = torch.zeros(2, 3)
    with raises("kind must be one of ('mse', 'cosine'), got 'l2'"):
        hidden_divergence(x, x, "l2")
    for other in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 0)):
        shapes = f"(2, 3) and {tuple(other.shape)}"
        with raises(
            f"student and teacher must both be [..., hidden] with hidden > 0, got {shapes}"
        ):
            hidden_divergence(x, other, "mse")
    with raises("student and teacher must both be [..., hidden] with hidden > 0"):
        hidden_divergence(torch.zeros(2, 0), torch.zeros(2, 0), "mse")
    with raises("student and teacher must be on one device, got cpu and meta"):
        hidden_divergence(x, torch.zeros(2, 3, device="meta"), "mse")
    with raises("mask must be bool of shape (2,), got torch.float32 (2,)"):
        hidden_divergence(x, x, "mse", mask=torch.ones(2))
    with raises("backend must be one of"):
        hidden_divergence(x, x, "mse", backend="cuda")
    with pytest.raises(NotImplementedError, match="chunked: needs float16"):
        hidden_divergence(x.int(), x.int(), "mse")
