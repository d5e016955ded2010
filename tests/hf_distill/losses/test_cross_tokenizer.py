"""Universal logit distillation: the paper's formula, the release's rule, both paths, memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill.losses import CrossTokenizerLoss, Terms, Tokens, chunks, not_finite
from hf_distill.losses.cross_tokenizer import sorted_distance
from hf_distill.models.signals import Head, Signal
from metal_ops import SparseTeacher, reference
from tests.metal_ops.ops.watching import Watch

N, H = 7, 8
PAIRED = torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool()
SIZES = [(11, 17), (17, 11), (11, 11)]
# roundings of 2.2e-16 in sums of some ten terms of order 1 to 30
CLOSE: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}


def draw(
    vocab: int, teacher_vocab: int, count: int = N, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(count, H, dtype=dtype),
        "weight": torch.randn(vocab, H, dtype=dtype),
        "bias": torch.randn(vocab, dtype=dtype),
        "teacher_hidden": torch.randn(count, 6, dtype=dtype),
        "teacher_weight": 0.5 * torch.randn(teacher_vocab, 6, dtype=dtype),
        "targets": torch.randint(0, vocab, (count,)),
        "weights": torch.rand(count, dtype=dtype),
        "hard_weights": torch.rand(count, dtype=dtype),
    }


def signal(given: dict[str, Tensor], paired: Tensor | None = None, logits: bool = False) -> Signal:
    hidden = given["teacher_hidden"] if paired is None else given["teacher_hidden"][paired]
    found = Signal(hidden=hidden, head=Head(given["teacher_weight"], None, 0.8), paired=paired)
    return Signal(logits=found.dense(), paired=paired) if logits else found


def tokens_of(given: dict[str, Tensor]) -> Tokens:
    return Tokens(given["targets"], given["hard_weights"], corrected=given["weights"])


def run(
    loss: CrossTokenizerLoss, given: dict[str, Tensor], path: str, teacher: Signal
) -> tuple[Terms, list[Tensor]]:
    """The terms, and the gradients of hidden states, weight and bias."""
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    student = Signal(hidden=leaves[0], head=Head(*leaves[1:], 0.7, 3.0))
    if path == "logits":
        student = Signal(logits=reference.head(*leaves, 0.7, 3.0))
    terms = loss(student, teacher, tokens_of(given))
    return terms, list(torch.autograd.grad(terms.loss, leaves))


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [x / sum(powers) for x in powers]


def paper(student: list[float], teacher: list[float], temperature: float) -> list[float]:
    """A token's loss, and behind it the derivative for each student logit, in plain floats."""
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    order = sorted(range(len(q)), key=lambda k: -q[k])
    ranked = sorted(p, reverse=True)
    size = max(len(q), len(p))
    loss, slope = 0.0, [0.0] * len(q)  # slope: d loss / d q_k
    for i in range(size):
        mine = q[order[i]] if i < len(q) else 0.0
        theirs = ranked[i] if i < len(p) else 0.0
        loss += abs(mine - theirs)
        if i < len(q):
            slope[order[i]] = math.copysign(1.0, mine - theirs)
    mean = sum(s * x for s, x in zip(slope, q, strict=True))
    return [loss, *(x * (s - mean) / temperature for s, x in zip(slope, q, strict=True))]


@pytest.mark.parametrize("paired", [None, PAIRED], ids=["all", "some"])
@pytest.mark.parametrize(
    ("alpha", "temperature", "scaling"), [(1.0, 1.0, "none"), (0.6, 2.0, "t2"), (0.0, 2.0, "none")]
)
@pytest.mark.parametrize(("vocab", "teacher_vocab"), SIZES)
def test_value_and_gradient_are_the_papers(
    monkeypatch: pytest.MonkeyPatch,
    vocab: int,
    teacher_vocab: int,
    alpha: float,
    temperature: float,
    scaling: str,
    paired: Tensor | None,
) -> None:
    # 3, 3 and 1 tokens
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 3 * max(vocab, teacher_vocab))
    given = draw(vocab, teacher_vocab)
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    z = reference.head(*leaves, 0.7, 3.0)
    w = 0.8 * given["teacher_hidden"] @ given["teacher_weight"].T
    found = torch.tensor(
        [paper(a, b, temperature) for a, b in zip(z.tolist(), w.tolist(), strict=True)],
        dtype=torch.float64,
    )
    on = torch.ones(N, dtype=torch.bool) if paired is None else paired
    found = found * on[:, None]
    scale = temperature**2 if scaling == "t2" else 1.0
    soft = scale * found[:, 0]
    hard = -z.softmax(-1)[torch.arange(N), given["targets"]].log()
    want = alpha * (given["weights"] * soft).sum()
    want = want + (1 - alpha) * (given["hard_weights"] * hard.detach()).sum()
    upstream = alpha * scale * given["weights"][:, None] * found[:, 1:]
    if alpha < 1.0:
        total = (1 - alpha) * (given["hard_weights"] * hard).sum()
        upstream = upstream + torch.autograd.grad(total, z, retain_graph=True)[0]
    grads = torch.autograd.grad(z, leaves, upstream)
    loss = CrossTokenizerLoss(alpha, temperature, scaling)
    for path, logits in (("hidden", False), ("hidden", True), ("logits", False), ("logits", True)):
        terms, got = run(loss, given, path, signal(given, paired, logits))
        torch.testing.assert_close(terms.loss.detach(), want.detach(), **CLOSE)
        torch.testing.assert_close(terms.metrics["soft"], soft, **CLOSE)
        assert ("hard" in terms.metrics) == (alpha < 1.0)
        if alpha < 1.0:
            torch.testing.assert_close(terms.metrics["hard"], hard.detach(), **CLOSE)
        for one, two in zip(got, grads, strict=True):
            assert two.abs().max() > 0.02
            torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize(("student_tokens", "teacher_tokens"), [(7, 4), (4, 7)])
def test_a_row_is_the_releases_up_to_the_divisor(student_tokens: int, teacher_tokens: int) -> None:
    """It pads sorted tables with zeros and takes the mean over the tokens that both have."""
    torch.manual_seed(2)
    z, w = torch.randn(student_tokens, 11).double(), 2 * torch.randn(teacher_tokens, 17).double()
    both = min(student_tokens, teacher_tokens)
    tables = [x.softmax(-1).sort(dim=-1, descending=True).values for x in (z, w)]
    tables[0] = torch.nn.functional.pad(tables[0], (0, 6))
    theirs = (tables[0][:both] - tables[1][:both]).abs().sum(-1).mean()
    paired = torch.arange(student_tokens) < both
    teacher = Signal(logits=w[:both], paired=paired)
    weights = torch.full((student_tokens,), 1 / student_tokens, dtype=torch.float64)
    tokens = Tokens(torch.zeros(student_tokens, dtype=torch.long), weights)
    terms = CrossTokenizerLoss(1.0)(Signal(logits=z), teacher, tokens)
    torch.testing.assert_close(terms.loss * student_tokens / both, theirs, **CLOSE)
    lam = 1.5
    own = CrossTokenizerLoss(lam / (1 + lam))(Signal(logits=z), teacher, tokens)
    ce = torch.nn.functional.cross_entropy(z, tokens.targets)
    torch.testing.assert_close(
        (1 + lam) * own.loss, ce + lam * theirs * both / student_tokens, **CLOSE
    )


def test_it_does_not_know_which_token_is_meant() -> None:
    torch.manual_seed(3)
    p = torch.randn(5, 13).double().softmax(-1)
    assert sorted_distance(p[:, torch.randperm(13)], p).max() == 0.0
    spread, sure = torch.full((1, 1000), 1e-3), torch.eye(3)[:1]
    assert sorted_distance(spread, sure).item() == pytest.approx(2 - 2e-3, rel=1e-5)


def test_a_high_temperature_leaves_no_gradient_to_the_smaller_vocabulary() -> None:
    torch.manual_seed(4)
    z, w = 3 * torch.randn(4, 40).double(), 3 * torch.randn(4, 400).double()
    for first, second, is_left in ((z, w, False), (w, z, True)):
        norms = []
        for temperature in (1.0, 64.0):
            x = first.clone().requires_grad_()
            q, p = ((y / temperature).softmax(-1) for y in (x, second))
            norms.append(torch.autograd.grad(sorted_distance(q, p).sum(), x)[0].norm())
        assert norms[0] > 0.1
        assert (norms[1] > 1e-4) == is_left
        assert is_left or norms[1] < 1e-15


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_metrics(path: str) -> None:
    given = draw(11, 17)
    found = run(CrossTokenizerLoss(0.5, 2.0), given, path, signal(given, PAIRED))[0].metrics
    z = reference.head(given["hidden"], given["weight"], given["bias"], 0.7, 3.0)
    w = signal(given).dense()
    q, p = ((x / 2).softmax(-1) for x in (z, w))
    own, theirs = (-(x * x.log()).sum(-1) for x in (q, p))
    torch.testing.assert_close(found["student_entropy"], own, **CLOSE)
    torch.testing.assert_close(found["teacher_entropy"][PAIRED], theirs[PAIRED], **CLOSE)
    assert found["teacher_entropy"][~PAIRED].isnan().all()
    assert torch.equal(found["paired"], PAIRED.double())
    measured = {"soft", "student_entropy", "teacher_entropy", "paired"}
    assert found.keys() == measured | {"hard"}
    assert run(CrossTokenizerLoss(1.0), given, path, signal(given))[0].metrics.keys() == measured


def test_a_nan_is_named_by_its_side() -> None:
    given = draw(11, 17)
    given["teacher_hidden"][3] = torch.nan
    terms, _ = run(CrossTokenizerLoss(0.5), given, "hidden", signal(given, PAIRED))
    with pytest.raises(FloatingPointError, match="teacher logits are NaN at 1 of 7 tokens"):
        raise not_finite(terms)


def test_a_masked_entry_is_no_nan() -> None:
    given = draw(11, 17)
    z = torch.randn(N, 11).double()
    z[:, 3] = -torch.inf
    z.requires_grad_()
    tokens = Tokens(given["targets"].clamp_max(2), given["weights"])
    terms = CrossTokenizerLoss(0.5)(Signal(logits=z), signal(given), tokens)
    (grad,) = torch.autograd.grad(terms.loss, z)
    assert bool(terms.metrics["student_entropy"].isfinite().all())
    assert bool(grad.isfinite().all())
    assert grad[:, 3].abs().max() == 0


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(300, 500), (500, 300)])
def test_logits_of_all_tokens_are_never_there(
    monkeypatch: pytest.MonkeyPatch, vocab: int, teacher_vocab: int
) -> None:
    count = 40
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 10 * 500)
    given = draw(vocab, teacher_vocab, count, torch.float32)
    with Watch() as watch:
        run(CrossTokenizerLoss(0.5), given, "hidden", signal(given))
    assert max(watch.sizes) == 10 * 500
    z = (given["hidden"] @ given["weight"].T).requires_grad_()
    with Watch() as watch:
        tokens = Tokens(given["targets"], given["weights"])
        CrossTokenizerLoss(1.0)(Signal(logits=z), signal(given), tokens).loss.backward()
    # the gradient, and its product with what comes from above
    assert sum(size >= count * vocab for size in watch.sizes) <= 3


def test_an_own_hard_loss_takes_the_place_of_the_cross_entropy() -> None:
    given = draw(11, 17)
    z = torch.randn(N, 11).double()
    tokens, own = tokens_of(given), torch.tensor(5.0).double()
    soft = CrossTokenizerLoss(1.0)(Signal(logits=z), signal(given), tokens).loss
    student = Signal(logits=z, own_loss=own)
    loss = CrossTokenizerLoss(0.25)(student, signal(given), tokens).loss
    torch.testing.assert_close(loss, 0.25 * soft + 0.75 * own, **CLOSE)


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_no_tokens_have_a_loss_of_zero_with_a_gradient(path: str) -> None:
    given = draw(11, 17, 0)
    terms, grads = run(CrossTokenizerLoss(0.5), given, path, signal(given))
    assert terms.loss == 0
    assert [g.shape for g in grads] == [(0, H), (11, H), (11,)]


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_what_cannot_be_compared_is_an_error(path: str) -> None:
    given = draw(11, 17)
    known = SparseTeacher(torch.zeros(N, 3).long(), torch.zeros(N, 3), torch.zeros(N))
    for teacher, words in (
        (Signal(sparse=known), "sorts the teacher's whole distribution, .* knows 3 entries"),
        (signal(given, torch.zeros(N).bool()), "speak of one of 7 scored tokens, got none"),
    ):
        with pytest.raises(ValueError, match=words):
            run(CrossTokenizerLoss(0.5), given, path, teacher)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature_scaling": "t"}])
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        CrossTokenizerLoss(0.5, **changes)


@pytest.mark.parametrize("reused", [1.0, 1e-6])
@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_small_weights_do_not_vanish_in_float16(path: str, reused: float) -> None:
    """A long batch: of the order of 1e-8, less than float16's smallest number."""
    exact = draw(11, 17)
    exact |= {name: 1e-8 * exact[name] for name in ("weights", "hard_weights")}
    exact["weights"] *= reused  # the hard loss's tokens still count
    given = {k: v if v.dtype == torch.int64 else v.half() for k, v in exact.items()}
    given |= {name: exact[name].float() for name in ("weights", "hard_weights")}
    want = {k: v if v.dtype == torch.int64 else v.double() for k, v in given.items()}
    grads = []
    for values in (given, want):
        hidden, weight = (values[name].clone().requires_grad_() for name in ("hidden", "weight"))
        student = Signal(hidden=hidden, head=Head(weight, None))
        if path == "logits":
            student = Signal(logits=hidden @ weight.T)
        terms = CrossTokenizerLoss(0.5)(student, signal(values), tokens_of(values))
        loss = 1e8 * terms.loss  # as a gradient scaler does
        grads.append(torch.autograd.grad(loss, [hidden, weight]))
    for one, two in zip(*grads, strict=True):
        # float16 has 11 bits: of logits up to 10 and sums of 11 terms
        torch.testing.assert_close(one.double(), two, rtol=0, atol=2e-2 * two.abs().max().item())
