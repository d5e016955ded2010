"""The comparison rule rejects wrong gradients and accepts other correct ways to compute one."""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, reference
from metal_ops.selftest.inputs import FAMILIES, missing_rules, untied
from metal_ops.selftest.numerics import (
    Exact,
    assert_matches_reference,
    definition,
    exact,
    needed_c,
    ulp,
    unit_upstream,
)
from metal_ops.spec import KINDS, SUPPORTS

SPECS = [
    DivergenceSpec("forward_kl", temperature=2.0),
    DivergenceSpec("reverse_kl", temperature=2.0),
    DivergenceSpec("jsd", beta=0.3, temperature=2.0),
    DivergenceSpec("jsd", beta=0.5, temperature=0.7),
    DivergenceSpec("soft_ce", temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("tvd", temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("skew_kl", beta=0.3, temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("skew_reverse_kl", beta=0.3, temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("mixed_kl", beta=0.3, temperature=2.0, temperature_scaling="t2"),
    DivergenceSpec("alpha", beta=0.3, temperature=2.0, temperature_scaling="t2"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE, BLOCK = (6, 4097), 1024
Softmax = Callable[[Tensor], Tensor]


def name(value: object) -> str:
    if isinstance(value, DivergenceSpec):
        return f"{value.kind}-{value.beta}"
    return str(value).removeprefix("torch.")


def eager(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def blockwise(x: Tensor) -> Tensor:
    """Log-sum-exp of one block after the other, as kernels keep it."""
    largest, total = torch.full_like(x[:, :1], -math.inf), torch.zeros_like(x[:, :1])
    for block in x.split(BLOCK, -1):
        new = torch.maximum(largest, block.amax(-1, keepdim=True))
        total = total * (largest - new).exp() + (block - new).exp().sum(-1, keepdim=True)
        largest = new
    return x - (largest + total.log())


def base_two(x: Tensor) -> Tensor:
    """With exp2 and log2, as GPUs have them in hardware."""
    x = x * math.log2(math.e)
    shifted = x - x.amax(-1, keepdim=True)
    return (shifted - shifted.exp2().sum(-1, keepdim=True).log2()) * math.log(2)


def mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


# h = d f / d log q of log p, log q, beta
SLOPES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda x, y, a: -x.exp(),
    "reverse_kl": lambda x, y, a: y.exp() * (y - x),
    "jsd": lambda x, y, a: (1 - a) * y.exp() * (y - mixture(x, y, a)),
    "soft_ce": lambda x, y, a: -x.exp(),
    "tvd": lambda x, y, a: y.exp() * (y - x).sign() / 2,
    "skew_kl": lambda x, y, a: (a - 1) * (x + y - mixture(x, y, a)).exp(),
    "skew_reverse_kl": lambda x, y, a: (
        y.exp() * (y - mixture(y, x, a) - a * (y - mixture(y, x, a)).exp())
    ),
    "mixed_kl": lambda x, y, a: (1 - a) * y.exp() * (y - x) - a * x.exp(),
    "alpha": lambda x, y, a: -(a * x + (1 - a) * y).exp() / a,
}


def gradient(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    upstream: Tensor,
    *,
    log_softmax: Softmax = eager,
    inside: torch.dtype = torch.float32,
    centring: float = 1.0,
    swap_beta: bool = False,
    temperature: bool = True,
    scaling: bool = True,
) -> Tensor:
    """The gradient in `inside`, with the given mistakes."""
    log_q = log_softmax(student.to(inside) / spec.temperature)
    log_p = log_softmax(teacher.to(inside) / spec.temperature)
    beta = 1 - spec.beta if swap_beta else spec.beta
    q, h = log_q.exp(), SLOPES[spec.kind](log_p, log_q, beta)
    grad = (h - centring * q * h.sum(-1, keepdim=True)) * upstream[:, None]
    grad = grad * spec.scale if scaling else grad
    return (grad / spec.temperature if temperature else grad).to(student.dtype)


def edited(edit: Callable[[Tensor], object]) -> Callable[..., Tensor]:
    """The correct gradient, then `edit` on it in place."""

    def mutant(*args) -> Tensor:
        out = gradient(*args).clone()
        edit(out)
        return out

    return mutant


def low_precision(student: Tensor, *args) -> Tensor:
    low = torch.bfloat16 if student.dtype == torch.float32 else student.dtype
    return gradient(student, *args, inside=low)


def with_options(**options) -> Callable[..., Tensor]:
    return lambda *args: gradient(*args, **options)


LEGITIMATE = {
    "eager": gradient,
    "blockwise": with_options(log_softmax=blockwise),
    "base two": with_options(log_softmax=base_two),
    "float64": with_options(inside=torch.float64),
}
MUTANTS = {
    "zero gradient": edited(lambda g: g.zero_()),
    "tail block skipped": edited(lambda g: g[:, g.shape[1] // BLOCK * BLOCK - BLOCK :].zero_()),
    "last column dropped": edited(lambda g: g[:, -1].zero_()),
    "last column of each block dropped": edited(lambda g: g[:, BLOCK - 1 :: BLOCK].zero_()),
    "one row not written": edited(lambda g: g[3].zero_()),
    "row 0 read twice": edited(lambda g: g[1].copy_(g[0])),
    "gradient times 1.02": edited(lambda g: g.mul_(1.02)),
    "one column sign-flipped": edited(lambda g: g[:, 7].neg_()),
    "one column shifted": edited(lambda g: g.copy_(g.roll(1, 1))),
    "1/T missing": with_options(temperature=False),
    "T^2 missing": with_options(scaling=False),
    "teacher and student swapped": lambda x, y, *args: gradient(y, x, *args),
    "no centring": with_options(centring=0.0),
    "centring off by 1 %": with_options(centring=0.99),
    "low precision throughout": low_precision,
    "beta swapped": with_options(swap_beta=True),
}


def harmless(mutant: str, spec: DivergenceSpec) -> bool:
    """Whether the mistake has no effect."""
    if mutant == "beta swapped":
        return spec.kind in ("forward_kl", "reverse_kl", "soft_ce", "tvd") or spec.beta == 0.5
    return mutant == "T^2 missing" and spec.scale == 1.0


def agrees(*args) -> bool:
    try:
        assert_matches_reference(*args)
    except AssertionError:
        return False
    return True


@functools.lru_cache(maxsize=8)
def inputs(spec: DivergenceSpec, dtype: torch.dtype, family: str) -> tuple[Tensor, Tensor, Exact]:
    torch.manual_seed(zlib.crc32(family.encode()))
    student, teacher = (x.to(dtype) for x in FAMILIES[family](*SHAPE))
    return student, teacher, exact(student, teacher, spec)


def accepted(candidate: Callable, spec: DivergenceSpec, dtype: torch.dtype, family: str) -> bool:
    student, teacher, want = inputs(spec, dtype, family)
    upstream = unit_upstream(want, torch.float32)
    up = upstream.double()[:, None]
    got = candidate(student, teacher, spec, upstream)
    return agrees(got, want.grad * up, want.grad_magnitude * up, want.x_max, dtype)


@pytest.mark.parametrize("candidate", LEGITIMATE)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_accepts(spec, dtype, candidate):
    refused = [f for f in FAMILIES if not accepted(LEGITIMATE[candidate], spec, dtype, f)]
    assert not refused


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_rejects(spec, dtype, mutant):
    families = ["randn", "peaked", "planted"]
    passed = [f for f in families if accepted(MUTANTS[mutant], spec, dtype, f)]
    assert passed == (families if harmless(mutant, spec) else [])


def supported(kind: str, beta: float) -> list[DivergenceSpec]:
    """A kind over the full vocabulary and over every support it may have."""
    found = [DivergenceSpec(kind, beta, 2.0, scaling) for scaling in ("none", "t2")]
    for support in SUPPORTS[1:]:
        for missing in missing_rules(kind, beta):
            options = {"support": support, "top_k": 5, "missing": missing}
            found.append(DivergenceSpec(kind, beta, 2.0, "t2", **options))
    return found


@pytest.mark.parametrize(
    ("kind", "beta"),
    # a skew of one is zero for every student, and refused
    [(k, b) for k in KINDS for b in (0.0, 0.2, 1.0) if b < 1.0 or not k.startswith("skew")],
)
def test_closed_form_is_autograd_of_the_definition(kind, beta):
    student, teacher = (x.double() for x in FAMILIES["peaked"](5, 33))
    for spec in supported(kind, beta):
        want = exact(student, teacher, spec)
        leaf = student.clone().requires_grad_()
        loss = definition(leaf, teacher, spec)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        double = torch.float64
        x = want.x_max
        assert_matches_reference(loss.detach(), want.loss, want.loss_magnitude, x, double, spec)
        assert_matches_reference(grad, want.grad, want.grad_magnitude, x, double, spec)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=name)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    for value in (1.0, 1.5, 1.9921875, 2.0, 1000.0, 2.0**-10):
        x = torch.tensor(value, dtype=dtype)
        after = torch.nextafter(x.float(), torch.tensor(math.inf))
        if dtype == torch.float32:
            assert ulp(x.double(), dtype).item() == after.item() - value
        assert ulp(-x.double(), dtype).item() == torch.finfo(dtype).eps * 2.0 ** math.floor(
            math.log2(value)
        )
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ulp(torch.zeros(1).double(), dtype).item() == smallest


def test_the_rule_itself():
    one, x_max = torch.ones(1, dtype=torch.float64), torch.zeros(1)
    eps = torch.finfo(torch.float32).eps
    for errors, needed in ((0, 0.0), (1, 0.0), (3, 2.0), (11, 10.0)):
        actual = (one + errors * eps).float()
        assert needed_c(actual, one, one, x_max, torch.float32).item() == needed
    assert needed_c(actual, one, one, x_max + 4, torch.float32).item() == 2.0
    assert needed_c(actual, one, 2 * one, x_max, torch.float32).item() == 5.0
    for bad in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="needs c = inf"):
            assert_matches_reference(torch.tensor([bad]), one, one, x_max, torch.float32)
    with pytest.raises(AssertionError, match=r"torch.float32, want torch.bfloat16"):
        assert_matches_reference(one.float(), one, one, x_max, torch.bfloat16)
    with pytest.raises(AssertionError, match=r"\[2\]\), want torch.Size\(\[1\]\)"):
        assert_matches_reference(torch.ones(2), one, one, x_max, torch.float32)


Result = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, DivergenceSpec], Tensor]


def changed(**fields: float | str) -> Loss:
    return lambda x, y, spec: reference.divergence(x, y, replace(spec, **fields))


TWICE = [0, 0, 2, 3, 4, 5]
# losses of which autograd takes the gradient: whole implementations with one mistake each
LOSSES: dict[str, Loss] = {
    "correct": reference.divergence,
    "beta swapped": lambda x, y, s: reference.divergence(x, y, replace(s, beta=1 - s.beta)),
    "1/T missing": changed(temperature=1.0, temperature_scaling="none"),
    "T^2 missing": changed(temperature_scaling="none"),
    "teacher and student swapped": lambda x, y, s: reference.divergence(y, x, s),
    "missing tail bucket": changed(missing="renormalise"),
    "tail bucket left out of the sum": lambda x, y, s: (
        s.scale * reference.entries(*restricted(x, y, s), s.kind, s.beta)[..., :-1].sum(-1)
    ),
    "one entry too few": lambda x, y, s: reference.divergence(x, y, replace(s, top_k=TOP_K - 1)),
    "last column dropped": lambda x, y, s: reference.divergence(x[:, :-1], y[:, :-1], s),
    "row 0 twice": lambda x, y, s: reference.divergence(x[TWICE], y[TWICE], s),
    "bfloat16 inside": lambda x, y, s: reference.divergence(x.bfloat16(), y.bfloat16(), s).float(),
    "zero": lambda x, y, s: 0.0 * reference.divergence(x, y, s),
}
TOP_K = 5
SUPPORTED = [
    replace(spec, temperature=2.0, temperature_scaling="t2", support=support, top_k=k)
    for spec in SPECS
    if spec.beta != 0.5 or spec.kind != "jsd"
    for support, k in (("full", None), ("teacher_topk", TOP_K), ("union", TOP_K))
]


def restricted(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Result:
    """Log-probabilities of teacher and student by category."""
    kept = reference.support(student, teacher, spec)
    log_p, log_q = (
        reference.restrict((x / spec.temperature).log_softmax(-1), kept, spec.missing)
        for x in (teacher, student)
    )
    return log_p, log_q


def judged(loss: Loss, spec: DivergenceSpec, family: str) -> tuple[bool, bool]:
    """Whether the rule accepts the value and the gradient of a loss in float32."""
    student, teacher = FAMILIES[family](6, 1023)
    teacher[:, -1] = teacher.amax(-1) + 1  # or a dropped column may be none of the kept ones
    student, teacher = (untied(x, TOP_K) for x in (student, teacher))
    want = exact(student, teacher, spec)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, spec)
    upstream = unit_upstream(want, torch.float32)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    up = upstream.double()[:, None]
    x, dtype = want.x_max, torch.float32
    return (
        agrees(value.detach(), want.loss, want.loss_magnitude, x, dtype),
        agrees(grad, up * want.grad, up * want.grad_magnitude, x, dtype),
    )


def without_effect(mistake: str, spec: DivergenceSpec) -> bool:
    """Whether a mistake leaves value and gradient as they are."""
    if mistake == "beta swapped":
        return harmless(mistake, spec)
    # the total variation is symmetric, and so is a support of both sides
    symmetric = spec.kind == "tvd" and spec.support != "teacher_topk"
    return mistake == "teacher and student swapped" and symmetric


OF_A_SUPPORT = ("missing tail bucket", "tail bucket left out of the sum", "one entry too few")
CASES = [(s, m) for s in SUPPORTED for m in LOSSES if s.support != "full" or m not in OF_A_SUPPORT]


@pytest.mark.parametrize(
    ("spec", "mistake"), CASES, ids=[f"{s.kind}-{s.support}-{m}" for s, m in CASES]
)
def test_losses(spec, mistake):
    want = mistake == "correct" or without_effect(mistake, spec)
    for family in ("randn", "peaked", "planted"):
        assert judged(LOSSES[mistake], spec, family) == (want, want), family
