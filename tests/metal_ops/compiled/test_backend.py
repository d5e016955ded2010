"""When the compiled backend is taken, how often it compiles, and what happens where it cannot."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from metal_ops import (
    DivergenceSpec,
    Head,
    divergence,
    linear_divergence,
    weighted_divergence,
)
from metal_ops import _dispatch as dispatch
from metal_ops.backends import compiled
from metal_ops.backends.blocks.rows import accumulator
from metal_ops.backends.compiled import graphs
from metal_ops.backends.errors import KernelError

SPEC = DivergenceSpec("tvd", temperature=2.0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_graphs", {})
    monkeypatch.setattr(graphs, "_failed", {})
    monkeypatch.setattr(dispatch, "_refusals", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setenv("METAL_OPS_COMPILE", "1")
    for name in ("METAL_OPS_STRICT", "METAL_OPS_CHECK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[graphs.Key]:
    """The graphs that were asked for, each of which is the function itself."""
    found: list[graphs.Key] = []

    def compile_(key: graphs.Key, function: Callable) -> Callable:
        found.append(key)
        return function

    monkeypatch.setattr(graphs, "_compile", compile_)
    return found


def sides(n: int = 5, vocab: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = torch.randn(2, n, vocab)
    return student.requires_grad_(), teacher


def test_auto_takes_it_where_asked(compilations, monkeypatch):
    student, teacher = sides()
    for value, count in (("", 0), ("0", 0), ("1", 1)):
        monkeypatch.setenv("METAL_OPS_COMPILE", value)
        divergence(student, teacher, SPEC)
        assert len(compilations) == count
    monkeypatch.setenv("METAL_OPS_COMPILE", "")
    divergence(student, teacher, DivergenceSpec("alpha"), backend="compiled")
    assert len(compilations) == 2


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        (DivergenceSpec("forward_kl"), "chunked"),
        (DivergenceSpec("jsd", 1.0), "chunked"),  # the reverse KL
        (DivergenceSpec("jsd", clip=0.1), "compiled"),
        (DivergenceSpec("reverse_kl", clip=0.1), "compiled"),
        (DivergenceSpec("reverse_kl", clip=0.1, clip_level="token"), "chunked"),
        (DivergenceSpec("skew_kl"), "compiled"),
        (DivergenceSpec("alpha", support="teacher_topk", top_k=3), "chunked"),
    ],
)
def test_auto_takes_it_where_it_is_faster(spec, want, compilations):
    student, teacher = sides()
    divergence(student, teacher, spec)
    assert len(compilations) == (want == "compiled")
    assert [dispatch.choices()[case] for case in dispatch.choices()] == [want]


def test_one_graph_for_all_sizes_and_numbers(compilations):
    for n, vocab in ((5, 33), (2, 7), (1, 7), (6, 6), (33, 5)):
        student, teacher = sides(n, vocab)
        for beta in (0.1, 0.5):
            for temperature in (1.0, 2.0):
                spec = DivergenceSpec("jsd", beta, temperature, "t2", clip=3.0, clip_level="token")
                divergence(student, teacher, spec, backend="compiled")
    assert len(compilations) == 1
    divergence(*sides(3, graphs.FEW_COLUMNS + 1), DivergenceSpec("jsd"), backend="compiled")
    student, teacher = sides()
    divergence(student.detach(), teacher, DivergenceSpec("jsd"), backend="compiled")
    assert [key.many for key in compilations] == [False, True, False]


def test_a_graph_is_compiled_once(monkeypatch):
    """By torch.compile itself, which would say that it compiles again."""
    torch._dynamo.utils.counters.clear()
    for n, vocab in ((5, 33), (3, 7), (1, 7), (6, 6), (33, 5)):
        for beta in (0.1, 0.5):
            student, teacher = sides(n, vocab)[0], torch.randn(n + 3, vocab)[3:]
            weights = torch.ones(n)
            weights[: n // 2] = 0.0  # blocks that begin elsewhere
            spec, results = DivergenceSpec("skew_kl", beta, 2.0), []
            for backend in ("compiled", "chunked"):
                terms = weighted_divergence(
                    student, teacher, spec, weights=weights, backend=backend
                )
                results.append((terms.per_token, *torch.autograd.grad(terms.loss, student)))
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _broken(key: graphs.Key, function: Callable) -> Callable:
    def fail(*_: Any) -> None:
        raise RuntimeError("g++: no such instruction")

    return fail


def test_where_it_fails_the_chunked_backend_does_the_work(monkeypatch):
    monkeypatch.setattr(graphs, "_compile", _broken)
    student, teacher = sides()
    want = divergence(student, teacher, SPEC, backend="chunked")
    with pytest.warns(RuntimeWarning, match=r"block tvd want_grad.*no such instruction") as caught:
        got = divergence(student, teacher, SPEC)
    assert torch.equal(got, want)
    assert torch.equal(divergence(student, teacher, SPEC), want)  # a warning would be an error
    assert len(caught) == 1
    assert list(dispatch.choices().values()) == ["chunked"]
    with pytest.raises(KernelError, match="no such instruction"):
        divergence(student, teacher, SPEC, backend="compiled")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that does not end before the test does."""
    end = threading.Event()
    monkeypatch.setattr(graphs, "_compile", lambda key, function: lambda *_: end.wait())
    yield
    end.set()


@pytest.mark.usefixtures("never")
def test_a_compiler_has_a_limit_of_time(monkeypatch):
    monkeypatch.setattr(graphs, "TIMEOUT_S", 0.01)
    with pytest.raises(KernelError, match=r"not compiled within 0\.01 s"):
        divergence(*sides(), SPEC, backend="compiled")


def test_without_a_compiler(monkeypatch, compilations):
    compiled._no_compiler.cache_clear()
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    student, teacher = sides()
    divergence(student, teacher, SPEC)
    with pytest.raises(NotImplementedError, match="C\\+\\+ compiler, and there is no a-compiler-"):
        divergence(student, teacher, SPEC, backend="compiled")
    assert not compilations
    compiled._no_compiler.cache_clear()


def test_float64_is_refused(compilations):
    student, teacher = (x.detach().double() for x in sides())
    assert accumulator(student) == torch.float64
    with pytest.raises(NotImplementedError, match=r"compiled: needs float32, .* got torch.float64"):
        divergence(student, teacher, SPEC, backend="compiled")
    assert divergence(student, teacher, SPEC).dtype == torch.float64


def test_what_is_compiled_is_in_the_log(compilations, caplog):
    with caplog.at_level(logging.INFO, logger="metal_ops"):
        for _ in range(2):
            divergence(*sides(), SPEC, backend="compiled")
    texts = [r.getMessage() for r in caplog.records if "block" in r.getMessage()]
    name = "compiled block tvd want_grad: up to 4096 columns, float32 float32 float32, cpu: "
    assert texts[0] == f"{name}compiling, at its first use"
    assert texts[1].startswith(f"{name}ready after ")
    assert len(texts) == 2


def test_a_gradient_in_place_of_the_logits(compilations):
    """A head without labels."""
    hidden, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    head, weights = Head(torch.randn(33, 8)), torch.rand(5)
    results = []
    for backend in ("compiled", "chunked"):
        loss = linear_divergence(
            hidden, head, teacher, head, SPEC, weights=weights, backend=backend
        ).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    assert len(compilations) == 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
