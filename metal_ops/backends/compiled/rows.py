"""Takes rows from logits to loss and gradient, in functions that torch.compile makes one graph of.

Shapes: n rows, V vocabulary. The terms are those of `blocks.terms`. Numbers of a spec are an input,
so that one graph serves them all; its kind, whether entries are cut, and what is wanted are not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.rows import clip_tokens
from metal_ops.backends.blocks.terms import MIXTURES, Mix, Probabilities, terms
from metal_ops.spec import DivergenceSpec

# Rows whose largest logit / temperature is nearer to zero are not shifted by it: then exponentials
# of V logits neither overflow nor vanish, and a shift would be one more rounding.
MODERATE = 32.0
LOWEST = torch.finfo(torch.float32).min  # finite, so that no difference is inf - inf


class Constants(NamedTuple):
    """Holds what a graph is made for."""

    kind: str
    cut: bool  # entries, at a bound
    want_stats: bool
    want_grad: bool

    def __str__(self) -> str:
        wanted = ("cut", "want_stats", "want_grad")
        return " ".join([self.kind, *(x for x in wanted if getattr(self, x))])


class Numbers(NamedTuple):
    """Holds the numbers of a spec, as tensors [] in a graph."""

    inv_t: Tensor
    beta: Tensor
    rest: Tensor
    bound: Tensor  # of an entry
    limit: Tensor  # of a token, inf for none
    rescale: Tensor  # 1 where a token beyond the limit is scaled down, 0 where it is cut


@functools.lru_cache(maxsize=256)
def numbers(spec: DivergenceSpec, device: torch.device) -> Tensor:
    """Return a spec's `Numbers` as one tensor [6] float32."""
    clip = torch.inf if spec.clip is None else spec.clip
    limit = torch.inf if spec.clip_level == "vocab_entry" else clip
    rescale = float(spec.clip_level == "token_rescale")
    values = (1 / spec.temperature, spec.beta, 1 - spec.beta, clip, limit, rescale)
    return torch.tensor(values, dtype=torch.float32, device=device)


def _sum(x: Tensor) -> Tensor:
    """Sum over columns, [n, 1]; in float64 on a CPU, where Inductor adds thousands in a row."""
    return x.sum(-1, keepdim=True, dtype=torch.float64 if x.device.type == "cpu" else x.dtype)


class _Side(NamedTuple):
    """Holds one side of rows: [n, V], and [n, 1] for top and total."""

    logits: Tensor
    top: Tensor
    less: Tensor  # logits / temperature, less a constant a row
    e: Tensor
    total: Tensor

    @staticmethod
    def load(logits: Tensor, inv_t: Tensor, bare: bool) -> "_Side":
        """Load it; relative to the largest, which may stay where terms need no logs."""
        x = logits.float()
        top = x.amax(-1, keepdim=True).clamp_min(LOWEST)
        origin = torch.where((top * inv_t).abs() < MODERATE, 0.0, top) if bare else top
        less = (x - origin) * inv_t
        e = less.exp()
        return _Side(x, top, less, e, _sum(e))

    def sums(self) -> list[Tensor]:
        """Return what the entropy is made of, [n, 1] each."""
        return [self.total, _sum((self.e * self.less).masked_fill(self.e == 0, 0.0))]


def _probabilities(x: _Side, y: _Side, bare: bool) -> Probabilities:
    q, p = (side.e * (1 / side.total.float()) for side in (x, y))
    if bare:
        return Probabilities(p, q, q, q)
    x_log, y_log = x.total.log(), y.total.log()
    ratio = (y.less - x.less) - (y_log - x_log).float()
    ratio = ratio.masked_fill((p == 0) & (q == 0), 0.0)
    return Probabilities(p, q, x.less - x_log.float(), ratio)


def block(constants: Constants) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of (student, teacher, factor, numbers, out), [n, V] but for factor [n].

    It returns sums of rows [n, 1] for `finish`, and writes factor times the gradient for the
    student's logits / temperature to `out`. A sum is not touched: one more loop over rows, after
    the loops over columns, and Inductor's C++ would not take all loops of a row together.
    """
    kind, cut, want_stats, want_grad = constants
    bare = kind in MIXTURES

    def compute(
        student: Tensor, teacher: Tensor, factor: Tensor, packed: Tensor, *out: Tensor
    ) -> tuple[Tensor, ...]:
        given = Numbers(*packed.unbind(0))
        x, y = (_Side.load(side, given.inv_t, bare) for side in (student, teacher))
        row = _probabilities(x, y, bare)
        f, zero, h = terms(row, kind, Mix(given.beta, given.rest), cut)
        over = None
        if cut:
            over = f > given.bound
            f, h = torch.where(over, given.bound, f), torch.where(over, 0.0, h)
        elif zero is not None:
            f = f + zero
        results = [_sum(f)]
        if want_grad:
            loss = results[0].float()
            shrink = torch.where(loss > given.limit, given.rescale * given.limit / loss, 1.0)
            scale, grad = factor[:, None] * shrink, h - row.q * _sum(h).float()
            out[0].copy_(torch.where(scale == 0, 0.0, grad * scale))
        if want_stats:
            shared = (x.logits == x.top) & (y.logits == y.top)
            results += [*x.sums(), *y.sums(), shared.any(-1, keepdim=True)]
            results += [] if over is None else [over.any(-1, keepdim=True)]
        return tuple(results)

    return compute


def finish(sums: list[Tensor], spec: DivergenceSpec) -> tuple[Tensor, Tensor | None]:
    """Return (loss [n] before scaling, statistics [NUM_STATS, n] if there are sums for them)."""
    total, *more = (x[:, 0] for x in sums)
    loss, _, clipped = clip_tokens(total.float(), spec)
    if not more:
        return loss, None
    x_total, x_sum, y_total, y_sum, shared, *over = more
    entropies = [a.log() - b / a for a, b in ((x_total, x_sum), (y_total, y_sum))]
    clipped = over[0] if over else torch.zeros_like(shared) if clipped is None else clipped
    return loss, torch.stack([x.float() for x in (*entropies, shared, clipped)])
