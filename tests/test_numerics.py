"""The comparison rule rejects wrong gradients and accepts other correct ways to compute one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec
from tests.inputs import FAMILIES
from tests.numerics import (
    assert_matches_reference,
    definition,
    exact,
    needed_c,
    ulp,
    unit_upstream,
)

SPECS = [
    DivergenceSpec("forward_kl", temperature=2.0),
    DivergenceSpec("reverse_kl", temperature=2.0),
    DivergenceSpec("jsd", beta=0.3, temperature=2.0),
    DivergenceSpec("jsd", beta=0.5, temperature=0.7),
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
) -> Tensor:
    """The gradient in `inside`, with the given mistakes."""
    log_q = log_softmax(student.to(inside) / spec.temperature)
    log_p = log_softmax(teacher.to(inside) / spec.temperature)
    p, q = log_p.exp(), log_q.exp()
    beta = 1 - spec.beta if swap_beta else spec.beta
    if spec.kind == "forward_kl":
        h = -p
    elif spec.kind == "reverse_kl":
        h = q * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        h = (1 - beta) * q * (log_q - log_m)
    grad = (h - centring * q * h.sum(-1, keepdim=True)) * upstream[:, None]
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
    "no centring": with_options(centring=0.0),
    "centring off by 1 %": with_options(centring=0.99),
    "low precision throughout": low_precision,
    "beta swapped": with_options(swap_beta=True),
}
# Mistakes without effect: two KLs have no beta, swapping one half is none, and forward KL's h sums
# to -1 for every input, where the other kinds have nothing to centre if student equals teacher.
HARMLESS = {
    ("beta swapped", "forward_kl-0.5"),
    ("beta swapped", "reverse_kl-0.5"),
    ("beta swapped", "jsd-0.5"),
}


def accepted(candidate: Callable, spec: DivergenceSpec, dtype: torch.dtype, family: str) -> bool:
    student, teacher = (x.to(dtype) for x in FAMILIES[family](*SHAPE))
    want = exact(student, teacher, spec)
    upstream = unit_upstream(want, torch.float32)
    up = upstream.double()[:, None]
    got = candidate(student, teacher, spec, upstream)
    try:
        assert_matches_reference(got, want.grad * up, want.grad_magnitude * up, want.x_max, dtype)
    except AssertionError:
        return False
    return True


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
    assert passed == (families if (mutant, name(spec)) in HARMLESS else [])


@pytest.mark.parametrize("scaling", ["none", "t2"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
def test_closed_form_is_autograd_of_the_definition(beta, kind, scaling):
    spec = DivergenceSpec(kind, beta, 2.0, scaling)
    student, teacher = (x.double() for x in FAMILIES["peaked"](5, 33))
    want = exact(student, teacher, spec)
    student.requires_grad_()
    loss = definition(student, teacher, spec)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    double = torch.float64
    assert_matches_reference(loss.detach(), want.loss, want.loss_magnitude, want.x_max, double)
    assert_matches_reference(grad, want.grad, want.grad_magnitude, want.x_max, double)


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
