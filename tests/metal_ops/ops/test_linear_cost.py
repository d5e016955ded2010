"""What `linear_divergence` allocates, multiplies and does under autocast and float16."""

import pytest
import torch
from torch.nn import functional as F

from metal_ops import linear_divergence
from metal_ops.backends import chunked
from metal_ops.backends.blocks import sizes
from metal_ops.selftest.numerics import assert_matches_reference
from tests.metal_ops.ops.test_linear import SPECS, check, compose, make
from tests.metal_ops.ops.watching import Watch


@pytest.fixture
def watch(monkeypatch):
    """Watches inside the op, where an outer mode cannot look."""
    mode, original = Watch(), chunked.linear

    def watched(*args):
        with mode:
            return original(*args)

    monkeypatch.setattr(chunked, "linear", watched)
    monkeypatch.setattr(sizes, "MIN_TOKENS", 16)
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 1)  # a row at a time
    monkeypatch.setitem(sizes.CHUNK_BYTES, "cpu", 1)
    return mode


@pytest.mark.parametrize(("head", "sides"), [("all", 1), ("shared", 2)])
def test_no_logits_of_all_tokens_in_memory(head, sides, watch):
    case = make(head, torch.float32, tokens=400, vocab=600)
    case.call(SPECS[2], 0.5).backward()
    assert max(watch.sizes) == 16 * 600 * sides  # one chunk's logits, of 400 x 600


@pytest.mark.parametrize(
    ("head", "frozen", "a_chunk"),
    [
        ("all", (), 4),  # two heads; gradients of hidden states and weight
        ("all", (1, 2), 3),
        ("all", (0, 1, 2), 2),
        ("shared", (), 3),  # one product for both sides
        ("shared", (0, 1), 1),
    ],
)
def test_every_logit_is_projected_once(head, frozen, a_chunk, watch):
    case = make(head, torch.float32, tokens=60)  # 40 have a weight: chunks of 16, 16, 8
    for index in frozen:
        case.student[index].requires_grad_(False)
    loss = case.call(SPECS[2], 0.5)
    if loss.requires_grad:
        loss.backward()
    assert watch.products == 3 * a_chunk


@pytest.mark.parametrize("head", ["all", "shared"])
def test_autocast_does_what_linear_does(head, monkeypatch):
    given, original = [], chunked.linear
    monkeypatch.setattr(chunked, "linear", lambda *a: given.append(a[:2]) or original(*a))
    case = make(head, torch.float32)
    with torch.no_grad():
        for x in (*case.student[:2], case.teacher[0]):
            x.add_(0.01 * torch.randn_like(x))  # not exact in bfloat16
    low = make(head, torch.bfloat16)
    student = [None if x is None else x.detach().bfloat16().requires_grad_() for x in case.student]
    teacher = [None if x is None else x.detach().bfloat16() for x in case.teacher]
    if head == "shared":
        teacher[1] = student[1]
    low = type(low)(
        tuple(student), tuple(teacher), case.weights, case.labels, case.scale, case.softcap
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(*case.student).dtype == torch.bfloat16
        loss = case.call(SPECS[0], 0.5)
    (sides,) = given
    tensors = [x for side in sides for x in (*side, side) if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in tensors} == {torch.bfloat16}
    want = low.call(SPECS[0], 0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    grads = torch.autograd.grad(loss, case.leaves())
    wants = torch.autograd.grad(want, low.leaves())
    for got, expected in zip(grads, wants, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected.float(), rtol=2**-7, atol=0)


def test_autocast_leaves_float64_alone():
    case = make("all", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(*case.student).dtype == torch.float64
        loss = case.call(SPECS[0], 0.5)
    torch.testing.assert_close(loss, compose(case, SPECS[0], 0.5).loss, rtol=1e-12, atol=0)


def test_autocast_turned_off_inside():
    case = make("all", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        check(case, SPECS[0], 0.5)


@pytest.mark.parametrize("upstream", [1.0, 0.3, 1e-3, 2.0**16])
def test_upstream_is_applied_in_float32(upstream):
    """0.3 is not a bfloat16, and a gradient scaler starts at 2**16, which is not a float16."""
    for dtype in (torch.bfloat16, torch.float16):
        case = make("plain", dtype)
        case = type(case)(case.student, case.teacher, case.weights * 2.0**-6, case.labels)
        check(case, SPECS[0], 0.5, upstream)


def test_an_upstream_beyond_float16_keeps_zeros():
    case = make("plain", torch.float16)
    same = tuple(None if x is None else x.detach().clone() for x in case.student)
    case = type(case)(case.student, same, torch.ones(9), case.labels)
    loss = case.call(SPECS[1], 1.0)
    grads = torch.autograd.grad(loss, case.leaves(), torch.tensor(2.0**17))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("head", ["plain", "shared"])
def test_float16_gradients_survive_small_weights(head):
    """1 / num_items of a large batch times q is below float16; a gradient scaler lifts it."""
    case = make(head, torch.float16)
    weights = torch.full_like(case.weights, 2.0**-17)
    case = type(case)(case.student, case.teacher, weights, case.labels)
    check(case, SPECS[0], 0.5, 2.0**16)


def test_mixed_dtypes_of_hidden_and_head():
    """Hidden states in float32 and a bfloat16 head, as under mixed precision."""
    case = make("plain", torch.bfloat16)
    hidden = case.student[0].detach().float().requires_grad_()
    heads, other = case.heads(), case.teacher[0]
    out = linear_divergence(hidden, heads[0], other, heads[1], SPECS[0], weights=case.weights)
    loss = out.loss
    (grad,) = torch.autograd.grad(loss, hidden)
    want = compose(case, SPECS[0], 1.0)
    size = want.magnitude + want.grad_logits.abs() * 2.0**15  # a bfloat16 product
    size = size @ case.student[1].detach().double().abs()
    assert_matches_reference(grad, want.grads[0], size, torch.tensor(1.0), torch.float32)


@pytest.mark.parametrize(
    ("architecture", "native"), [("x86_64", True), ("x86_64", False), ("aarch64", True)]
)
@pytest.mark.parametrize("head", ["all", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads_with_and_without_instructions_for_them(
    dtype, head, architecture, native, monkeypatch
):
    """An x86 that would emulate the product gets it in float32, a slice of the head at a time."""
    has = native and architecture == "x86_64"  # another architecture is not asked
    known = {"architecture": architecture, "avx512_bf16": has, "avx512_fp16": has}
    monkeypatch.setattr(sizes, "_capabilities", lambda: known)
    monkeypatch.setattr(sizes, "HEAD_SLICE_BYTES", 100)
    products, mm = set(), torch.mm

    def recorded(a, b, **kwargs):
        products.add((a.dtype, b.shape[1]))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", recorded)
    case = make(head, dtype)
    check(case, SPECS[0], 0.5)
    assert {dtype for dtype, _ in products} == {dtype if native else torch.float32}
    assert (len(case.student[1]) in {columns for _, columns in products}) == native


def test_blocks_follow_the_cache_where_its_size_is_known(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for known, l2 in (
        ({"l2_cache_size": 2**21}, 2**21),
        ({"l2_cache_size": 0}, 2**20),
        ({}, 2**20),
    ):
        monkeypatch.setattr(sizes, "_capabilities", lambda known=known: known)
        assert sizes.rows_per_block(torch.empty(0), 1000) == l2 * 5 // 4000
        assert sizes.rows_per_block(torch.empty(0, dtype=torch.float64), 10**9) == 1
