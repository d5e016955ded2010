"""Which backend does the work, what happens when its kernels fail, and METAL_OPS_CHECK."""

import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from metal_ops import (
    DivergenceSpec,
    Head,
    _ops,
    available_backends,
    divergence,
    hidden_divergence,
    linear_divergence,
    sparse_divergence,
)
from metal_ops import _dispatch as dispatch
from metal_ops.backends import chunked
from metal_ops.backends.errors import KernelError
from metal_ops.selftest.inputs import FAMILIES, missing_rules, sparse, untied
from metal_ops.spec import KINDS
from tests.metal_ops.ops import torch_kernels

SPEC = DivergenceSpec("jsd", 0.3, 2.0)
FUNCTIONS = ("forward", "backward", "sparse", "linear", "hidden_states")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Backend(ModuleType):
    """Those of another module, by a name of its own, which count their calls; some replaced."""

    def __init__(self, name: str, of: ModuleType = chunked, **functions: Callable) -> None:
        super().__init__(f"metal_ops.backends.{name}")
        self.calls: list[str] = []
        self.unsupported = functions.get("unsupported", lambda *_: None)
        for op in FUNCTIONS:
            setattr(self, op, self.counted(op, functions.get(op, getattr(of, op))))

    def counted(self, op: str, function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            self.calls.append(op)
            return function(*args)

        return call


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_refusals", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "BACKENDS", ("chunked",))  # and what a test installs
    for name in ("METAL_OPS_STRICT", "METAL_OPS_CHECK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backend]:
    """Put a backend before the chunked one."""

    def put(name: str = "fake", of: ModuleType = chunked, **functions: Callable) -> Backend:
        backend = Backend(name, of, **functions)
        monkeypatch.setitem(sys.modules, backend.__name__, backend)
        monkeypatch.setattr(dispatch, "BACKENDS", (name, *dispatch.BACKENDS))
        monkeypatch.setitem(dispatch.KERNEL_DEVICES, name, ["cpu"])
        return backend

    return put


def broken(kernel: str = "jsd_float", text: str = "program_source:3: error: no such type"):
    def fail(*_: Any) -> None:
        raise KernelError(kernel, text)

    return dict.fromkeys(FUNCTIONS, fail)


def run_divergence(x: Tensor, y: Tensor, backend: str = "auto") -> Tensor:
    return divergence(x, y, SPEC, backend=backend)


def run_sparse(x: Tensor, y: Tensor, backend: str = "auto") -> Tensor:
    return sparse_divergence(x, sparse(y, 3, 2.0, torch.float32), SPEC, backend=backend)


def run_linear(x: Tensor, y: Tensor, backend: str = "auto") -> Tensor:
    head = Head(torch.eye(x.shape[-1], dtype=x.dtype))
    weights = torch.ones(len(x))
    return linear_divergence(x, head, y, head, SPEC, weights=weights, backend=backend).loss


def run_hidden(x: Tensor, y: Tensor, backend: str = "auto") -> Tensor:
    return hidden_divergence(x, y, "cosine", backend=backend)


OPS = [run_divergence, run_sparse, run_linear, run_hidden]
ops = pytest.mark.parametrize("op", OPS)


def inputs(dtype: torch.dtype = torch.float32, family: str = "peaked") -> tuple[Tensor, Tensor]:
    x, y = (x.to(dtype) for x in FAMILIES[family](5, 33))
    return x.requires_grad_(), y


def results(op: Callable, x: Tensor, y: Tensor, **options: str) -> list[Tensor]:
    loss = op(x, y, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), x)]


@ops
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_fails_leaves_the_op_to_the_next_backend(op, dtype, install):
    x, y = inputs(dtype)
    want = results(op, x, y)
    fake = install(**broken())
    with pytest.warns(RuntimeWarning) as caught:
        first = results(op, x, y)
    tried = len(fake.calls)
    again = results(op, x, y)  # any warning is an error here
    assert len(caught) == 1
    assert 1 <= tried == len(set(fake.calls)) == len(fake.calls)
    for got in (first, again):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_failure_counts_for_its_kind_and_dtype_only(install):
    def fail(student: Tensor, teacher: Tensor, mask: Any, spec: DivergenceSpec, *rest: bool):
        if student.dtype == torch.float32 and spec.kind == "jsd":
            raise KernelError("jsd_float", "no")
        return chunked.forward(student, teacher, mask, spec, *rest)

    fake = install(forward=fail)
    x, y = (z.detach() for z in inputs())
    with pytest.warns(RuntimeWarning):
        divergence(x, y, SPEC)
    divergence(x, y, SPEC)
    assert len(fake.calls) == 1
    divergence(x, y, DivergenceSpec("tvd"))
    divergence(x.half(), y.half(), SPEC)
    assert len(fake.calls) == 3


def test_one_warning_a_backend_and_kernel(install):
    kernels = iter(["a", "a", "b"])

    def fail(*_: Any) -> None:
        raise KernelError(next(kernels), "no")

    install(hidden_states=fail)
    x = torch.ones(2, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in DTYPES:
            hidden_divergence(x.to(dtype), x, "mse")
    assert [re.findall(r"kernel (\w+)", str(w.message)) for w in caught] == [["a"], ["b"]]


def test_the_warning_says_what_a_report_needs(install):
    install("metal", **broken("jsd_float", "program_source:3: error"))
    with pytest.warns(RuntimeWarning) as caught:
        run_divergence(*inputs())
    text = str(caught[0].message)
    for part in (
        "metal backend",
        "Please report",
        f"torch {torch.__version__}",
        dispatch.describe(torch.device("cpu")),
        "kernel jsd_float: program_source:3: error",
        "METAL_OPS_STRICT=1",
    ):
        assert part in text


@ops
def test_a_named_backend_raises(op, install):
    fake = install(**broken("k", "text"))
    x, y = inputs()
    for _ in range(2):
        with pytest.raises(KernelError, match=r"^kernel k: text$") as caught:
            op(x, y, backend="fake")
        assert (caught.value.kernel, caught.value.text) == ("k", "text")
    assert len(fake.calls) == 2
    assert not dispatch._refusals


@ops
def test_strict_raises(op, install, monkeypatch):
    install(**broken())
    x, y = inputs()
    monkeypatch.setenv("METAL_OPS_STRICT", "0")
    with pytest.warns(RuntimeWarning):
        op(x, y)
    monkeypatch.setenv("METAL_OPS_STRICT", "1")  # also what was let pass before
    with pytest.raises(KernelError):
        op(x, y)
    monkeypatch.setenv("METAL_OPS_STRICT", "")
    op(x, y)


def test_other_errors_are_not_swallowed(install):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    install(forward=fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_divergence(*inputs())


def test_every_backend_may_fail(install, monkeypatch):
    install("last", **broken("k", "no k"))
    install("first", unsupported=lambda *_: "not today")
    monkeypatch.setattr(dispatch, "BACKENDS", ("first", "last"))
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(NotImplementedError, match=r"first: not today; last: kernel k: no k$"),
    ):
        run_divergence(*inputs())


def test_several_backends_in_their_order(install):
    others = dispatch.BACKENDS
    last, first = install("last"), install("first", **broken())
    with pytest.warns(RuntimeWarning, match="the first backend"):
        run_divergence(*inputs())
    assert first.calls == last.calls == ["forward"]
    assert list(available_backends()) == ["first", "last", *others]
    with pytest.raises(ValueError, match=r"\('auto', 'first', 'last', .*'chunked'\), got 'mteal'"):
        run_divergence(*inputs(), backend="mteal")


def test_a_failure_in_a_compiled_graph(install):
    install(**broken())
    torch._dynamo.reset()
    x, y = inputs()
    want = divergence(x, y, SPEC, backend="chunked")
    compiled = torch.compile(run_divergence, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="the fake backend"):
        assert torch.equal(compiled(x, y), want)


# --- METAL_OPS_CHECK


@ops
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_backend_passes(op, dtype, family, install, monkeypatch):
    fake = install(of=torch_kernels.MODULE)
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    results(op, *inputs(dtype, family))
    assert fake.calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes(kind, family, install, monkeypatch):
    install(of=torch_kernels.MODULE)
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    supports = [{"support": "union", "top_k": 5, "missing": m} for m in missing_rules(kind)]
    for dtype, shape in ((torch.float32, (4, 1023)), (torch.bfloat16, (5, 33))):
        for more in ({}, {"clip": 0.01}, {"clip": 0.1, "clip_level": "token"}, *supports):
            spec = DivergenceSpec(kind, 0.7, 2.0, "t2", **more)
            student, teacher = (x.to(dtype) for x in FAMILIES[family](*shape))
            if more in supports:
                student, teacher = untied(student, 5), untied(teacher, 5)
            args = student, teacher, torch.rand(len(student)), spec, True, True
            dispatch.run("forward", "auto", student, teacher, *args)


# each is done to one result of one op
MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "two in a hundred": lambda x: x.mul_(1.02),
    "one row in a hundred": lambda x: x[3].mul_(1.03),
    "not written": lambda x: x[2].fill_(0.0),
    "nan": lambda x: x[4].fill_(float("nan")),
    "rows exchanged": lambda x: x.copy_(x.roll(1, 0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        *[(d, f) for d in DTYPES for f in ("randn", "peaked", "planted", "near")],
        (torch.float32, "near_shifted"),  # rounded to 16 bits both sides would be equal
    ],
)
@pytest.mark.parametrize("op", [run_divergence, run_sparse, run_hidden])
def test_a_wrong_kernel_does_not_pass(op, dtype, family, part, mistake, install, monkeypatch):
    def spoil(function: Callable) -> Callable:
        def spoilt(*args: Any) -> Any:
            out = function(*args)
            parts = (out,) if isinstance(out, Tensor) else out
            x = parts[0] if part == "loss" else parts[-1]
            if x is not None and (isinstance(out, Tensor)) <= (part == "gradient"):
                MISTAKES[mistake](x)
            return out

        return spoilt

    install(**{f: spoil(getattr(chunked, f)) for f in FUNCTIONS})
    x, y = inputs(dtype, family)
    results(op, x, y)  # nobody looks
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    text = r"METAL_OPS_CHECK: \w+ of the fake backend, .*: the (loss|gradient) of row \d, entry \d+"
    with pytest.raises(RuntimeError, match=text):
        results(op, x, y)


@pytest.mark.parametrize("op", ["linear", "split_linear"])
@pytest.mark.parametrize("part", [0, 1, 2, 3, 4, 5, None])
def test_a_wrong_linear_kernel_does_not_pass(part, op, install, monkeypatch):
    def spoilt(*args: Any) -> Any:
        out = chunked.linear(*args[:7])
        if part is not None:
            x = out[part]
            x = x if part == 0 else x.select(-1, -1) if part != 2 else x[0, 1:2]
            x.mul_(1.05)
        return out

    # of a group of one process, which has all rows
    monkeypatch.setattr(chunked, "split_linear", lambda *args: chunked.linear(*args[:7]))
    monkeypatch.setattr(_ops, "_resolve_process_group", lambda name: name)
    setattr(install(), op, spoilt)
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    hidden, head, bias = (torch.randn(n).requires_grad_() for n in ((6, 8), (33, 8), (33,)))
    other = torch.randn(6, 8), Head(torch.randn(33, 8))
    options = {"weights": torch.rand(6), "labels": torch.randint(33, (6,)), "alpha": 0.5}
    options["group"] = SimpleNamespace(group_name="one") if op == "split_linear" else None
    call = partial(linear_divergence, hidden, Head(head, bias), *other, SPEC, stats=True, **options)
    if part is None:
        call()
        return
    with pytest.raises(RuntimeError, match=f"METAL_OPS_CHECK: {op} of the fake backend"):
        call()


@ops
def test_an_undecided_sign_passes(op, install, monkeypatch):
    """Of entries that agree to the last digit the total variation has either slope."""
    install(of=torch_kernels.MODULE)
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    monkeypatch.setattr(sys.modules[__name__], "SPEC", DivergenceSpec("tvd", temperature=2.0))
    x, y = inputs(torch.bfloat16, "near_shifted")
    results(op, x, y)


def test_wrong_statistics_do_not_pass(install, monkeypatch):
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    student, teacher = (x.detach() for x in inputs(family="randn"))
    spec = DivergenceSpec("jsd", clip=0.05)
    for row, name in enumerate(("student_entropy", "teacher_entropy", "top1_agreement", "clipped")):

        def spoilt(*args: Any, row: int = row) -> Any:
            out = chunked.forward(*args)
            out[1][row, 2] = 1.01 * out[1][row, 2] if row < 2 else 1 - out[1][row, 2]
            return out

        install(f"fake{row}", forward=spoilt)
        with pytest.raises(RuntimeError, match=f"{name} of row 2"):
            dispatch.run("forward", "auto", student, teacher, student, teacher, None, spec, 0, 1)


def test_inputs_are_what_they_were_for_the_check(install, monkeypatch):
    """A kernel that spoils its inputs and computes from them is found."""

    def spoilt(student: Tensor, *rest: Any) -> Any:
        return chunked.hidden_states(student.mul_(2.0), *rest)

    install(hidden_states=spoilt)
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    with pytest.raises(RuntimeError, match="the loss of row"):
        hidden_divergence(torch.randn(3, 5), torch.randn(3, 5), "mse")


def test_the_chunked_backend_is_not_checked_against_itself(monkeypatch):
    calls, original = [], chunked.hidden_states
    monkeypatch.setattr(chunked, "hidden_states", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setenv("METAL_OPS_CHECK", "1")
    with warnings.catch_warnings(action="error"):
        hidden_divergence(torch.ones(1, 2), torch.zeros(1, 2), "mse")
    assert calls == [1]
