"""Logits as large as floats are, and masked ones: a clip bounds value and gradient alike."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from metal_ops import DivergenceSpec, SparseTeacher, divergence, reference, sparse_divergence
from metal_ops.functional import TailSamples
from metal_ops.spec import CLIP_LEVELS, KINDS, MISSING

VOCAB, ROWS = 16, 3
DTYPES = (torch.float32, torch.float64, torch.float16)
SUPPORTS = ("full", "union")  # one by one the two sides' entries go the same way
CLIPS = [(None, "token"), *((0.05 if x == "vocab_entry" else 0.5, x) for x in CLIP_LEVELS)]


def _spread(size: float, masked: slice | None = None) -> Tensor:
    logits = torch.randn(ROWS, VOCAB, dtype=torch.float64) * size
    if masked is not None:
        logits[:, masked] = -math.inf
    return logits


def _peak(at: int, low: float, high: float) -> Tensor:
    logits = torch.full((ROWS, VOCAB), low, dtype=torch.float64)
    logits[:, at] = high
    return logits


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Student and teacher."""
    torch.manual_seed(0)
    third, first, last = slice(None, None, 3), slice(0, 8), slice(8, None)
    return {
        "large": (_spread(1e4), _spread(1e4)),
        "sure of others": (_peak(0, 0, 1e4), _peak(1, 0, 1e4)),
        "equal": (_peak(0, 0, 1e4), _peak(0, 0, 1e4)),
        "float16": (_peak(3, -6e4, 0), _peak(4, -6e4, 0)),
        "float16 equal": (_peak(3, -65504, 65504), _peak(3, -65504, 65504)),
        "teacher masked": (_spread(3), _spread(3, third)),
        "teacher one entry": (_spread(3), _peak(2, -math.inf, 0)),
        "student masked": (_spread(3, third), _spread(3)),
        "both masked": (_spread(3, third), _spread(3, third)),
        "apart": (_spread(3, first), _spread(3, last)),
    }


def specs(kind: str) -> Iterator[DivergenceSpec]:
    for clip, level in CLIPS:
        for support in SUPPORTS:
            for missing in MISSING if support != "full" else ("tail",):
                some = None if support == "full" else 3
                try:
                    yield DivergenceSpec(
                        kind,
                        0.3,
                        clip=clip,
                        clip_level=level,
                        support=support,
                        top_k=some,
                        missing=missing,
                    )
                except ValueError:  # a reverse KL without the rest of the vocabulary
                    assert missing == "zero"


def with_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradients of the rows whose loss is finite."""
    finite = loss.detach().isfinite()
    if not finite.any():
        return loss.detach(), torch.zeros_like(leaf)[finite]
    (grad,) = torch.autograd.grad(loss[finite].sum(), leaf)
    return loss.detach(), grad[finite]


@pytest.mark.parametrize("pair", pairs())
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_finite_where_the_reference_is(kind: str, pair: str) -> None:
    student, teacher = pairs()[pair]
    for spec in specs(kind):
        leaf = student.clone().requires_grad_()
        want, want_grad = with_gradient(reference.divergence(leaf, teacher, spec), leaf)
        assert want_grad.isfinite().all(), spec
        for dtype in DTYPES:
            leaf = student.to(dtype).requires_grad_()
            loss, grad = with_gradient(divergence(leaf, teacher.to(dtype), spec), leaf)
            assert torch.equal(loss.isfinite(), want.isfinite()), (spec, dtype)
            assert grad.isfinite().all(), (spec, dtype)
            if dtype == torch.float64:
                torch.testing.assert_close(loss, want, equal_nan=True, msg=str(spec))
                torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-6, msg=str(spec))


@pytest.mark.parametrize("pair", pairs())
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_bounds_what_is_infinite(kind: str, pair: str) -> None:
    """Whatever the sides say, unless a support has no mass at all, 0 / 0."""
    student, teacher = pairs()[pair]
    for spec in specs(kind):
        if spec.clip is None or spec.missing == "renormalise":
            continue
        leaf = student.float().requires_grad_()
        loss = divergence(leaf, teacher.float(), spec)
        largest = spec.clip * (VOCAB + 1 if spec.clip_level == "vocab_entry" else 1)
        assert (loss <= largest * (1 + 1e-5)).all(), spec  # a sum of 17 roundings
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert grad.isfinite().all(), spec
        over = divergence(student.float(), teacher.float(), spec) == spec.clip
        if spec.clip_level == "token":
            assert not grad[over].any(), spec


def _sparse(teacher: Tensor) -> Iterator[tuple[str, SparseTeacher]]:
    log_p = teacher.log_softmax(-1)
    top = log_p.topk(3, dim=-1)
    rest = log_p.scatter(-1, top.indices, -math.inf)
    known = SparseTeacher(top.indices, top.values, rest.logsumexp(-1))
    yield "auto", known
    proposal = (0.5 * rest).softmax(-1).nan_to_num(1 / VOCAB)
    drawn = torch.multinomial(proposal + 1e-30, 4, replacement=True)
    log_weights = -(4 * proposal.gather(-1, drawn)).log()
    yield (
        "sampled",
        known._replace(samples=TailSamples(drawn, log_p.gather(-1, drawn), log_weights)),
    )


@pytest.mark.parametrize("pair", ["large", "float16", "teacher masked", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_teacher(kind: str, pair: str) -> None:
    student, teacher = pairs()[pair]
    for tail, known in _sparse(teacher):
        for spec in (x for x in specs(kind) if x.support == "full"):
            if tail == "sampled" and (
                kind in ("reverse_kl", "mixed_kl") or "vocab" in spec.clip_level
            ):
                continue  # which are refused
            rows: list[Tensor] = []
            for dtype in DTYPES:
                leaf = student.to(dtype).requires_grad_()
                loss, grad = with_gradient(sparse_divergence(leaf, known, spec, tail=tail), leaf)
                assert grad.isfinite().all(), (spec, dtype)
                rows.append(loss.isfinite())
            assert all(torch.equal(x, rows[0]) for x in rows), spec
