"""A block of rows over the full vocabulary, in place on a few buffers.

The usual kinds have a short path: two exponentials an entry and few passes over buffers that stay
in cache. Rows whose loss it cannot give to full accuracy (teacher and student nearly agree, or
entries of -inf) are done again with `_terms`, which is exact and slower.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metal_ops.backends._rows import Loaded, clip_tokens, exact
from metal_ops.spec import DivergenceSpec

# Below this loss, in nats, a row is done again: the short path is off by about 1e-7 nats.
NEAR = 2.0**-10

# The short paths: from loaded buffers to the loss [rows], a function that writes the gradient times
# a factor [rows, 1] to `out` (which may be `spare`), and what the buffers then hold of p and q.
Gradient = Callable[[Tensor, Tensor], None]
Short = tuple[Tensor, Gradient, Loaded]


def _cross_entropy_gradient(loaded: Loaded) -> Gradient:
    """Q - p."""

    def gradient(factor: Tensor, out: Tensor) -> None:
        (_, _, q, p, spare), q_sum, p_sum = loaded
        torch.mul(q, factor / q_sum, out=spare)
        torch.addcmul(spare, p, factor / p_sum, value=-1, out=out)

    return gradient


def _forward_kl(loaded: Loaded, spec: DivergenceSpec) -> Short:
    (log_q, log_p, _, p, spare), q_sum, p_sum = loaded
    torch.sub(log_p, log_q, out=spare).mul_(p)
    loss = spare.sum(-1, keepdim=True).div_(p_sum).sub_((p_sum / q_sum).log_())
    return loss.squeeze(-1), _cross_entropy_gradient(loaded), loaded


def _soft_ce(loaded: Loaded, spec: DivergenceSpec) -> Short:
    (log_q, _, _, p, spare), q_sum, p_sum = loaded
    torch.mul(log_q, p, out=spare)
    loss = q_sum.log().sub_(spare.sum(-1, keepdim=True).div_(p_sum))
    return loss.squeeze(-1), _cross_entropy_gradient(loaded), loaded


def _reverse_kl(loaded: Loaded, spec: DivergenceSpec) -> Short:
    (log_q, log_p, q, _, spare), q_sum, p_sum = loaded
    torch.sub(log_q, log_p, out=spare).mul_(q)
    total = spare.sum(-1, keepdim=True).div_(q_sum)  # mean of log_q - log_p under q

    def gradient(factor: Tensor, out: Tensor) -> None:
        spare.addcmul_(q, total, value=-1)
        torch.mul(spare, factor / q_sum, out=out)

    return (total - (q_sum / p_sum).log()).squeeze(-1), gradient, loaded


def _jsd(loaded: Loaded, spec: DivergenceSpec) -> Short:
    (_, mixture, q, p, spare), q_sum, p_sum = loaded
    beta, tiny = spec.beta, torch.finfo(q.dtype).tiny
    p.mul_(1 / p_sum)
    q.mul_(1 / q_sum)
    torch.mul(p, beta, out=mixture).add_(q, alpha=1 - beta).clamp_min_(tiny)
    torch.div(p, mixture, out=spare).clamp_min_(tiny).log_().mul_(p)
    loss = spare.sum(-1).mul_(beta)
    torch.div(q, mixture, out=spare).clamp_min_(tiny).log_().mul_(q)
    total = spare.sum(-1)
    loss.add_(total, alpha=1 - beta)

    def gradient(factor: Tensor, out: Tensor) -> None:
        spare.addcmul_(q, total[:, None], value=-1)
        torch.mul(spare, factor * (1 - beta), out=out)

    ones = torch.ones_like(q_sum)
    return loss, gradient, Loaded(loaded.buffers, ones, ones)


SHORT = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "soft_ce": _soft_ce, "jsd": _jsd}


def divergence(
    loaded: Loaded, spec: DivergenceSpec, factor: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(loss, clipped) of the full vocabulary; the gradient times factor [rows] goes to out."""
    cut = spec.clip is not None and spec.clip_level == "vocab_entry"
    short, gradient = None if cut else SHORT.get(spec.kind), None
    if short is None:
        again = torch.arange(len(loaded.q_sum), device=loaded.q_sum.device)
        loss = loaded.q_sum.squeeze(-1).clone()
    else:
        loss, gradient, loaded = short(loaded, spec)
        again = ((loss < NEAR) | ~loss.isfinite()).nonzero().squeeze(-1)
    redone = exact(loaded.pick(again, spec.kind), spec) if len(again) else None
    if redone is not None:
        loss[again] = redone.loss
    loss, shrink, clipped = clip_tokens(loss, spec)
    if out is not None and factor is not None:
        factor = (factor * shrink)[:, None]
        if gradient is not None:
            gradient(factor, out)
        if redone is not None:
            redone.gradient.mul_(factor[again])
            if short is None:
                out.copy_(redone.gradient)
            else:
                out[again] = redone.gradient.to(out.dtype)
    if cut and redone is not None:
        clipped = redone.clipped
    return loss, clipped
