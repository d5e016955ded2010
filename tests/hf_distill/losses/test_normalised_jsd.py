"""JSD / (beta (1 - beta)): its definition, its ends, its digits, and how it enters the loss."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import DivergenceLoss, Terms, Tokens, chunks, normalised_jsd
from hf_distill.losses.divergence import NEAREST_BETA
from hf_distill.models.signals import Head, Signal, TailRule
from metal_ops import DivergenceSpec, SparseTeacher, divergence, sparse_divergence
from tests.metal_ops.ops.tails import sampled

N, V, H = 9, 31, 6
TEMPERATURE = 1.5
CLIPS: dict[str, dict[str, Any]] = {
    "free": {},
    "entry": {"clip": 0.05, "clip_level": "vocab_entry"},
    "token": {"clip": 1.4, "clip_level": "token"},
    "rescale": {"clip": 1.4, "clip_level": "token_rescale"},
}


def spec_of(beta: float, **changes: Any) -> DivergenceSpec:
    return DivergenceSpec("jsd", beta, TEMPERATURE, "t2", **changes)


def loss_of(beta: float, alpha: float = 1.0, **changes: Any) -> DivergenceLoss:
    spec, factor = normalised_jsd(spec_of(beta, **changes))
    return DivergenceLoss(spec, alpha, factor=factor)


def quotient(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """[N, V] entries of KL(p || m) / (1 - beta) + KL(q || m) / beta."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    p, q = log_p.exp(), log_q.exp()
    return p * (log_p - log_m) / (1 - beta) + q * (log_q - log_m) / beta


def by_hand(student: Tensor, teacher: Tensor, beta: float, clip: str) -> Tensor:
    """[N] soft loss of each token, with a gradient."""
    log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (student, teacher))
    entries, bound = quotient(log_p, log_q, beta), CLIPS[clip].get("clip", math.inf)
    if clip == "entry":
        entries = entries.clamp(max=bound)
    value = entries.sum(-1)
    if clip == "token":
        value = value.clamp(max=bound)
    if clip == "rescale":
        value = value * (bound / value.detach()).clamp(max=1.0)
    return TEMPERATURE**2 * value


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and bias; the teacher's logits."""
    torch.manual_seed(0)
    shapes = ((N, H), (V, H), (V,), (N, V))
    hidden, weight, bias, teacher = (torch.randn(*s, dtype=torch.float64) for s in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 2 * teacher


def signals(teacher: Tensor) -> dict[str, Signal]:
    """The same teacher in each form."""
    eye = torch.eye(V, dtype=teacher.dtype)
    return {
        "hidden": Signal(hidden=teacher, head=Head(eye, None)),
        "logits": Signal(logits=teacher),
        "sparse": Signal(sparse=whole(teacher), tail=TailRule("bucket")),
    }


def whole(teacher: Tensor) -> SparseTeacher:
    log_p, ids = (teacher / TEMPERATURE).log_softmax(-1).sort(-1, descending=True)
    none = torch.full((N,), -math.inf, dtype=teacher.dtype)
    return SparseTeacher(ids, log_p, none, TEMPERATURE)


def terms_of(
    made: DivergenceLoss, form: str, teacher: Tensor, leaves: tuple[Tensor, ...], tokens: Tokens
) -> Terms:
    hidden, weight, bias = leaves
    student = Signal(hidden=hidden, head=Head(weight, bias))
    if form == "logits":
        student = Signal(logits=F.linear(hidden, weight, bias))
    return made(student, signals(teacher)[form], tokens)


@pytest.mark.parametrize("form", ["hidden", "logits", "sparse"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("beta", [0.02, 0.5, 0.9])
def test_the_loss_is_that_of_the_definition(
    form: str, clip: str, alpha: float, apart: bool, beta: float
) -> None:
    *leaves, teacher = inputs()
    targets, weights = torch.randint(0, V, (N,)), torch.rand(N, dtype=torch.float64)
    hard_weights = torch.rand(N, dtype=torch.float64) if apart else weights
    made = loss_of(beta, alpha, **CLIPS[clip])
    tokens = Tokens(targets, hard_weights, corrected=weights if apart else None)
    terms = terms_of(made, form, teacher, tuple(leaves), tokens)
    logits = F.linear(*leaves)
    soft, hard = (
        by_hand(logits, teacher, beta, clip),
        F.cross_entropy(logits, targets, reduction="none"),
    )
    cut = (by_hand(logits, teacher, beta, "free") != soft).sum()
    assert (
        (0 < cut < N) if clip.startswith(("token", "rescale")) else (cut > 0) == (clip == "entry")
    )
    want = (alpha * weights * soft + (1 - alpha) * hard_weights * hard).sum()
    torch.testing.assert_close(terms.loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.metrics["soft"], soft.detach(), rtol=1e-10, atol=1e-12)
    assert ("hard" in terms.metrics) == (alpha < 1.0)
    if alpha < 1.0:
        torch.testing.assert_close(terms.metrics["hard"], hard.detach(), rtol=1e-10, atol=0)
    mine, wanted = (torch.autograd.grad(x, leaves) for x in (terms.loss, want))
    torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-10)
    assert max(float(x.abs().max()) for x in wanted) > 1e-3


def test_a_factor_costs_no_second_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    *leaves, teacher = inputs()
    targets, weights = torch.randint(0, V, (N,)), torch.rand(N, dtype=torch.float64)

    def second(*_: Any) -> None:
        raise AssertionError("projected again")

    monkeypatch.setattr(chunks, "cross_entropy", second)
    made, together = loss_of(0.1, 0.3), Tokens(targets, weights)
    terms = terms_of(made, "hidden", teacher, tuple(leaves), together)
    assert float(terms.loss.detach()) > 0
    apart = Tokens(targets, 2 * weights, corrected=weights)
    with pytest.raises(AssertionError, match="projected again"):
        terms_of(made, "hidden", teacher, tuple(leaves), apart)


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@pytest.mark.parametrize("clip", CLIPS)
def test_the_ends_are_the_kls(beta: float, kind: str, clip: str) -> None:
    spec, factor = normalised_jsd(spec_of(beta, **CLIPS[clip]))
    assert factor == 1.0
    assert spec.resolved() == DivergenceSpec(kind, beta, TEMPERATURE, "t2", **CLIPS[clip])
    near = NEAREST_BETA / 2
    assert normalised_jsd(spec_of(abs(beta - near), **CLIPS[clip])) == (spec, 1.0)


def test_another_kind_has_no_quotient() -> None:
    with pytest.raises(ValueError, match="the kind must be 'jsd', got 'skew_kl'"):
        normalised_jsd(DivergenceSpec("skew_kl", 0.3))


def along(betas: list[float], plain: bool) -> list[float]:
    torch.manual_seed(3)
    student, teacher = 2 * torch.randn(2, 64, V, dtype=torch.float64)
    found = []
    for beta in betas:
        spec, factor = normalised_jsd(DivergenceSpec("jsd", beta))
        spec, factor = (DivergenceSpec("jsd", beta), 1.0) if plain else (spec, factor)
        found.append(float(factor * divergence(student, teacher, spec).mean()))
    return found


def largest_jump(values: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in itertools.pairwise(values))


def test_a_schedule_from_0_to_1_has_no_jump() -> None:
    """Nearer neighbours are nearer in value; the JSD itself jumps at both ends."""
    fine = [10.0**-k for k in range(11, 0, -1)]
    betas = [0.0, *fine, *(k / 10 for k in range(2, 9)), *(1 - x for x in reversed(fine)), 1.0]
    values = along(betas, plain=False)
    # the quotient differs from its limit by about beta times the spread of exp(log p - log q)
    assert abs(values[1] / values[0] - 1) < 1e-8
    assert abs(values[-2] / values[-1] - 1) < 1e-8
    assert largest_jump(values) < 0.5
    halves = [k / 64 for k in range(65)], [k / 512 for k in range(513)]
    coarse, finer = (largest_jump(along(x, plain=False)) for x in halves)
    assert finer < 0.5 * coarse
    assert largest_jump(along(betas, plain=True)) > 1e6


@pytest.mark.parametrize("side", [0.0, 1.0])
@pytest.mark.parametrize(
    ("apart", "value_error", "gradient_error"),
    # measured over 128 tokens: 2e-4 (at 3e-3, where the op's short path ends) and 5e-5; 5e-5 and
    # 8e-5 at every beta. A difference of float32 logs would be off by 6e-8 / near
    [(3.0, 5e-4, 2e-4), (0.01, 1e-4, 2e-4)],
)
@pytest.mark.parametrize("near", [0.5, 1e-3, 1e-5, 1e-8, NEAREST_BETA, 0.0])
def test_float32_loses_no_digits_near_the_ends(
    near: float, apart: float, value_error: float, gradient_error: float, side: float
) -> None:
    torch.manual_seed(1)
    teacher = 4 * torch.randn(8, 2000)
    student = teacher + apart * torch.randn(8, 2000)
    spec, factor = normalised_jsd(DivergenceSpec("jsd", abs(side - near)))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.detach().to(dtype).requires_grad_()
        value = factor * divergence(leaf, teacher.to(dtype), spec)
        value.sum().backward()
        found.append((value.detach().double(), leaf.grad.double()))
    (value, grad), (exact, exact_grad) = found
    assert float((value / exact - 1).abs().max()) < value_error
    error = (grad - exact_grad).norm(dim=-1) / exact_grad.norm(dim=-1)
    assert float(error.max()) < gradient_error


@pytest.mark.parametrize("side", [0.0, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "sampled"])
@pytest.mark.filterwarnings("ignore:reverse_kl")
def test_a_sparse_teacher_loses_no_digits_near_the_ends(side: float, tail: str) -> None:
    logits = 3 * torch.randn(N, V, dtype=torch.float64)
    student = logits + torch.randn(N, V, dtype=torch.float64)
    teacher = sampled(logits, 4, 8, 1.0)
    for near in (1e-3, 1e-6, NEAREST_BETA):
        spec, factor = normalised_jsd(DivergenceSpec("jsd", abs(side - near)))
        found = []
        for dtype in (torch.float32, torch.float64):
            leaf = student.to(dtype).requires_grad_()
            value = factor * sparse_divergence(leaf, teacher, spec, tail=tail)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
            found.append((value.detach().double(), grad.double()))
        (value, grad), (exact, exact_grad) = found
        assert float((value / exact - 1).abs().max()) < 1e-4
        assert float((grad - exact_grad).norm() / exact_grad.norm()) < 1e-4


@pytest.mark.parametrize("form", ["hidden", "logits", "sparse"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_cross_entropy_without_a_share_is_measured_where_it_is_wanted(
    form: str, alpha: float
) -> None:
    *leaves, teacher = inputs()
    tokens = Tokens(torch.randint(0, V, (N,)), torch.rand(N, dtype=torch.float64))
    spec = DivergenceSpec("forward_kl", 0.5, TEMPERATURE)
    bare, full = (
        terms_of(
            DivergenceLoss(spec, alpha, measures_hard=wanted), form, teacher, tuple(leaves), tokens
        )
        for wanted in (False, True)
    )
    want = F.cross_entropy(F.linear(*leaves), tokens.targets, reduction="none").detach()
    torch.testing.assert_close(full.metrics["hard"], want, rtol=1e-10, atol=0)
    others = {"soft", "student_entropy", "teacher_entropy", "top1_agreement"}
    assert full.metrics.keys() == others | {"hard"}
    assert bare.metrics.keys() == (others if alpha == 1.0 else full.metrics.keys())
    if alpha < 1.0:
        torch.testing.assert_close(bare.metrics["hard"], want, rtol=1e-10, atol=0)
    torch.testing.assert_close(full.loss, bare.loss, rtol=1e-12, atol=0)
    one, other = (torch.autograd.grad(x.loss, leaves) for x in (bare, full))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("side", [0.0, 1.0])
@pytest.mark.parametrize("near", [1e-2, 1e-5, NEAREST_BETA])
def test_float16_gradients_do_not_fade_near_the_ends(
    form: str, alpha: float, side: float, near: float
) -> None:
    *leaves, teacher = (x.detach().half() for x in inputs())
    scored = torch.randint(0, V, (N,)), torch.rand(N) / N
    made, found = loss_of(abs(side - near), alpha), []
    for dtype in (torch.float16, torch.float64):
        mine = tuple(x.detach().to(dtype).requires_grad_() for x in leaves)
        targets, weights = scored[0], scored[1].to(torch.promote_types(dtype, torch.float32))
        terms = terms_of(made, form, teacher.to(dtype), mine, Tokens(targets, weights))
        found.append([x.double() for x in torch.autograd.grad(terms.loss, mine)])
    for grad, exact in zip(*found, strict=True):
        # roundings of float16 values; measured: 1e-3. Faded gradients are off by 0.1 and more
        assert float((grad - exact).norm() / exact.norm()) < 1e-2
