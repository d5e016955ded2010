"""Nothing on the way to the Triton kernels waits for the device.

Three ways to see it: calls with interpreted kernels, in which the CPU plays the device; the text of
the modules on that way; and, where there is an NVIDIA GPU, PyTorch's own alarm.
"""

import ast
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import metal_ops
from metal_ops import (
    DivergenceSpec,
    Head,
    _registration,
    divergence,
    divergence_with_stats,
    hidden_divergence,
    linear_divergence,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.backends.blocks import tail
from metal_ops.backends.blocks.support import KeptEntries
from metal_ops.functional import sparse
from tests.metal_ops.ops import tails
from tests.metal_ops.triton import interpreter
from tests.waits import Waits

N, V, H = 5, 40, 8
FULL = (
    DivergenceSpec("forward_kl", temperature=2.0),
    DivergenceSpec("jsd", clip=0.05, clip_level="token_rescale"),
    DivergenceSpec("reverse_kl", clip=0.1),
)
SUPPORTS = [
    DivergenceSpec("forward_kl", support=support, top_k=4, missing=missing)
    for support in ("teacher_topk", "student_topk", "union")
    for missing in ("tail", "renormalise", "zero")
]
Call = Callable[[str], Tensor]


def leaf(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def logits(spec: DivergenceSpec, dtype: torch.dtype, device: str) -> Tensor:
    student, teacher = leaf(device, N, V, dtype=dtype), torch.randn(N, V, device=device)
    mask = torch.arange(N, device=device) != 2
    loss, stats = divergence_with_stats(student, teacher, spec, mask=mask, backend="triton")
    loss = loss + divergence(student, teacher, spec, backend="triton")
    return loss.sum() + sum(x.sum() for x in stats)


def weighted(spec: DivergenceSpec, dtype: torch.dtype, device: str) -> Tensor:
    student, teacher = leaf(device, N, V, dtype=dtype), torch.randn(N, V, device=device)
    weights = torch.arange(N, device=device) / N
    found = weighted_divergence(
        student, teacher, spec, weights=weights, stats=True, backend="triton"
    )
    return 0.5 * found.loss


def linear(spec: DivergenceSpec, alpha: float, cap: float | None, shared: bool, device: str):
    head = Head(leaf(device, V, H), leaf(device, V), 1.5, cap)
    other = head if shared else Head(torch.randn(V, H, device=device))
    labels = torch.arange(N, device=device)
    found = linear_divergence(
        *(leaf(device, N, H), head, torch.randn(N, H, device=device), other, spec),
        weights=labels / N,
        labels=labels,
        alpha=alpha,
        stats=True,
        backend="triton",
    )
    return found.loss


def hidden(kind: str, device: str) -> Tensor:
    student, teacher = leaf(device, N, H), torch.randn(N, H, device=device)
    return hidden_divergence(student, teacher, kind, backend="triton").sum()


def known(rule: str, spec: DivergenceSpec, device: str) -> Tensor:
    teacher = tails.sampled(torch.randn(N, V, device=device), 4, 6, spec.temperature)
    teacher = teacher._replace(ids=teacher.ids.masked_fill(teacher.ids == 7, -1))
    mask = torch.arange(N, device=device) != 2
    student = leaf(device, N, V)
    return sparse_divergence(student, teacher, spec, tail=rule, mask=mask, backend="triton").sum()


def calls() -> Iterator[tuple[str, Call]]:
    """Each way through the ops that has code of its own."""
    for spec in (*FULL, *SUPPORTS):
        name = f"{spec.kind}-{spec.support}-{spec.missing}-{spec.clip}"
        for dtype in (torch.float32, torch.float16):
            yield f"logits-{name}-{dtype}", partial(logits, spec, dtype)
            yield f"weighted-{name}-{dtype}", partial(weighted, spec, dtype)
    for spec in (FULL[0], SUPPORTS[0], SUPPORTS[2]):
        for alpha, cap, shared in ((1.0, None, True), (0.5, 3.0, False), (0.0, None, False)):
            name = f"linear-{spec.support}-{spec.missing}-{alpha}"
            yield name, partial(linear, spec, alpha, cap, shared)
    for kind in ("mse", "cosine"):
        yield f"hidden-{kind}", partial(hidden, kind)
    for rule in ("sampled", "bucket", "renorm"):
        yield f"sparse-{rule}", partial(known, rule, DivergenceSpec("forward_kl"))
    clipped = DivergenceSpec("jsd", clip=0.05, clip_level="token")
    yield "sparse-clipped", partial(known, "sampled", clipped)


CALLS = dict(calls())


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a CPU only is not done."""
    for module in (tail, _registration):
        monkeypatch.setattr(module, "may_ask", lambda x: False)
    monkeypatch.setattr(sparse, "ASSERTING", ("cpu",))


@pytest.mark.skipif(interpreter.DEVICE != "cpu", reason="on a GPU PyTorch tells, see below")
@pytest.mark.parametrize("name", CALLS)
def test_no_call_asks_for_values(name, on_device):
    torch.manual_seed(0)
    waits = Waits()
    with waits.noted():
        CALLS[name]("cpu").backward()
    assert waits.ours() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_no_call_synchronises():
    before = torch.cuda.get_sync_debug_mode()
    for name, call in CALLS.items():
        call("cuda").backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            call("cuda").backward()
        except RuntimeError as error:
            raise AssertionError(f"{name} synchronises") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)


# --- the text

ROOT = Path(metal_ops.__file__).parent
READ = ("functional", "backends/triton", "backends/blocks")
FILES = ("_ops.py", "_sparse_ops.py", "_dispatch.py", "_registration.py", "backends/kernels.py")
METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "equal"}
METHODS |= {"unique", "tensor", "as_tensor"}  # the last two may copy to a device
NUMBERS = {"bool", "int", "float"}
# What asks, by function, and why that is no wait on the way to the Triton kernels
ALLOWED = {
    "functional/sparse.py:_check_ids": "on CPUs and MPS, where a gather does not stop by itself",
    "functional/sparse.py:_call": "a number of the caller",
    "_registration.py:scaled": "on CPUs",
    "backends/triton/rows.py:_load": "a constant",
    "backends/blocks/sizes.py:RowBlocks.__init__": "of backends in PyTorch; draws only on CPUs",
    "backends/blocks/sizes.py:RowBlocks.__iter__": "the same",
    "backends/blocks/linear.py:linear": "of backends in PyTorch, and of heads in pieces",
    "backends/blocks/split.py:sizes_of": "of heads in pieces: sizes on other processes",
    "backends/blocks/split.py:_place": "the same",
    "backends/blocks/rows.py:load_rows": "of backends in PyTorch",
    "backends/blocks/rows.py:_entropy": "of backends in PyTorch",
    "backends/blocks/full.py:*": "of backends in PyTorch",
}


def asking(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Functions, by qualified name, and lines with a call that may ask a tensor for its values."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}" if name else child.name
            if isinstance(child, ast.Call):
                called = child.func
                by_method = isinstance(called, ast.Attribute) and called.attr in METHODS
                by_number = isinstance(called, ast.Name) and called.id in NUMBERS
                if by_method or by_number:
                    yield inner, child.lineno
            yield from visit(child, inner)

    return visit(tree, "")


def test_no_text_asks_for_values():
    """Also on ways that no call above takes; who is allowed to must still do so."""
    paths = [ROOT / x for x in FILES] + [p for x in READ for p in sorted((ROOT / x).glob("*.py"))]
    found = {}
    for path in paths:
        file = path.relative_to(ROOT).as_posix()
        for function, line in asking(ast.parse(path.read_text())):
            name = f"{file}:{function}"
            found[f"{file}:*" if f"{file}:*" in ALLOWED else name] = line
    assert found.keys() - ALLOWED.keys() == set(), found
    assert ALLOWED.keys() - found.keys() == set()


# --- what takes the place of asking


def test_padding_writes_nothing():
    ids = torch.tensor([[3, -1, 0, 7], [-1, -1, -1, -1], [-1, 5, 2, -1]])
    kept, out, values = KeptEntries(ids, 9), torch.randn(3, 9), torch.randn(3, 4)
    want = out.clone()
    want.view(-1)[kept.flat] = values[kept.valid]
    kept.put(out, values)
    assert torch.equal(out, want)
    nothing = KeptEntries(ids[:, :0], 9)
    nothing.put(out, values[:, :0])
    assert torch.equal(out, want)


def linear_gradients(weights: Tensor, student: Tensor, teacher: Tensor, labels: Tensor, support):
    torch.manual_seed(1)
    spec = DivergenceSpec("jsd", support=support, top_k=None if support == "full" else 4)
    head = Head(torch.randn(V, H).requires_grad_(), torch.randn(V).requires_grad_(), 1.0, 3.0)
    given = student.clone().requires_grad_()
    terms = linear_divergence(
        *(given, head, teacher, Head(torch.randn(V, H)), spec),
        weights=weights,
        labels=labels,
        alpha=0.5,
        stats=True,
        backend="triton",
    )
    grads = torch.autograd.grad(terms.loss, (given, head.weight, head.bias))
    assert terms.stats is not None
    return [terms.loss, terms.soft, terms.hard, *terms.stats, *grads]


@pytest.mark.skipif(interpreter.DEVICE != "cpu", reason="compares with tensors on the CPU")
@pytest.mark.parametrize("support", ["full", "teacher_topk"])
def test_a_token_without_weight_may_hold_anything(support):
    """It is projected, with zeros in its place: as if it held something else."""
    weights = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.25])
    student, teacher, labels = torch.randn(N, H), torch.randn(N, H), torch.arange(N)
    want = linear_gradients(weights, student, teacher, labels, support)
    student[1], teacher[1], labels[1] = torch.nan, math.inf, -100
    teacher[3], labels[3] = torch.nan, V
    got = linear_gradients(weights, student, teacher, labels, support)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    for per_token in got[1:7]:
        assert not per_token[weights == 0].any()
    assert not got[7][weights == 0].any()


def test_draws_of_a_token_that_is_left_out(monkeypatch):
    """Skipped on a CPU, computed in vain elsewhere: the same losses and gradients."""
    torch.manual_seed(0)
    teacher, spec = tails.sampled(torch.randn(N, V), 4, 6, 2.0), DivergenceSpec("jsd", 0.3, 2.0)
    mask = torch.tensor([True, False, True, False, True])
    found = []
    for asks in (True, False):
        monkeypatch.setattr(tail, "may_ask", lambda x, asks=asks: asks)
        torch.manual_seed(1)
        student = torch.randn(N, V)
        student[1], student[3, 4] = torch.nan, math.inf
        student.requires_grad_()
        loss = sparse_divergence(student, teacher, spec, mask=mask, backend="chunked")
        (grad,) = torch.autograd.grad((loss * (1 + torch.arange(N))).sum(), student)
        found.append((loss.detach(), grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert not one[~mask].any()
