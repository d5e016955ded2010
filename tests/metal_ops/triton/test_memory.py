"""What the kernels read and write: in bounds, as often as needed, no row that does not count."""

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec
from metal_ops.backends import triton
from metal_ops.backends.kernels import HardTerm
from metal_ops.selftest.inputs import peaked
from metal_ops.spec import KINDS
from tests.metal_ops.triton.interpreter import DEVICE
from tests.metal_ops.triton.memory import Watch

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter")
K = triton.KERNELS
ROWS, VOCAB, GUARD = 4, 97, 7  # 97 is not a multiple of a block
COUNTS = torch.tensor([1.0, 0.0, -2.0, float("nan")])  # row 1 does not count


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(triton, "MAX_BLOCK", 32)
    return Watch(monkeypatch)


def strided(dtype: torch.dtype, columns: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Rows with columns between them that no kernel may touch."""
    wide = (x.to(dtype) for x in peaked(ROWS, columns + GUARD))
    student, teacher = (x[:, :columns] for x in wide)
    return student, teacher


def times(reads: int) -> Tensor:
    return torch.where(COUNTS == 0, 0, reads)[:, None].expand(ROWS, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [0, 3, 64])
def test_forward_reads_each_row_twice(units, dtype, watch, monkeypatch):
    monkeypatch.setattr(triton, "_units", lambda _: units)
    K.forward(*strided(dtype), COUNTS, DivergenceSpec("jsd"))
    assert [name for name, _ in watch.launches] == ["normalise", "forward"][
        -1 if not units else 0 :
    ]
    for name, (student, teacher, weights, *rest) in watch.launches:
        for side in (student, teacher):
            assert torch.equal(side.reads, times(1 if units else 2))
            assert not side.writes.any()
            assert side.strays == 0
        assert not weights.writes.any()
        assert name == "normalise" or (rest[-1].writes == 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_reads_and_writes_once(kind, in_place, watch):
    student, teacher = strided(torch.float32)
    values = K.forward(student, teacher, COUNTS, DivergenceSpec(kind))
    out = student if in_place else torch.empty(ROWS, VOCAB + GUARD)[:, :VOCAB]
    K.backward(student, teacher, COUNTS, values, DivergenceSpec(kind), None, out)
    _, (x, y, *_, written) = watch.launches[-1]
    assert torch.equal(x.reads, times(1))
    assert torch.equal(y.reads, times(1))
    assert (written.writes == 1).all()
    assert (x.strays, y.strays, written.strays) == (0, 0, 0)


def test_the_hard_term_reads_the_student_alone(watch):
    student, teacher = strided(torch.float32)
    spec, nothing = DivergenceSpec("jsd"), torch.zeros(ROWS)
    values = K.forward(student, teacher, nothing, spec)
    hard = HardTerm(torch.arange(ROWS), student.logsumexp(-1), torch.tensor([0.0, 1.0, 0.0, 2.0]))
    K.backward(student, teacher, nothing, values, spec, hard, student)
    _, (x, y, *_) = watch.launches[-1]
    assert not y.reads.any()
    assert torch.equal(x.reads, (hard.share != 0).long()[:, None].expand(ROWS, VOCAB))
    assert (x.writes == 1).all()


@pytest.mark.parametrize("units", [0, 64])
def test_log_sums_reads_once(units, watch, monkeypatch):
    monkeypatch.setattr(triton, "_units", lambda _: units)
    logits = strided(torch.bfloat16)[0]
    for ids in (torch.tensor([[0, 31, 32, 96]] * ROWS), torch.empty(ROWS, 0)):
        K.log_sums(logits, ids.int(), 2.0)
    for name, uses in watch.launches:
        if name == "log_sums":
            assert (uses[0].reads == 1).all()
            assert uses[0].strays == 0
        assert (uses[-1].writes == 1).all() or (name == "log_sums" and units)


@pytest.mark.parametrize("in_place", [False, True])
def test_spread_reads_and_writes_once(in_place, watch):
    logits = strided(torch.bfloat16)[0]
    out = logits if in_place else torch.empty(ROWS, VOCAB + GUARD, dtype=logits.dtype)[:, :VOCAB]
    K.spread(logits, torch.zeros(ROWS), COUNTS, 1.0, out)
    _, (x, *_, written) = watch.launches[-1]
    assert torch.equal(x.reads, times(1))
    assert (written.writes == 1).all()
    assert (x.strays, written.strays) == (0, 0)


@pytest.mark.parametrize(("kind", "passes"), [("mse", (1, 1)), ("cosine", (2, 3))])
def test_hidden_reads_and_writes(kind, passes, watch):
    student, teacher = strided(torch.float16)
    for out, reads in zip((None, torch.empty(ROWS, VOCAB).half()), passes, strict=True):
        K.hidden_states(student, teacher, COUNTS, kind, out)
        _, (x, y, _, written, loss) = watch.launches[-1]
        assert torch.equal(x.reads, times(reads))
        assert torch.equal(y.reads, times(reads))
        assert (x.strays, y.strays) == (0, 0)
        assert (written.writes == 1).all()
        assert (loss.writes == 1).all()
