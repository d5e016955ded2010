"""Says what every op means, in plain PyTorch and in the dtype of the inputs."""

import math

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec

HIDDEN_KINDS = ("mse", "cosine")
NORM_MIN = 1e-8  # a shorter hidden state counts as one of this length


def _expect(weight: Tensor, value: Tensor) -> Tensor:
    """Multiply weight and value, with 0 * anything = 0 (0 log 0 = 0)."""
    return weight * value.masked_fill(weight == 0, 0.0)


def _mix(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Compute log(beta p + (1 - beta) q)."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def entries(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Compute the terms whose sum over the vocabulary is the divergence; p teacher, q student."""
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return _entries(log_p, log_q, kind, beta).masked_fill(absent, 0.0)


def _entries(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return _expect(p, log_p - log_q)
    if kind == "reverse_kl":
        return _expect(q, log_q - log_p)
    if kind == "jsd":
        log_m = _mix(log_p, log_q, beta)
        return beta * _expect(p, log_p - log_m) + (1 - beta) * _expect(q, log_q - log_m)
    if kind == "soft_ce":
        return _expect(p, -log_q)
    if kind == "tvd":
        return 0.5 * (p - q).abs()
    if kind == "skew_kl":
        return _expect(p, log_p - _mix(log_p, log_q, beta))
    if kind == "skew_reverse_kl":
        return _expect(q, log_q - _mix(log_q, log_p, beta))
    if kind == "mixed_kl":
        return beta * _expect(p, log_p - log_q) + (1 - beta) * _expect(q, log_q - log_p)
    # alpha: each term is >= 0 (weighted arithmetic and geometric mean)
    between = (beta * log_p + (1 - beta) * log_q).exp()
    return (beta * p + (1 - beta) * q - between) / (beta * (1 - beta))


def support(student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec) -> Tensor:
    """Mark the entries that count, [..., vocab] bool."""
    kept = torch.zeros_like(student_logits, dtype=torch.bool)
    k = min(spec.top_k or 0, student_logits.shape[-1])
    if spec.support in ("teacher_topk", "union"):
        kept = kept.scatter(-1, teacher_logits.topk(k, dim=-1).indices, True)
    if spec.support in ("student_topk", "union"):
        kept = kept.scatter(-1, student_logits.topk(k, dim=-1).indices, True)
    return kept


def restrict(log_p: Tensor, kept: Tensor, missing: str) -> Tensor:
    """Return log-probabilities of the categories that are left of [..., vocab].

    Entries that are not kept are -inf; "tail" appends the log of their mass as one category.
    """
    inside = log_p.masked_fill(~kept, -math.inf)
    if missing == "renormalise":
        return inside.log_softmax(-1)
    if missing == "zero":
        return inside
    tail = log_p.masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([inside, tail], dim=-1)


def clipped_entries(log_p: Tensor, log_q: Tensor, spec: DivergenceSpec, clip: float) -> Tensor:
    """Compute `entries`, at most `clip` each; those that are cut have no gradient.

    An entry that is cut may be infinite, and 0 times its gradient NaN: it is left out before.
    """
    with torch.no_grad():
        cut = entries(log_p, log_q, spec.kind, spec.beta) > clip
    log_p, log_q = log_p.masked_fill(cut, 0.0), log_q.masked_fill(cut, 0.0)
    return torch.where(cut, clip, entries(log_p, log_q, spec.kind, spec.beta))


def total(log_p: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    """Sum the entries over the last dimension, clip and scale as the spec says."""
    if spec.clip is None:
        return spec.scale * entries(log_p, log_q, spec.kind, spec.beta).sum(-1)
    if spec.clip_level == "vocab_entry":
        return spec.scale * clipped_entries(log_p, log_q, spec, spec.clip).sum(-1)
    with torch.no_grad():
        value = entries(log_p, log_q, spec.kind, spec.beta).sum(-1, keepdim=True)
    # where the gradient is 0 the entries may be infinite: they are left out before
    cut = value > spec.clip if spec.clip_level == "token" else value == math.inf
    log_p, log_q = log_p.masked_fill(cut, 0.0), log_q.masked_fill(cut, 0.0)
    per_token = entries(log_p, log_q, spec.kind, spec.beta).sum(-1)
    per_token = torch.where(cut.squeeze(-1), spec.clip, per_token)
    if spec.clip_level == "token":
        return spec.scale * per_token
    value = per_token.detach()
    return spec.scale * per_token * torch.where(value > spec.clip, spec.clip / value, 1.0)


def divergence(student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec) -> Tensor:
    """Compute the divergence per token: [..., vocab] logits on both sides to [...] nats."""
    spec = spec.resolved()
    log_q = torch.log_softmax(student_logits / spec.temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / spec.temperature, dim=-1)
    if spec.support != "full":
        kept = support(student_logits, teacher_logits, spec)
        log_p, log_q = (restrict(x, kept, spec.missing) for x in (log_p, log_q))
    return total(log_p, log_q, spec)


def sparse_divergence(
    student_logits: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor, spec: DivergenceSpec
) -> Tensor:
    """Compute the divergence to a teacher known at `ids` [..., K] only; ids < 0 are padding.

    log_probs [..., K] are the teacher's at the spec's temperature, log_tail [...] the log of the
    mass it gives to all other entries.
    """
    spec = spec.resolved()
    log_q = torch.log_softmax(student_logits / spec.temperature, dim=-1)
    held = torch.full((*log_q.shape[:-1], log_q.shape[-1] + 1), -math.inf, dtype=log_q.dtype)
    # the column behind the vocabulary takes the padding
    held = held.to(log_q.device).scatter(
        -1, torch.where(ids < 0, log_q.shape[-1], ids), log_probs.to(log_q.dtype)
    )
    log_p = held[..., :-1]
    kept = torch.zeros_like(held, dtype=torch.bool)
    kept = kept.scatter(-1, torch.where(ids < 0, log_q.shape[-1], ids), True)[..., :-1]
    log_q = restrict(log_q, kept, spec.missing)
    if spec.missing == "renormalise":
        log_p = log_p.log_softmax(-1)
    elif spec.missing == "tail":
        log_p = torch.cat([log_p, log_tail.to(log_q.dtype)[..., None]], dim=-1)
    return total(log_p, log_q, spec)


def slopes(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return the derivatives of `entries` for p and q; of soft_ce, those of the forward KL."""
    ratio = log_p - log_q
    if kind in ("forward_kl", "soft_ce"):
        return ratio + 1, -ratio.exp()
    if kind == "reverse_kl":
        return -(-ratio).exp(), 1 - ratio
    if kind in ("jsd", "mixed_kl"):
        kinds = ("skew_kl", "skew_reverse_kl") if kind == "jsd" else ("forward_kl", "reverse_kl")
        one = slopes(log_p, log_q, kinds[0], beta)
        other = slopes(log_p, log_q, kinds[1], 1 - beta)
        by_p, by_q = (beta * x + (1 - beta) * y for x, y in zip(one, other, strict=True))
        return by_p, by_q
    if kind == "tvd":
        return 0.5 * ratio.sign(), -0.5 * ratio.sign()
    if kind == "skew_kl":
        log_m = _mix(log_p, log_q, beta)
        share = (log_p - log_m).exp()
        return log_p - log_m + 1 - beta * share, -(1 - beta) * share
    if kind == "skew_reverse_kl":
        by_q, by_p = slopes(log_q, log_p, "skew_kl", beta)
        return by_p, by_q
    by_p = (1 - ((beta - 1) * ratio).exp()) / (1 - beta)
    return by_p, (1 - (beta * ratio).exp()) / beta


def bregman(
    log_p: Tensor,
    log_q: Tensor,
    log_p_tail: Tensor,
    log_q_tail: Tensor,
    kind: str,
    beta: float,
) -> Tensor:
    """Say what entries [..., n] of a tail lose when it becomes one category, log masses [..., 1].

    An f-divergence is a sum of F(p, q), F convex and homogeneous of degree 1, so that with F_p and
    F_q its derivatives at the tail's masses the terms F(p, q) - p F_p - q F_q are never negative,
    and their sum over the tail is the divergence less that of the one category. The soft
    cross-entropy is the forward KL and the teacher's entropy, whose part within the tail is added.
    """
    by_p, by_q = slopes(log_p_tail, log_q_tail, kind, beta)
    generator = "forward_kl" if kind == "soft_ce" else kind
    lost = entries(log_p, log_q, generator, beta) - log_p.exp() * by_p - log_q.exp() * by_q
    return lost - _expect(log_p.exp(), log_p - log_p_tail) if kind == "soft_ce" else lost


def tail_correction(
    student_logits: Tensor,
    ids: Tensor,
    log_tail: Tensor,
    draws: tuple[Tensor, Tensor, Tensor],
    spec: DivergenceSpec,
    max_ratio: float,
) -> Tensor:
    """Say what draws from the tail add to `sparse_divergence` with missing "tail", unclipped.

    draws: ids, the teacher's log-probabilities and log-weights, [..., n] each; ids < 0 are padding.
    max_ratio bounds the gradient of a draw, not its value.
    """
    spec = spec.resolved()
    log_q = torch.log_softmax(student_logits / spec.temperature, dim=-1)
    kept = torch.zeros((*log_q.shape[:-1], log_q.shape[-1] + 1), dtype=torch.bool)
    kept = kept.scatter(-1, torch.where(ids < 0, log_q.shape[-1], ids), True)[..., :-1]
    log_q_tail = log_q.masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)
    drawn, log_p, log_weights = draws
    log_p = log_p.to(log_q.dtype).masked_fill(drawn < 0, 0.0)
    log_p_tail = log_tail.to(log_q.dtype)[..., None]
    at = log_q.gather(-1, drawn.clamp_min(0))
    ratio = (at - log_q_tail) - (log_p - log_p_tail)
    bound = math.log(max_ratio)
    lost = bregman(log_p, at, log_p_tail, log_q_tail, spec.kind, spec.beta)
    # the bound is one of the gradient; the value is that of the whole term
    bounded = torch.zeros_like(lost)
    if spec.kind in ("forward_kl", "soft_ce") and max_ratio < math.inf:
        bounded = (max_ratio - 1) * log_p.exp() * ratio
    bounded = bounded + (lost - bounded).detach()
    lost = torch.where(ratio <= bound, lost, bounded)
    weight = log_weights.to(log_q.dtype).masked_fill(drawn < 0, -math.inf).exp()
    return spec.scale * _expect(weight, lost).sum(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Compute the entropy of softmax(logits / temperature): [..., vocab] to [...] nats."""
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return -_expect(log_p.exp(), log_p).sum(-1)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None):
    """Apply an output head: [N, H] hidden states and [V, H] weight to logits [N, V]."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def hidden_divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Compare hidden states: [..., H] on both sides to [...]."""
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    lengths = [torch.linalg.vector_norm(x, dim=-1) for x in (student, teacher)]
    a, b = (x.clamp_min(NORM_MIN) for x in lengths)
    return 1 - ((student / a[..., None]) * (teacher / b[..., None])).sum(-1)
