"""What every op means, in plain PyTorch and in the dtype of the inputs."""

import math

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec


def _expect(weight: Tensor, value: Tensor) -> Tensor:
    """Product of weight and value, with 0 * anything = 0 (0 log 0 = 0)."""
    return weight * value.masked_fill(weight == 0, 0.0)


def entries(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """The terms whose sum over the vocabulary is the divergence; p teacher, q student."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return _expect(p, log_p - log_q)
    if kind == "reverse_kl":
        return _expect(q, log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _expect(p, log_p - log_m) + (1 - beta) * _expect(q, log_q - log_m)


def divergence(student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec) -> Tensor:
    """Divergence per token: [..., vocab] logits on both sides to [...] nats."""
    spec = spec.resolved()
    log_q = torch.log_softmax(student_logits / spec.temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / spec.temperature, dim=-1)
    terms = entries(log_p, log_q, spec.kind, spec.beta)
    if spec.clip is None:
        return spec.scale * terms.sum(-1)
    if spec.clip_level == "vocab_entry":
        return spec.scale * terms.clamp(max=spec.clip).sum(-1)
    per_token = terms.sum(-1)
    if spec.clip_level == "token":
        return spec.scale * per_token.clamp(max=spec.clip)
    factor = (spec.clip / per_token.detach()).clamp(max=1.0)
    return spec.scale * per_token * factor


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature): [..., vocab] to [...] nats."""
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return -_expect(log_p.exp(), log_p).sum(-1)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None):
    """Logits of an output head: [N, H] hidden states and [V, H] weight to [N, V]."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)
