"""Runs every op on inputs of every family, against float64 on the CPU.

A last row that does not count holds NaN and must leave nothing behind. N rows, V vocabulary.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metal_ops.functional import (
    Head,
    hidden_divergence,
    linear_divergence,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.functional import divergence as divergence_op
from metal_ops.reference import HIDDEN_KINDS
from metal_ops.selftest.hidden import exact_hidden
from metal_ops.selftest.inputs import (
    FAMILIES,
    HIDDEN_FAMILIES,
    REAL_SHAPE,
    SHAPES,
    Pair,
    missing_rules,
    sparse,
    untied,
)
from metal_ops.selftest.numerics import (
    C,
    Exact,
    exact,
    exact_sparse,
    needed_c,
    sum_roundings,
    unit_upstream,
)
from metal_ops.spec import KINDS, DivergenceSpec

TOP_K = 5
SCALES = ((0.3, 1.0, "none"), (0.7, 2.0, "t2"))
QUICK_FAMILIES = ("planted", "near_shifted", "gaps", "lengths", "along")
QUICK_SHAPES = ((4, 33), (3, 4097))


class Where(NamedTuple):
    """Says on what an op runs."""

    device: torch.device
    backend: str
    simulated: bool = False

    @property
    def name(self) -> str:
        """Name the backend as a report should."""
        return f"{self.backend}, simulated" if self.simulated else self.backend


class Job(NamedTuple):
    """Names a few shapes of one kind of input for one op."""

    op: str
    kind: str
    dtype: torch.dtype
    family: str
    shapes: tuple[tuple[int, int], ...]


class Comparison(NamedTuple):
    """Holds what an op returned, and what the rule needs to judge it."""

    name: str
    actual: Tensor
    expected: Tensor
    magnitude: Tensor
    x_max: Tensor
    dtype: torch.dtype

    def judge(self) -> tuple[float, str]:
        """Return the smallest c that accepts it, and what is wrong in words ("" for nothing)."""
        actual, expected = self.actual.detach().cpu(), self.expected
        if actual.dtype != self.dtype or actual.shape != expected.shape:
            found = f"{actual.dtype} {tuple(actual.shape)}"
            return math.inf, f"{self.name}: {found}, want {self.dtype} {tuple(expected.shape)}"
        if not actual.numel():
            return 0.0, ""
        # what is infinite on both sides agrees; the rule is about numbers
        needed = needed_c(actual, expected, self.magnitude, self.x_max, self.dtype)
        needed = needed.nan_to_num(nan=math.inf, posinf=math.inf)
        worst = int(needed.argmax())
        c = float(needed.flatten()[worst])
        values = f"{actual.flatten()[worst]:.9g}, want {expected.flatten()[worst]:.9g}"
        return c, "" if c <= C else f"{self.name}: element {worst} is {values}; needs c = {c:.3g}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_nan_row(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x[:1], math.nan) if len(x) else x])


def _per_token(
    function: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    want: Exact,
    device: torch.device,
) -> Iterator[Comparison]:
    """Compare a function of the student [N, V] and a mask [N], which is given one row more."""
    dtype, wide, rows = student.dtype, _wide(student.dtype), len(student)
    leaf = _with_nan_row(student).to(device).requires_grad_()
    mask = torch.arange(len(leaf), device=device) < rows
    loss = function(leaf, mask)
    upstream = unit_upstream(want, wide) if rows else torch.ones(0, dtype=wide)
    padded = F.pad(upstream, (0, len(leaf) - rows), value=1.0)
    (grad,) = torch.autograd.grad(loss, leaf, padded.to(device))
    up = upstream.double()[:, None]
    yield Comparison("loss", loss[:rows], want.loss, want.loss_magnitude, want.x_max, wide)
    yield Comparison(
        "gradient", grad[:rows], up * want.grad, up * want.grad_magnitude, want.x_max, dtype
    )
    yield from _nothing("loss of a row that does not count", loss[rows:])
    yield from _nothing("gradient of a row that does not count", grad[rows:])


def _nothing(name: str, x: Tensor) -> Iterator[Comparison]:
    zero = torch.zeros(x.shape, dtype=torch.float64)
    yield Comparison(name, x, zero, zero, zero.new_zeros(len(x)), x.dtype)


def _specs(kind: str) -> list[DivergenceSpec]:
    """List two betas and temperatures over the full vocabulary, and each support in each way."""
    specs = [DivergenceSpec(kind, *scale) for scale in SCALES]
    for i, (support, missing) in enumerate(
        product(("teacher_topk", "student_topk", "union"), missing_rules(kind))
    ):
        options = {"support": support, "top_k": TOP_K, "missing": missing}
        specs.append(DivergenceSpec(kind, *SCALES[i % 2], **options))
    return specs


def _draw(job: Job, shape: tuple[int, int], supported: bool) -> Pair:
    """Draw student and teacher; for supports with distinct entries at their border."""
    if job.family == "gaps":
        student, teacher = FAMILIES["peaked"](*shape)
        for x in (student, teacher):
            x[:, 1::3] = -math.inf
    else:
        families = HIDDEN_FAMILIES if job.op == "hidden" else FAMILIES
        student, teacher = families[job.family](*shape)
    student, teacher = student.to(job.dtype), teacher.to(job.dtype)
    return (untied(student, TOP_K), untied(teacher, TOP_K)) if supported else (student, teacher)


def _divergence(student: Tensor, teacher: Tensor, spec: DivergenceSpec, where: Where):
    other = _with_nan_row(teacher).to(where.device)
    yield from _per_token(
        lambda x, mask: divergence_op(x, other, spec, mask=mask, backend=where.backend),
        student,
        exact(student, teacher, spec),
        where.device,
    )


def _sparse(student: Tensor, teacher: Tensor, spec: DivergenceSpec, where: Where):
    known = sparse(teacher, TOP_K, spec.temperature, _wide(student.dtype))
    want = exact_sparse(student, known, spec)
    padded = [torch.cat([x, x[:1]]).to(where.device) for x in known[:3]]
    given = known._replace(ids=padded[0], log_probs=padded[1], log_tail=padded[2])
    yield from _per_token(
        lambda x, mask: sparse_divergence(x, given, spec, mask=mask, backend=where.backend),
        student,
        want,
        where.device,
    )


def _weighted(student: Tensor, teacher: Tensor, spec: DivergenceSpec, where: Where):
    want, dtype, wide = exact(student, teacher, spec), student.dtype, _wide(student.dtype)
    weights = torch.ones(0, dtype=wide)
    if len(student):
        # powers of two: products with them are exact
        weights = unit_upstream(want, wide).log2().floor().exp2()
        weights = weights / weights.max() if dtype == torch.float16 else weights
    leaf = _with_nan_row(student).to(where.device).requires_grad_()
    rows, w = len(student), weights.double()
    got = weighted_divergence(
        leaf,
        _with_nan_row(teacher).to(where.device),
        spec,
        weights=F.pad(weights, (0, len(leaf) - rows)).to(where.device),
        backend=where.backend,
    )
    (grad,) = torch.autograd.grad(got.loss, leaf)
    x, size = want.x_max, want.loss_magnitude
    top = x.max() if rows else x.new_zeros(())
    yield Comparison("loss", got.loss, (w * want.loss).sum(), (w * size).sum(), top, wide)
    yield Comparison("per_token", got.per_token[:rows], want.loss, size, x, wide)
    sizes = w[:, None] * want.grad, w[:, None] * want.grad_magnitude
    yield Comparison("gradient", grad[:rows], *sizes, x, dtype)
    yield from _nothing("gradient of a row that does not count", grad[rows:])


def _linear(student: Tensor, teacher: Tensor, spec: DivergenceSpec, where: Where):
    """Compare a head of one hidden unit a token, whose logits are those given, exactly."""
    rows, dtype, wide = len(student), student.dtype, _wide(student.dtype)
    if not rows:
        return  # a head of no hidden units
    want = exact(student, teacher, spec)
    weights = unit_upstream(want, wide)
    weights = weights / weights.max() if dtype == torch.float16 else weights
    eye = torch.eye(rows, dtype=dtype, device=where.device)
    hidden = eye.clone().requires_grad_()
    head = student.T.contiguous().to(where.device).requires_grad_()
    loss = linear_divergence(
        hidden,
        Head(head),
        eye,
        Head(teacher.T.contiguous().to(where.device)),
        spec,
        weights=weights.to(where.device),
        backend=where.backend,
    ).loss
    grads = torch.autograd.grad(loss, (hidden, head))
    w, x = weights.double(), want.x_max
    total = (w * want.loss).sum(), (w * want.loss_magnitude).sum()
    yield Comparison("loss", loss, *total, x.max(), wide)
    grad, size = w[:, None] * want.grad, w[:, None] * want.grad_magnitude
    # rounded to the dtype of the head before it is multiplied
    size = size + torch.finfo(dtype).eps / torch.finfo(wide).eps / C * grad.abs()
    logits = student.double()
    # and the product is a sum over the vocabulary, whose own roundings are added to it
    summed = sum_roundings(student.shape[-1]) / (C * (1 + x[:, None])) * grad.abs()
    products = grad @ logits.T, (size + summed) @ logits.abs().T
    yield Comparison("gradient of hidden", grads[0], *products, x.max(), dtype)
    yield Comparison("gradient of head", grads[1], grad.T, size.T, x.max(), dtype)


def _hidden(student: Tensor, teacher: Tensor, kind: str, where: Where):
    other = _with_nan_row(teacher).to(where.device)
    yield from _per_token(
        lambda x, mask: hidden_divergence(x, other, kind, mask=mask, backend=where.backend),
        student,
        exact_hidden(student, teacher, kind),
        where.device,
    )


LOGIT_OPS: dict[str, Callable[..., Iterator[Comparison]]] = {
    "divergence": _divergence,
    "weighted": _weighted,
    "sparse": _sparse,
    "linear": _linear,
}
OPS = (*LOGIT_OPS, "hidden")


def jobs(dtypes: tuple[torch.dtype, ...], quick: bool) -> list[Job]:
    """List all jobs, or with `quick` one in twelve."""
    shapes = QUICK_SHAPES if quick else tuple(SHAPES)
    found = []
    for op in OPS:
        families = [*(HIDDEN_FAMILIES if op == "hidden" else FAMILIES)]
        if op == "linear":
            families.remove("huge")  # its products do not fit into float16
        elif op != "hidden":
            families.append("gaps")  # and 0 * -inf is no product
        if quick:
            families = [f for f in families if f in QUICK_FAMILIES]
        kinds = HIDDEN_KINDS if op == "hidden" else KINDS
        found += [Job(op, *case, shapes) for case in product(kinds, dtypes, families)]
        if not quick and op != "hidden":
            found += [Job(op, k, d, "randn", (REAL_SHAPE,)) for k, d in product(kinds, dtypes)]
    return found


def choices(job: Job) -> list[DivergenceSpec]:
    """List the specs that the job's shapes take turns with."""
    if job.op == "sparse":
        return [
            DivergenceSpec(job.kind, *SCALES[i % 2], missing=missing)
            for i, missing in enumerate(missing_rules(job.kind))
        ]
    return _specs(job.kind)


def first_choice(job: Job) -> int:
    """Say where the turns begin: elsewhere for each dtype and family."""
    return zlib.crc32(f"{job.dtype} {job.family}".encode())


def run(job: Job, where: Where) -> Iterator[tuple[str, Comparison]]:
    """Yield the job's comparisons, each with its shape and spec in words."""
    torch.manual_seed(zlib.crc32(repr(job).encode()))
    if job.op == "hidden":
        for shape in job.shapes:
            for comparison in _hidden(*_draw(job, shape, False), job.kind, where):
                yield f"{job.kind} {job.family} {list(shape)}", comparison
        return
    specs, first = choices(job), first_choice(job)
    for i, shape in enumerate(job.shapes):
        spec = specs[(first + i) % len(specs)]
        student, teacher = _draw(job, shape, spec.support != "full" or job.op == "sparse")
        for comparison in LOGIT_OPS[job.op](student, teacher, spec, where):
            yield f"{spec} {job.family} {list(shape)}", comparison
