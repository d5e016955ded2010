"""The teacher's entropy at temperature 1, from every kind of signal, against sums in float64."""

import math

import pytest
import torch
from torch import Tensor

from hf_distill.losses import chunks, entropy_share
from hf_distill.losses.entropy import teacher_entropy
from hf_distill.models.signals import Head, Signal
from metal_ops import SparseTeacher, TailSamples

N, H, V = 11, 6, 23
EPS = torch.finfo(torch.float32).eps
ROUNDING = 8 * EPS  # relative to the sum of -p log p; measured: 1.2 eps


def loop(logits: Tensor) -> Tensor:
    """[N] by plain sums."""
    found = []
    for row in logits.double().tolist():
        total = sum(math.exp(x) for x in row)
        found.append(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row))
    return torch.tensor(found, dtype=torch.float64)


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=dtype) for n in (N, V))
    bias = torch.randn(V, generator=generator, dtype=dtype)
    return hidden, Head(weight, bias, 0.7, 3.0)


def projected(hidden: Tensor, head: Head) -> Tensor:
    assert head.bias is not None
    raw = (hidden.double() @ head.weight.double().T + head.bias.double()) * head.logit_scale
    return 3.0 * torch.tanh(raw / 3.0)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_dense_signals_in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", rows * V)
    hidden, head = made()
    logits = projected(hidden, head)
    want = loop(logits)
    assert want.max() - want.min() > 0.5
    for signal in (Signal(logits=logits.float()), Signal(hidden=hidden, head=head)):
        found = teacher_entropy(signal)
        assert found.dtype == torch.float32
        assert ((found - want).abs() / want).max() <= ROUNDING
        share = entropy_share(signal)
        assert ((share - want / math.log(V)).abs() * math.log(V) / want).max() <= 2 * ROUNDING


def test_float64_stays_and_nothing_gives_nothing() -> None:
    hidden, head = made(torch.float64)
    found = teacher_entropy(Signal(hidden=hidden.requires_grad_(), head=head))
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert (found - loop(projected(hidden.detach(), head))).abs().max() <= 1e-14
    assert entropy_share(Signal(hidden=hidden[:0], head=head)).shape == (0,)
    assert entropy_share(Signal(logits=hidden[:0])).shape == (0,)


def test_ends_of_the_scale() -> None:
    """Sure, masked but for two, and even; 16 bits."""
    logits = torch.full((3, V), -torch.inf)
    logits[0, 4] = 0.0
    logits[1, :2] = 7.0
    logits[2] = -2.0
    for x in (logits, logits.bfloat16()):
        found = entropy_share(Signal(logits=x))
        assert found.tolist() == pytest.approx([0.0, math.log(2) / math.log(V), 1.0], abs=2 * EPS)
        assert found.max() <= 1.0


def sparse(temperature: float = 1.0) -> tuple[Tensor, SparseTeacher]:
    log_p = torch.log_softmax(projected(*made()), dim=-1)
    kept, ids = log_p.topk(5, dim=-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    ids[0, 4], kept[0, 4] = -1, 0.0  # padding, whatever its number
    rest[0] = log_p[0].scatter(-1, ids[0, :4], -torch.inf).logsumexp(-1)
    return log_p, SparseTeacher(ids, kept.float(), rest.float(), temperature)


def test_a_sparse_teacher_is_known_from_below() -> None:
    log_p, known = sparse()
    share = entropy_share(Signal(sparse=known), V)
    for row in range(N):
        entries = [x for i, x in zip(known.ids[row], known.log_probs[row], strict=True) if i >= 0]
        entries = [float(x) for x in (*entries, known.log_tail[row])]
        want = -sum(math.exp(x) * x for x in entries) / math.log(V)
        assert share[row].item() == pytest.approx(want, rel=ROUNDING)
    assert (share < loop(log_p) / math.log(V)).all()
    with pytest.raises(ValueError, match="needs the size of the vocabulary"):
        entropy_share(Signal(sparse=known))


def test_a_sparse_teacher_at_another_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at temperature 2 and cannot be taken at another"):
        entropy_share(Signal(sparse=sparse(2.0)[1]), V)


def test_samples_that_say_too_much_are_cut() -> None:
    _, known = sparse()
    ids = torch.full((N, 1), 3)
    weights = torch.full((N, 1), 9.0)
    samples = TailSamples(ids, torch.full((N, 1), -4.0), weights)
    share = entropy_share(Signal(sparse=known._replace(samples=samples)), V)
    assert (share == 1.0).all()
