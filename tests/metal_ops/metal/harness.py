"""Kernels on the simulator, their inputs, and the same in float64.

Rows of every input: 0 as it is, 1 of no weight and NaN, 2 with -inf on both sides, 3 as it is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import DivergenceSpec
from metal_ops.backends import kernels, metal
from metal_ops.backends.kernels import HardTerm
from metal_ops.backends.metal.launch import Source, text
from metal_ops.selftest.hidden import exact_hidden
from metal_ops.selftest.numerics import (
    Sides,
    assert_matches_reference,
    exact,
    log_probs,
    terms,
    unit_upstream,
)
from tests.metal_ops.mslsim import Library, Stats, compile_shader
from tests.metal_ops.ops.test_values import gap

KERNELS = metal.KERNELS
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, MASKED, COUNTING = 4, 1, [0, 2, 3]
TEMPERATURE = 1.7


class Simulator:
    """A `compile_shader` that keeps its libraries, whose schedule can be changed.

    With `change` (old, new) it compiles another text than it is given. `complete`: a kernel that
    leaves an element of an output unwritten is an error.
    """

    complete = True

    def __init__(self, check: bool, change: tuple[str, str] | None = None):
        self.check, self.change, self.libraries = check, change, dict[str, Library]()
        self.order, self.seed = "forward", 1

    def __call__(self, text: str) -> Library:
        if text not in self.libraries:
            changed = text.replace(*self.change) if self.change else text
            self.libraries[text] = compile_shader(changed, check=self.check)
        library = self.libraries[text]
        how = {"order": self.order, "seed": self.seed, "complete": self.complete}
        library.run = library.run._replace(**how)
        return library

    def scheduled(self, order: str, seed: int = 1) -> "Simulator":
        """Run every kernel's threads and groups in that order from here on."""
        self.order, self.seed = order, seed
        for library in self.libraries.values():
            library.run = library.run._replace(order=order, seed=seed)
        return self

    def stats(self, source: Source, kernel: str) -> Stats:
        """Of the last run of a kernel."""
        return getattr(self.libraries[text(source)], kernel).stats


FAST, CHECKED = Simulator(check=False), Simulator(check=True)


def apart(x: Tensor, gap: int) -> Tensor:
    """The same rows with `gap` columns of NaN between them, which no kernel may touch."""
    room = torch.full((len(x), x.shape[1] + gap), torch.nan, dtype=x.dtype)
    room[:, : x.shape[1]] = x
    return room[:, : x.shape[1]]


class Rows(NamedTuple):
    """Student, teacher [ROWS, V], `out` like student, weights [ROWS]."""

    student: Tensor
    teacher: Tensor
    out: Tensor
    weights: Tensor

    @staticmethod
    def make(vocab: int, dtype: torch.dtype, strided: bool) -> "Rows":
        student, teacher = (3 * torch.randn(ROWS, vocab) for _ in range(2))
        absent = torch.rand(vocab) < 0.3
        absent[vocab // 2] = False
        for x in (student, teacher):
            x[MASKED] = torch.nan
            x[2, absent] = -torch.inf
        student, teacher = student.to(dtype), teacher.to(dtype)
        out = torch.full_like(student, torch.nan)
        if strided:
            student, teacher, out = apart(student, 5), apart(teacher, 8), apart(out, 3)
        weights = torch.linspace(0.5, 2.0, ROWS)
        weights[MASKED] = 0.0
        return Rows(student, teacher, out, weights)

    def fresh(self) -> "Rows":
        """The same, with a student and an `out` of its own, strided alike."""
        gap = self.student.stride(0) - self.student.shape[1]
        return self._replace(
            student=apart(self.student, gap), out=torch.full_like(self.out, torch.nan)
        )


def expected_hard(rows: Rows, share: Tensor) -> tuple[HardTerm, Tensor]:
    """Labels with a share of the gradient, and what they add, [N, V] float64."""
    logits = rows.student.double().masked_fill(rows.weights[:, None] == 0, 0.0)
    labels = torch.arange(ROWS) * 7 % rows.student.shape[1]
    log_sum = logits.logsumexp(-1)
    want = (logits - log_sum[:, None]).exp()
    want.scatter_add_(-1, labels[:, None], -torch.ones(ROWS, 1, dtype=torch.float64))
    return HardTerm(labels, log_sum.float(), share), want * share[:, None]


def divergence(rows: Rows, kind: str, beta: float = 0.3) -> None:
    """The forward kernel and every backward kernel against float64."""
    spec = DivergenceSpec(kind, beta, TEMPERATURE)
    values = KERNELS.forward(rows.student, rows.teacher, rows.weights, spec)
    assert not values[:, MASKED].any()
    student, teacher = rows.student[COUNTING], rows.teacher[COUNTING]
    want, dtype = exact(student, teacher, spec), torch.float32
    assert_matches_reference(
        values[kernels.LOSS, COUNTING], want.loss, want.loss_magnitude, want.x_max, dtype, kind
    )
    for at, x in ((kernels.Q_LOG_SUM, student), (kernels.P_LOG_SUM, teacher)):
        log_sum = (x.double() / TEMPERATURE).logsumexp(-1)
        one = torch.ones_like(log_sum)
        assert_matches_reference(values[at, COUNTING], log_sum, one, want.x_max, dtype, kind)
    for at, x in ((kernels.Q_ENTROPY, student), (kernels.P_ENTROPY, teacher)):
        log_p = log_probs(x, TEMPERATURE).masked_fill(x == -torch.inf, 0.0)
        p = log_p.exp().masked_fill(x == -torch.inf, 0.0)
        size = (p * (log_p.abs() + 1)).sum(-1)
        assert_matches_reference(
            values[at, COUNTING], -(p * log_p).sum(-1), size, want.x_max, dtype, kind
        )
    tops = [x == x.amax(-1, keepdim=True) for x in (student, teacher)]
    assert torch.equal(values[kernels.AGREEMENT, COUNTING], (tops[0] & tops[1]).any(-1).to(dtype))
    upstream = torch.zeros(ROWS)
    upstream[COUNTING] = unit_upstream(want, torch.float32)
    factor, share = upstream / TEMPERATURE, rows.weights
    hard, more = expected_hard(rows, share)
    for term, added in ((None, torch.zeros_like(more)), (hard, more)):
        soft = want.grad * upstream[COUNTING, None].double()
        size = want.grad_magnitude * upstream[COUNTING, None].double()
        if term is not None:  # softmax and one at the label
            size = size + share[COUNTING, None] * (
                added[COUNTING].abs() / share[COUNTING, None] + 1
            )
        for result in gradients(rows, values, factor, spec, term):
            assert not result[MASKED].any()
            x_max = want.x_max * (1 if term is None else TEMPERATURE)
            assert_matches_reference(
                result[COUNTING], soft + added[COUNTING], size, x_max, result.dtype, kind
            )


def clipped(rows: Rows, kind: str, beta: float = 0.3) -> None:
    """As `divergence`, the entries cut at a bound that about half of the mass exceeds."""
    student, teacher = rows.student[COUNTING], rows.teacher[COUNTING]
    log_p, log_q = (log_probs(x, TEMPERATURE) for x in (teacher, student))
    absent = log_p.isinf() & log_q.isinf()
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    x_max = torch.stack([x.masked_fill(x.isinf(), 0.0).abs().amax(-1) for x in (student, teacher)])
    x_max = x_max.amax(0).double() / TEMPERATURE
    sides = Sides.of(log_p, log_q, x_max, student.dtype, whole=False)
    spec = DivergenceSpec(kind, beta, TEMPERATURE)
    f, h, f_size, h_size = (x.masked_fill(absent, 0.0) for x in terms(sides, spec))
    bound = gap(f)
    spec = DivergenceSpec(kind, beta, TEMPERATURE, clip=bound)
    over, q = f > bound, sides.q.masked_fill(absent, 0.0)
    f, h = f.clamp(max=bound), h.masked_fill(over, 0.0)
    values = KERNELS.forward(rows.student, rows.teacher, rows.weights, spec)
    assert not values[:, MASKED].any()
    assert torch.equal(values[kernels.CLIPPED, COUNTING], over.any(-1).float())
    assert_matches_reference(
        values[kernels.LOSS, COUNTING], f.sum(-1), f_size.sum(-1), x_max, torch.float32, kind
    )
    want = (h - q * h.sum(-1, keepdim=True)) * rows.weights[COUNTING, None].double()
    size = (h_size + q * h_size.sum(-1, keepdim=True)) * rows.weights[COUNTING, None].double()
    for result in gradients(rows, values, rows.weights, spec, None):
        assert not result[MASKED].any()
        assert_matches_reference(result[COUNTING], want, size, x_max, result.dtype, kind)


def gradients(
    rows: Rows, values: Tensor, factor: Tensor, spec: DivergenceSpec, hard: HardTerm | None
) -> Iterator[Tensor]:
    """By the kernel that writes to another tensor, and by the one that writes over the logits."""
    for in_place in (False, True):
        fresh = rows.fresh()
        out = fresh.student if in_place else fresh.out
        KERNELS.backward(fresh.student, rows.teacher, factor, values, spec, hard, out)
        yield out


def far(width: int = 1000) -> None:
    """Row 2 starts 2^32 + 16 entries behind row 0: 9 GB a tensor, of which a page is touched."""
    rows, stride = 3, 2**31 + 8
    spec, room = DivergenceSpec("jsd", 0.3), 2 * (rows * stride)
    weights = torch.tensor([0.0, 0.0, 1.0])
    student, teacher, out = (
        torch.tensor([], dtype=torch.bfloat16).set_(
            torch.UntypedStorage(room), 0, (rows, width), (stride, 1)
        )
        for _ in range(3)
    )
    student[2], teacher[2] = torch.randn(2, width)
    want = exact(student[2:], teacher[2:], spec)
    values = KERNELS.forward(student, teacher, weights, spec)
    loss = values[kernels.LOSS, 2:]
    assert_matches_reference(loss, want.loss, want.loss_magnitude, want.x_max, torch.float32, "far")
    KERNELS.backward(student, teacher, weights, values, spec, None, out)
    assert_matches_reference(
        out[2:], want.grad, want.grad_magnitude, want.x_max, torch.bfloat16, "far"
    )
    ids = torch.zeros(rows, 1, dtype=torch.int32)
    whole, _ = KERNELS.log_sums(student, ids, 1.0)
    log_sum = student[2:].double().logsumexp(-1)
    one = torch.ones_like(log_sum)
    assert_matches_reference(whole[2:], log_sum, one, want.x_max, torch.float32, "far")
    KERNELS.spread(student, whole, weights, 1.0, out)
    softmax = (student[2:].double() - whole[2].double()).exp()
    assert_matches_reference(out[2:], softmax, softmax, want.x_max, torch.bfloat16, "far")


def one_side(rows: Rows, num_kept: int) -> None:
    """log_sums and spread against float64."""
    student = torch.where(rows.student.isnan(), 0.0, rows.student)
    vocab, dtype = student.shape[1], torch.float32
    student = apart(student, rows.student.stride(0) - vocab)
    ids = torch.stack([torch.randperm(vocab)[:num_kept] for _ in range(ROWS)])
    ids[0, : num_kept // 2] = vocab + 3  # padding
    ids = ids.sort(dim=-1).values.to(torch.int32)
    whole, rest = KERNELS.log_sums(student, ids, TEMPERATURE)
    x = student.double() / TEMPERATURE
    x_max, one = x.masked_fill(x.isinf(), 0.0).abs().amax(-1), torch.ones(ROWS).double()
    assert_matches_reference(whole, x.logsumexp(-1), one, x_max, dtype, "log_sums")
    out_of = torch.nn.functional.pad(x, (0, 1)).scatter(-1, ids.long().clamp_max(vocab), -torch.inf)
    want = out_of[:, :-1].logsumexp(-1)
    empty = want == -torch.inf
    assert torch.equal(rest == -torch.inf, empty)
    assert_matches_reference(
        rest.masked_fill(empty, 0.0), want.masked_fill(empty, 0.0), one, x_max, dtype, "rest"
    )
    factor, log_sum = rows.weights, x.logsumexp(-1).float()
    softmax = (x - log_sum.double()[:, None]).exp() * factor.double()[:, None]
    for in_place in (False, True):
        logits = apart(student, student.stride(0) - vocab)
        logits[MASKED] = torch.nan
        out = logits if in_place else torch.full_like(rows.out, torch.nan)
        KERNELS.spread(logits, log_sum, factor, TEMPERATURE, out)
        assert_matches_reference(out, softmax, softmax, x_max, out.dtype, "spread")


def hidden(rows: Rows, kind: str) -> None:
    """Both hidden-state kernels of a kind against exact numbers."""
    gap = rows.student.stride(0) - rows.student.shape[1]
    s, t = (apart(x.masked_fill(x.isinf(), 0.5), gap) for x in (rows.student, rows.teacher))
    loss = KERNELS.hidden_states(s, t, rows.weights, kind, rows.out)
    assert not loss[MASKED]
    assert not rows.out[MASKED].any()
    want, out = exact_hidden(s[COUNTING], t[COUNTING], kind), rows.out[COUNTING]
    weights, x = rows.weights[COUNTING, None].double(), want.x_max
    assert_matches_reference(loss[COUNTING], want.loss, want.loss_magnitude, x, torch.float32, kind)
    assert_matches_reference(
        out, want.grad * weights, want.grad_magnitude * weights, x, out.dtype, kind
    )
