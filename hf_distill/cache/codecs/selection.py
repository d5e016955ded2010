"""What is kept of a token's distribution: the head, draws from the tail, the tail's sums.

Everything here runs on the logits' device, in float32 (a few sums in float64 where the device has
it), and on blocks of always the same number of tokens: the order of a reduction depends on the
shape, so a token's result does not depend on the tokens it is computed with.

Shapes: N tokens, R entries of the vocabulary that count, K head, n draws, m orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ENTRIES = 512


def block_tokens(device: torch.device) -> int:
    """Return a block's tokens: few on a CPU, to stay in its cache, else enough to fill a device."""
    return 8 if device.type == "cpu" else 64


@dataclass(frozen=True)
class Plan:
    """Says what is kept of a token, and how it is stored.

    Args:
        top_k: most entries of the head; 0 for none.
        top_p: the head ends once it holds this mass; None for always top_k.
        num_samples: draws from the tail.
        proposal: the draws are in proportion to p ** proposal.
        orders: exponents of the tail's power sums.
        temperature: of the softmax.
        temperature_range: of the losses that may use it.
        num_exact: log-probabilities of the head that are stored in 16 bits.
        merges_draws: whether repeated draws are stored once.
    """

    top_k: int
    top_p: float | None
    num_samples: int
    proposal: float
    orders: tuple[float, ...]
    temperature: float
    temperature_range: tuple[float, float]
    num_exact: int
    merges_draws: bool


class Selection(NamedTuple):
    """Holds what was kept of N tokens: tensors, or the same on the host as numpy arrays.

    head_ids [N, K] and head_log_probs [N, K]: descending; the first head_sizes [N] count. log_tail
    [N]: log of the mass of the rest. log_sums [N, m]: logs of its power sums. draw_ids [N, n],
    ascending, and draw_log_probs [N, n]: undefined where the rest is empty. entropy [N]: in nats.
    num_entries [N]: entries with any probability.
    """

    head_ids: np.ndarray
    head_log_probs: np.ndarray
    head_sizes: np.ndarray
    log_tail: np.ndarray
    log_sums: np.ndarray
    draw_ids: np.ndarray
    draw_log_probs: np.ndarray
    entropy: np.ndarray
    num_entries: np.ndarray


def uniforms(keys: Sequence[tuple[int, int]], lengths: Sequence[int]) -> np.ndarray:
    """Return [N] float64 in [0, 1), one per token, by the row's key and the token's place.

    They are made of the generator's raw bits, which numpy keeps the same in all versions.
    """
    raw = [
        np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(length)
        for key, length in zip(keys, lengths, strict=True)
    ]
    bits = np.concatenate(raw) if raw else np.empty(0, np.uint64)
    return (bits >> np.uint64(11)) * 2.0**-53


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def select(logits: Tensor, uniforms: np.ndarray, plan: Plan) -> Selection:
    """Select what the plan keeps of every token.

    Args:
        logits: [N, R] floating point, on any device.
        uniforms: [N] float64 in [0, 1), which decide the draws.
        plan: what to keep.

    Raises:
        ValueError: a token's logits hold NaN or positive infinity, or no finite value.
    """
    size, device = block_tokens(logits.device), logits.device
    points = torch.from_numpy(uniforms).to(wide(device)).to(device)
    has_all = len(logits) > 0 and bool((logits.amin(-1) > -torch.inf).all())
    scratch = logits.new_empty(2, size, logits.shape[1], dtype=torch.float32)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, max(len(logits), 1), size):
        block = logits[start : start + size].float()
        missing = size - len(block)
        kept = _select_block(
            F.pad(block, (0, 0, 0, missing)) if missing else block,
            F.pad(points[start : start + size], (0, missing)),
            plan,
            has_all,
            scratch,
        )
        parts.append(tuple(tensor[: len(block)] for tensor in kept))
    joined = (torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True))
    result = Selection(*joined)
    wrong = np.flatnonzero(result.num_entries < 1)
    if wrong.size:
        raise ValueError(
            "logits must be finite or -inf, with a finite one in each token, got others in "
            f"{wrong.size} tokens, the first at {wrong[0]}"
        )
    return result


def _log_total(logits: Tensor, spare: Tensor) -> Tensor:
    """Return log-sum-exp [N, 1] as `Tensor.logsumexp` computes it, in memory that is there."""
    largest = logits.amax(-1, keepdim=True)
    largest.masked_fill_(largest.isinf(), 0.0)
    return torch.sub(logits, largest, out=spare).exp_().sum(-1, keepdim=True).log_().add_(largest)


def _select_block(
    logits: Tensor, points: Tensor, plan: Plan, has_all: bool, scratch: Tensor
) -> tuple[Tensor, ...]:
    """Return a Selection's fields.

    Args:
        logits: [n, R] float32.
        points: [n].
        plan: what to keep.
        has_all: says that no logit is -inf: then none are counted.
        scratch: [2, n, R] float32, whose memory is used for every block.
    """
    log_p, power = scratch
    if plan.temperature != 1.0:
        logits = logits / plan.temperature
    total = _log_total(logits, power)
    torch.sub(logits, total, out=log_p)
    bounded = log_p if has_all else log_p.clamp_min(torch.finfo(log_p.dtype).min)
    entropy = -torch.linalg.vecdot(torch.exp(log_p, out=power), bounded)
    num_entries = torch.full_like(total[:, 0], log_p.shape[1], dtype=torch.int64)
    if not has_all:
        num_entries = (log_p > -torch.inf).sum(-1)
    num_entries = num_entries.masked_fill(~total[:, 0].isfinite(), 0)
    head_log_p, head_ids = log_p.topk(min(plan.top_k, log_p.shape[1]), dim=-1)
    kept = head_log_p > -torch.inf
    if plan.top_p is not None:
        before = head_log_p.exp().cumsum(-1) - head_log_p.exp()
        kept &= before < plan.top_p
    tail = log_p.scatter_(-1, head_ids, head_log_p.masked_fill(kept, -torch.inf))
    largest = tail.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    tail -= largest

    def log_sum(order: float) -> Tensor:
        """Return the log of the tail's sum of p ** order; `power` holds the terms, scaled."""
        torch.mul(tail, order, out=power).exp_()
        return power.sum(-1).log() + order * largest[:, 0]

    # that of the draws last: its terms are their weights
    needed = {1.0, *plan.orders, *([plan.proposal] if plan.num_samples else [])}
    sums = {order: log_sum(order) for order in sorted(needed, key=plan.proposal.__eq__)}
    log_tail, log_sums = sums[1.0], [sums[order] for order in plan.orders]
    draw_ids = head_ids[:, :0]
    if plan.num_samples:
        draw_ids = draw_systematic(power, points, plan.num_samples)
    draw_log_p = tail.gather(-1, draw_ids) + largest
    return (
        head_ids,
        head_log_p,
        kept.sum(-1),
        log_tail,
        torch.stack(log_sums, -1) if log_sums else log_tail[:, None][:, :0],
        draw_ids,
        draw_log_p,
        entropy,
        num_entries,
    )


def draw_systematic(weights: Tensor, points: Tensor, num_draws: int) -> Tensor:
    """Draw systematically: entry v is drawn n * w_v / sum(w) times, rounded down or up.

    The n points (point + i) / n of the cumulative weights are looked up, first among sums of
    blocks of entries and then within a block, which spares a running sum over the vocabulary.

    Args:
        weights: [N, R] float32, not negative.
        points: [N] in [0, 1), float64 where the device has it.
        num_draws: n.

    Returns:
        [N, n] int64, ascending; an entry without weight is never drawn, unless all are.
    """
    dtype, tokens = points.dtype, len(weights)
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK_ENTRIES)).view(tokens, -1, BLOCK_ENTRIES)
    edges = blocks.sum(-1).cumsum(-1, dtype=dtype)
    below = 1 - torch.finfo(dtype).eps
    steps = (points[:, None] + torch.arange(num_draws, device=points.device)) / num_draws
    targets = torch.minimum(steps * edges[:, -1:], below * edges[:, -1:])
    block = torch.searchsorted(edges, targets, right=True).clamp_max_(blocks.shape[1] - 1)
    before = F.pad(edges, (1, 0)).gather(-1, block)
    rows = torch.arange(tokens, device=points.device)[:, None]
    inner = blocks[rows, block].to(dtype).cumsum(-1)
    rest = torch.minimum(targets - before, below * inner[..., -1])[..., None]
    place = torch.searchsorted(inner, rest, right=True)[..., 0].clamp_max_(BLOCK_ENTRIES - 1)
    return (block * BLOCK_ENTRIES + place).clamp_max_(weights.shape[1] - 1)
