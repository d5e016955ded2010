"""torch.compile: one graph, the values and gradients of eager, any number of tokens."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from metal_ops import (
    DivergenceSpec,
    Head,
    SparseTeacher,
    TailSamples,
    divergence,
    divergence_with_stats,
    hidden_divergence,
    linear_divergence,
    sparse_divergence,
    weighted_divergence,
)

VOCAB = 11
SPECS = {
    "jsd": DivergenceSpec("jsd", 0.3, 2.0, "t2"),
    "topk": DivergenceSpec("alpha", 0.3, support="teacher_topk", top_k=3),
    "clip": DivergenceSpec("tvd", clip=0.1, support="union", top_k=4, missing="renormalise"),
    "end": DivergenceSpec("jsd", 1.0, 0.7, clip=0.1, clip_level="token_rescale"),
}
Step = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weigh(tokens: Tensor) -> Tensor:
    """Weights [N] with zeros, made inside the graph."""
    return 0.5 * (torch.arange(len(tokens)) % 3).float()


def plain(spec: DivergenceSpec) -> Step:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        loss = divergence(2 * x, y, spec, mask=weigh(x) > 0)
        return [(weigh(x) * loss).sum(), loss]

    return step


def with_stats(spec: DivergenceSpec) -> Step:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        loss, stats = divergence_with_stats(2 * x[None], y[None], spec)
        return [(weigh(x) * loss).sum(), loss, *stats]

    return step


def weighted(spec: DivergenceSpec) -> Step:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        out = weighted_divergence(2 * x, y, spec, weights=weigh(x), stats=True)
        return [3 * out.loss, out.per_token, *out.stats]

    return step


def of_a_cache(spec: DivergenceSpec) -> Step:
    if spec.support != "full":
        spec = replace(spec, support="teacher_topk", top_k=3)

    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        log_p = (y.float() / spec.temperature).log_softmax(-1)
        known, ids = log_p.topk(4)
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        teacher = SparseTeacher(ids, known, tail, spec.temperature)
        loss = sparse_divergence(2 * x, teacher, spec, mask=weigh(x) > 0)
        return [(weigh(x) * loss).sum(), loss]

    return step


def of_draws(spec: DivergenceSpec) -> Step:
    """And of draws from the tail."""
    level = "token_rescale" if spec.clip_level == "vocab_entry" else spec.clip_level
    spec = replace(spec, support="full", top_k=None, missing="tail", clip_level=level)

    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        log_p = (y.float() / spec.temperature).log_softmax(-1)
        known, ids = log_p.topk(9)
        tail = log_p.scatter(-1, ids[:, :4], -torch.inf).logsumexp(-1)
        samples = TailSamples(ids[:, 4:], known[:, 4:], -known[:, 4:] - 1.5)
        teacher = SparseTeacher(ids[:, :4], known[:, :4], tail, spec.temperature, samples)
        loss = sparse_divergence(2 * x, teacher, spec, mask=weigh(x) > 0)
        return [(weigh(x) * loss).sum(), loss]

    return step


def hidden(spec: DivergenceSpec) -> Step:
    kind = "mse" if spec.clip is None else "cosine"

    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        loss = hidden_divergence(2 * x, y, kind, mask=weigh(x) > 0)
        return [(weigh(x) * loss).sum(), loss]

    return step


def linear(spec: DivergenceSpec) -> Step:
    def step(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> list[Tensor]:
        heads, weights = (Head(head), Head(teacher_head)), weigh(x)
        return [3 * linear_divergence(2 * x, heads[0], y, heads[1], spec, weights=weights).loss]

    return step


def linear_with_stats(spec: DivergenceSpec) -> Step:
    """A shared head, with a softcap, beside labels."""

    def step(x: Tensor, head: Tensor, y: Tensor, _: Tensor) -> list[Tensor]:
        shared = Head(head, softcap=3.0)
        labels = torch.arange(len(x)) % VOCAB
        options = {"weights": weigh(x), "labels": labels, "alpha": 0.5}
        out = linear_divergence(2 * x, shared, y, shared, spec, stats=True, **options)
        return [out.loss * 3, out.soft, out.hard, *out.stats]

    return step


def run(step: Step, inputs: list[Tensor], num_leaves: int) -> list[Tensor]:
    """The step's outputs and the gradients of its first inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs[:num_leaves]]
    out = step(*leaves, *inputs[num_leaves:])
    return [*out, *torch.autograd.grad(out[0], leaves)]


OPS = [plain, with_stats, weighted, of_a_cache, of_draws, hidden, linear, linear_with_stats]


@pytest.mark.parametrize(
    ("name", "dtype", "dynamic"),
    [
        ("jsd", torch.float32, False),
        ("topk", torch.bfloat16, False),
        ("clip", torch.float32, False),
        ("end", torch.bfloat16, False),
        ("topk", torch.float32, True),
        ("end", torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_compiled_equals_eager(op, name, dtype, dynamic):
    step = op(SPECS[name])
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    graphs = []
    for tokens in (4, 7) if dynamic else (4,):
        inputs, num_leaves = [torch.randn(tokens, VOCAB).to(dtype) for _ in range(2)], 1
        if op in (linear, linear_with_stats):
            hidden = [torch.randn(n, 6).to(dtype) for n in (tokens, VOCAB, tokens, VOCAB)]
            inputs, num_leaves = hidden, 2
        want, got = (run(f, inputs, num_leaves) for f in (step, compiled))
        assert want[-1].abs().max() > 0
        for w, g in zip(want, got, strict=True):
            assert w.dtype == g.dtype
            assert torch.equal(w, g)
        graphs.append(backend.frame_count)  # 2 where dynamo starts again with numbers as constants
    assert graphs[0] == graphs[-1] <= 1 + dynamic  # more tokens are the same graph


def test_a_spec_may_change_between_steps():
    """A schedule of beta or of the temperature: one graph for each, never a stale one."""

    def loss(x: Tensor, y: Tensor, spec: DivergenceSpec) -> Tensor:
        return divergence(x, y, spec)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(4, VOCAB), torch.randn(4, VOCAB)
    specs = [DivergenceSpec("jsd", beta) for beta in (0.1, 0.2, 0.3, 0.0)]
    for spec in [*specs, DivergenceSpec("jsd", 0.1, 2.0), DivergenceSpec("jsd", 0.1)]:
        assert torch.equal(compiled(x, y, spec), loss(x, y, spec))
