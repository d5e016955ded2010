"""Computes a block of rows over the full vocabulary, in place on a few buffers.

The usual kinds have a short path: two exponentials an entry and few passes over buffers that stay
in cache. Rows whose loss it cannot give to full accuracy (teacher and student nearly agree, or
entries of -inf) are done again with `terms`, which is exact and slower.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.blocks.rows import (
    LoadedRows,
    clip_tokens,
    exact_loss,
    scale_gradient,
)
from metal_ops.spec import DivergenceSpec

# Below this loss, in nats, a row is done again: the short path is off by about 1e-7 nats, and by
# more where the two sides' logits lie apart by a constant.
NEAR = 2.0**-10


class ShortPath(NamedTuple):
    """Holds a block's loss, a sum that its gradient needs, and a function that forms the gradient.

    Loss and sum are [rows, 1] each; zeros where no loss is wanted. The function writes the gradient
    times a factor [rows, 1] to `out` (which may be the student's logits), given that sum over whole
    rows.
    """

    loss: Tensor
    mean: Tensor
    gradient: Callable[[Tensor, Tensor, Tensor], None]


def _cross_entropy(loaded: LoadedRows, loss: Tensor) -> ShortPath:
    """Form q - p."""

    def gradient(_mean: Tensor, factor: Tensor, out: Tensor) -> None:
        _, _, q, p, _ = loaded.buffers
        q.mul_(factor / loaded.q_sum)
        torch.addcmul(q, p, factor / loaded.p_sum, value=-1, out=out)

    return ShortPath(loss, torch.zeros_like(loss), gradient)


def _forward_kl(
    loaded: LoadedRows, offset: Tensor, spec: DivergenceSpec, want_loss: bool = True
) -> ShortPath:
    if not want_loss:
        return _cross_entropy(loaded, torch.zeros_like(offset))
    (_, _, _, p, spare), log_q, _, log_p, p_sum = loaded
    torch.sub(log_p, log_q, out=spare).mul_(p)
    loss = spare.sum(-1, keepdim=True).div_(p_sum).sub_(offset)
    return _cross_entropy(loaded, loss)


def _soft_ce(
    loaded: LoadedRows, offset: Tensor, spec: DivergenceSpec, want_loss: bool = True
) -> ShortPath:
    if not want_loss:
        return _cross_entropy(loaded, torch.zeros_like(offset))
    (_, _, _, p, spare), log_q, q_sum, _, p_sum = loaded
    torch.mul(log_q, p, out=spare)
    loss = q_sum.log().sub_(spare.sum(-1, keepdim=True).div_(p_sum))
    return _cross_entropy(loaded, loss)


def _reverse_kl(
    loaded: LoadedRows, offset: Tensor, spec: DivergenceSpec, want_loss: bool = True
) -> ShortPath:
    (_, _, q, _, spare), log_q, q_sum, log_p, _ = loaded
    torch.sub(log_q, log_p, out=spare).mul_(q)
    mean = spare.sum(-1, keepdim=True).div_(q_sum)  # of log_q - log_p under q

    def gradient(mean: Tensor, factor: Tensor, out: Tensor) -> None:
        spare.addcmul_(q, mean, value=-1)
        torch.mul(spare, factor / q_sum, out=out)

    return ShortPath(mean + offset, mean, gradient)


def _jsd(
    loaded: LoadedRows, offset: Tensor, spec: DivergenceSpec, want_loss: bool = True
) -> ShortPath:
    (_, spare, q, p, mixture), _, q_sum, _, p_sum = loaded  # the logs are not needed any more
    beta = spec.beta
    torch.mul(p, (q_sum / p_sum).mul_(beta), out=mixture).add_(q, alpha=1 - beta)  # times q_sum

    def weighted_log(x: Tensor) -> Tensor:
        """Sum x log(x / mixture), and leave its terms in spare."""
        torch.div(x, mixture, out=spare).log_().mul_(x)
        total = spare.sum(-1, keepdim=True)
        if bool(total.isnan().any()):  # 0 * -inf, 0 / 0
            total = spare.masked_fill_(x == 0, 0.0).sum(-1, keepdim=True)
        return total

    loss = torch.zeros_like(offset)
    if want_loss:
        loss = weighted_log(p).div_(p_sum).sub_(offset).mul_(beta)
    mean = weighted_log(q).div_(q_sum)
    loss.add_(mean, alpha=1 - beta)

    def gradient(mean: Tensor, factor: Tensor, out: Tensor) -> None:
        spare.addcmul_(q, mean, value=-1)
        torch.mul(spare, factor * (1 - beta) / q_sum, out=out)

    return ShortPath(loss, mean, gradient)


# From loaded buffers, and log(p_sum / q_sum).
SHORT_PATHS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "soft_ce": _soft_ce,
    "jsd": _jsd,
}


def short_path(spec: DivergenceSpec) -> Callable[..., ShortPath] | None:
    """Return the short path of a spec, if it has one."""
    cut = spec.clip is not None and spec.clip_level == "vocab_entry"
    return None if cut else SHORT_PATHS.get(spec.kind)


def doubtful(loss: Tensor, offset: Tensor) -> Tensor | None:
    """Find the rows [n] whose loss [rows, 1] the short path cannot give to full accuracy."""
    excess = loss.sub(offset.abs(), alpha=NEAR)
    low, high = (float(x) for x in torch.aminmax(excess))  # NaN if one is
    if low >= NEAR and high < torch.inf:
        return None
    return (~(excess >= NEAR) | (excess == torch.inf)).nonzero()[:, 0]


def full_divergence(
    loaded: LoadedRows, spec: DivergenceSpec, factor: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return (loss, clipped) of all entries; `out` gets the gradient times factor [rows]."""
    short, found = short_path(spec), None
    if short is None:
        again = torch.arange(len(loaded.q_sum), device=loaded.q_sum.device)
        loss = loaded.q_sum[:, 0].clone()
    else:
        offset = (loaded.p_sum / loaded.q_sum).log_()
        found = short(loaded, offset, spec)
        again, loss = doubtful(found.loss, offset), found.loss[:, 0]
    redone = None if again is None else exact_loss(loaded.pick(again, spec.kind), spec)
    if redone is not None:
        loss[again] = redone.loss
    loss, shrink, clipped = clip_tokens(loss, spec)
    if out is not None and factor is not None:
        factor = (factor if shrink is None else factor * shrink)[:, None]
        if found is not None:
            found.gradient(found.mean, factor, out)
        if redone is not None:
            scale_gradient(redone.gradient, factor[again, 0], clips=shrink is not None)
            if found is None:
                out.copy_(redone.gradient)
            else:
                out[again] = redone.gradient.to(out.dtype)
    if redone is not None and redone.clipped is not None:
        clipped = redone.clipped
    return loss, clipped
