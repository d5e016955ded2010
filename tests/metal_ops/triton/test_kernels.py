"""Properties of the kernels that the op suite cannot ask for: in place, far offsets, log-sums."""

import math

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec
from metal_ops.backends import triton
from metal_ops.backends.kernels import Q_LOG_SUM, HardTerm
from metal_ops.selftest.inputs import FAMILIES, planted
from metal_ops.selftest.numerics import assert_matches_reference, exact
from metal_ops.spec import KINDS
from tests.metal_ops.triton.interpreter import DEVICE

K = triton.KERNELS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(family: str, rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (x.to(dtype).to(DEVICE) for x in FAMILIES[family](rows, vocab))
    return student, teacher


def hard_term(student: Tensor) -> HardTerm:
    labels = torch.randint(student.shape[-1], (len(student),), device=DEVICE)
    share = torch.tensor([0.5, 0.0, -1.0, 2.0], device=DEVICE)
    return HardTerm(labels, student.float().logsumexp(-1), share)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_place(kind):
    dtype = DTYPES[KINDS.index(kind) % 3]
    student, teacher = pair("peaked", 4, 2051, dtype)
    spec = DivergenceSpec(kind, 0.3, temperature=2.0, clip=0.05)
    factor = torch.tensor([1.0, 2.0, 0.0, -3.0], device=DEVICE)
    hard, values = hard_term(student), K.forward(student, teacher, factor, spec)
    apart = torch.full_like(student, math.nan)
    K.backward(student, teacher, factor, values, spec, hard, apart)
    K.backward(student, teacher, factor, values, spec, hard, student)
    assert torch.equal(student, apart)
    assert apart.any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_in_place(dtype):
    logits, _ = pair("peaked", 4, 2051, dtype)
    factor = torch.tensor([1.0, 0.0, -2.0, 3.0], device=DEVICE)
    log_sum, apart = logits.float().logsumexp(-1), torch.full_like(logits, math.nan)
    x, scale = logits.double().cpu(), factor.double().cpu()[:, None]
    K.spread(logits, log_sum, factor, 1.0, apart)
    K.spread(logits, log_sum, factor, 1.0, logits)
    assert torch.equal(logits, apart)
    want = scale * (x - log_sum.double().cpu()[:, None]).exp()
    x_max = x.abs().amax(-1)
    assert_matches_reference(apart.cpu(), want, want.abs(), x_max, dtype, "spread")
    assert not apart[1].any()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_hard_term_alone_and_mixed(alpha):
    student, teacher = pair("planted", 4, 4097, torch.float32)
    spec, hard = DivergenceSpec("jsd", 0.3, temperature=2.0), hard_term(student)
    factor = torch.full((4,), alpha, device=DEVICE)
    values = K.forward(student, teacher, torch.ones_like(factor), spec)
    got = torch.full_like(student, math.nan)
    K.backward(student, teacher, factor, values, spec, hard, got)
    x, y = student.double().cpu(), teacher.double().cpu()
    share = hard.share.double().cpu()[:, None]
    one = torch.nn.functional.one_hot(hard.labels.cpu(), 4097).double()
    want, soft = share * (x.softmax(-1) - one), exact(student.cpu(), teacher.cpu(), spec)
    magnitude = share.abs() * (x.softmax(-1) + one)
    # `exact` is for the logits, the kernel for the scaled ones
    want, magnitude = (
        a + alpha * spec.temperature * b
        for a, b in ((want, soft.grad), (magnitude, soft.grad_magnitude))
    )
    x_max = torch.maximum(x.abs().amax(-1), y.abs().amax(-1))
    assert_matches_reference(got.cpu(), want, magnitude, x_max, torch.float32, "hard")


LAST = (31, 32, 33, 96, 1023, 1025)  # of a word of bits, of a block, one more


@pytest.mark.parametrize(
    ("units", "dtype"), [(0, torch.float32), (64, torch.bfloat16), (64, torch.float16)]
)
@pytest.mark.parametrize("vocab", LAST)
def test_log_sums(vocab, dtype, units, monkeypatch):
    """Of ids at the ends of words and blocks, of none, of all, of the one that has the mass."""
    monkeypatch.setattr(triton, "MAX_BLOCK", 256)
    monkeypatch.setattr(triton, "_units", lambda _: units)
    logits = planted(6, vocab)[0].to(dtype)
    logits[0, vocab - 1] = 200.0
    kept = torch.rand(6, vocab) < 0.3
    kept[0] = False
    kept[0, vocab - 1], kept[1], kept[2] = True, False, True
    kept[3] = torch.isin(torch.arange(vocab), torch.tensor([0, 30, 31, 32, 255, 256, vocab - 1]))
    ids = torch.where(kept, torch.arange(vocab), vocab).sort(-1).values.int()
    got = K.log_sums(logits.to(DEVICE), ids.to(DEVICE), 2.0)
    x = logits.double() / 2
    x_max = x.abs().amax(-1)
    for actual, entries in zip(got, (x, x.masked_fill(kept, -math.inf)), strict=True):
        want = entries.logsumexp(-1)
        finite = want.isfinite()
        assert torch.equal(actual.cpu()[~finite], want[~finite].float())
        assert_matches_reference(
            actual.cpu()[finite],
            want[finite],
            1 + want[finite].abs(),
            x_max[finite],
            torch.float32,
            vocab,
        )


def test_rows_beyond_2_to_the_31():
    """The last of three rows begins at element 2^31 + 32; memory not touched is not there."""
    stride, vocab = 2**30 + 16, 5
    memory = torch.UntypedStorage(2 * (2 * stride + vocab), device=DEVICE)
    far = torch.tensor([], dtype=torch.float16, device=DEVICE)
    far.set_(memory, 0, (3, vocab), (stride, 1))
    near, teacher = pair("peaked", 3, vocab, torch.float16)
    far.copy_(near)
    spec, ones = DivergenceSpec("jsd"), torch.ones(3, device=DEVICE)
    want, values = (K.forward(x, teacher, ones, spec) for x in (near, far))
    assert torch.equal(values, want)
    expected = torch.full_like(near, math.nan)
    K.backward(near, teacher, ones, values, spec, None, expected)
    K.backward(far, teacher, ones, values, spec, None, far)
    assert torch.equal(far, expected)
    far.copy_(near)
    nothing = torch.empty(3, 0, dtype=torch.int32, device=DEVICE)
    log_sum, _ = K.log_sums(far, nothing, 1.0)
    assert torch.equal(log_sum, values[Q_LOG_SUM])
    K.spread(near, log_sum, ones, 1.0, expected)
    K.spread(far, log_sum, ones, 1.0, far)
    assert torch.equal(far, expected)
