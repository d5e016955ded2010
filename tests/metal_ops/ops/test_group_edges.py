"""What sampled values seldom meet, of heads whose rows lie on three processes in uneven parts.

Both parts of a row have its largest entry, or entries that are cut; logits are far from zero; the
processes would take chunks of other sizes; the last process has no row of the head.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from metal_ops import DivergenceSpec, Head, LinearTerms, linear_divergence
from metal_ops.backends.blocks import sizes, split
from tests.metal_ops.ops import test_group as group
from tests.processes import run

pytestmark = pytest.mark.distributed

PROCESSES, VOCAB, HIDDEN, TOKENS = 3, 4, 5, 7
ENDS = {VOCAB: (0, 1, 4, 4), TOKENS: (0, 2, 6, 7)}  # of what a process has
FAR = 2000.0  # exp(-FAR) is 0 in float64
LIMIT = 1e-11  # of the largest; measured: 1.8e-13, since logits are near -FAR
LEVELS = ("vocab_entry", "token", "token_rescale")
SPECS = [DivergenceSpec("forward_kl", 1.0, 2.0, clip=0.2, clip_level=x) for x in LEVELS]
SPECS += [DivergenceSpec("jsd", 0.3), DivergenceSpec("jsd", 0.3, support="union", top_k=2)]


def part(size: int) -> slice:
    ends = ENDS[size]
    return slice(ends[dist.get_rank()], ends[dist.get_rank() + 1])


def given() -> dict[str, Tensor]:
    """The first and the last row of each head are one, and the largest of the first token."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"student": (TOKENS, HIDDEN), "weight": (VOCAB, HIDDEN), "bias": (VOCAB,)}
    shapes |= {"teacher": (TOKENS, HIDDEN), "teacher weight": (VOCAB, HIDDEN)}
    made = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    for side, weight in (("student", "weight"), ("teacher", "teacher weight")):
        made[weight][-1] = made[weight][0]
        made[side][0] = 3 * made[weight][0]
    made["bias"] = made["bias"].abs().sort(descending=True).values - FAR
    made["bias"][-1] = made["bias"][0]
    return made


def computed(spec: DivergenceSpec, call: Any) -> tuple[LinearTerms, list[Tensor]]:
    """The terms, and gradients of hidden states, weight and bias."""
    made = given()
    leaves = [made[name].requires_grad_() for name in ("student", "weight", "bias")]
    head, teacher = Head(leaves[1], leaves[2]), Head(made["teacher weight"], made["bias"].detach())
    weights = torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64)
    labels = torch.arange(TOKENS) % VOCAB
    sides = leaves[0], head, made["teacher"], teacher, spec
    terms = call(*sides, weights=weights, labels=labels, alpha=0.6, stats=True)
    return terms, list(torch.autograd.grad(2 * terms.loss, leaves))


def differing(spec: DivergenceSpec, own_tokens: bool) -> list[str]:
    """What is otherwise in parts than of whole heads."""
    parts = lambda *a, **k: group.in_parts(*a, own_tokens=own_tokens, **k)
    (terms, grads), (want, want_grads) = (computed(spec, x) for x in (parts, linear_divergence))
    assert terms.stats is not None
    assert want.stats is not None
    if spec.clip is not None:
        assert 0 < want.stats.clipped.sum() < TOKENS
    if spec.support == "full":
        assert want.stats.top1_agreement[0] == 1
    names = ("loss", "soft", "hard", *want.stats._fields, "hidden", "weight", "bias")
    found = (terms.loss, terms.soft, terms.hard, *terms.stats, *grads)
    wanted = (want.loss, want.soft, want.hard, *want.stats, *want_grads)
    apart = {
        name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for name, a, b in zip(names, found, wanted, strict=True)
    }
    return [f"{spec.clip_level} {name} {x:.1e}" for name, x in apart.items() if not x < LIMIT]


def of_a_process(folder: Path) -> None:
    group.part = part
    split.tokens_per_chunk = lambda *_: 2 + dist.get_rank()
    found = [x for pair in product(SPECS, (False, True)) for x in differing(*pair)]
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_uneven_parts(tmp_path: Path) -> None:
    run(PROCESSES, tmp_path, of_a_process, tmp_path)
    for rank in range(PROCESSES):
        assert torch.load(tmp_path / f"{rank}.pt") == []


def rounded(folder: Path) -> None:
    """All rows of a head are near 100, so that the parts of a gradient nearly cancel."""
    sizes._capabilities = lambda: {"architecture": "x86_64"}  # products are in float32
    generator = torch.Generator().manual_seed(0)
    near = lambda: 100 + torch.randint(5, (6, 3), generator=generator) / 2.0  # exact in bfloat16
    hidden = torch.randn(2, 8, 3, generator=generator).bfloat16()
    heads, weights = (near(), near()), torch.ones(8)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        student = hidden[0].to(dtype).requires_grad_()
        own = [Head(x.to(dtype)) for x in heads]
        options: dict[str, Any] = {}
        if dtype == torch.bfloat16:
            at = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
            own = [Head(head.weight[at]) for head in own]
            options["group"] = dist.group.WORLD
        sides = student, own[0], hidden[1].to(dtype), own[1], DivergenceSpec("forward_kl")
        loss = linear_divergence(*sides, weights=weights.to(dtype), **options).loss
        found.append(torch.autograd.grad(loss, student)[0].double())
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_parts_of_a_gradient_are_rounded_once(tmp_path: Path) -> None:
    run(2, tmp_path, rounded, tmp_path)
    for rank in range(2):
        found, wanted = torch.load(tmp_path / f"{rank}.pt")
        apart = (found - wanted).abs() - 2**-8 * wanted.abs()
        assert float(apart.max()) < 0.0, (found, wanted)
