"""Losses that read only the log-probabilities of the sampled tokens.

With y a token, p the teacher, q the student, both softmax(logits / temperature), and the advantage
A = log p(y) - log q(y):

- "policy_gradient": -A log q(y), A held constant. Its gradient is -A grad log q(y). In expectation
  over y ~ q that is -sum_y q(y) (log p(y) - log q(y)) grad log q(y), the gradient of the reverse
  KL, KL(q || p), because sum_y q(y) grad log q(y) = 0.
- "k3": exp(A) - 1 - A, differentiated through A. In expectation over y ~ q its *value* is the
  reverse KL (sum_y q(y) p(y) / q(y) = 1), never negative for any token. Its *gradient* is
  (1 - p(y) / q(y)) grad log q(y), in expectation -sum_y p(y) grad log q(y): that of the forward KL,
  KL(p || q).

Both hold at the temperature 1 of sampling only: completions drawn at another temperature, or from
part of the vocabulary, come from another distribution than q.

Source:
    k3: J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html (2020), for which
    it estimates a value. The gradients are derived above and checked by enumeration in the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.base import Loss, Terms, Tokens
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec

SAMPLED_KINDS = ("policy_gradient", "k3")


class _Soft(NamedTuple):
    """Holds, per token, the loss with a gradient before scaling, and whether it was clipped."""

    value: Tensor
    clipped: Tensor


def _policy_gradient(log_p: Tensor, log_q: Tensor, clip: float | None) -> _Soft:
    advantage = log_p - log_q.detach()
    bounded = advantage if clip is None else advantage.clamp(-clip, clip)
    return _Soft(-bounded * log_q, bounded != advantage)


def _k3(log_p: Tensor, log_q: Tensor, clip: float | None) -> _Soft:
    ratio = log_p - log_q
    value = torch.expm1(ratio) - ratio
    value = torch.where(ratio == torch.inf, ratio, value)  # not infinity less infinity
    if clip is None:
        return _Soft(value, torch.zeros_like(value, dtype=torch.bool))
    # the value may be infinite where it is cut, and 0 times its gradient NaN: it is left out before
    cut = value.detach() > clip
    ratio = ratio.masked_fill(cut, 0.0)
    return _Soft(torch.where(cut, clip, torch.expm1(ratio) - ratio), cut)


_SOFT: dict[str, Callable[[Tensor, Tensor, float | None], _Soft]] = {
    "policy_gradient": _policy_gradient,
    "k3": _k3,
}


def checked_spec(temperature: float, scaling: str, clip: float | None) -> DivergenceSpec:
    """Make a spec with these settings of a loss of tokens: it has the checks, and the scale.

    Raises:
        ValueError: a value is out of range.
    """
    return DivergenceSpec("reverse_kl", 0.5, temperature, scaling, clip, "token")


@dataclass(frozen=True)
class SampledTokenLoss(Loss):
    """Computes alpha * soft + (1 - alpha) * hard: a loss of the sampled tokens, cross-entropy.

    Args:
        kind: "policy_gradient" or "k3"; see the module.
        alpha: share of the sampled-token loss, in [0, 1].
        temperature: of both sides in it, > 0.
        temperature_scaling: "t2" multiplies it by temperature², "none" does not.
        clip: None, or a bound > 0 in nats: the advantage of "policy_gradient" is kept in
            [-clip, clip]; the value of "k3" is cut at clip, where its gradient is zero.
        measures_hard: as in `Loss`.

    Raises:
        ValueError: a value is out of range.
    """

    of_tokens: ClassVar[bool] = True
    chunks_logits: ClassVar[bool] = False  # one log-softmax, like the cross-entropy's
    copies_logits: ClassVar[bool] = False

    kind: str
    alpha: float = 1.0
    temperature: float = 1.0
    temperature_scaling: str = "none"
    clip: float | None = None
    measures_hard: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.kind not in SAMPLED_KINDS:
            raise ValueError(f"kind must be one of {SAMPLED_KINDS}, got {self.kind!r}")
        self._spec()

    def _spec(self) -> DivergenceSpec:
        return checked_spec(self.temperature, self.temperature_scaling, self.clip)

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the loss of n sampled tokens; `advantage` is a metric of its own."""
        with torch.no_grad():
            log_p = chunks.target_log_probs(teacher.dense(), tokens.targets, self.temperature)
        log_q = chunks.target_log_probs(logits, tokens.targets, self.temperature)
        log_p, weights = log_p.to(log_q.dtype), tokens.soft_weights
        # a token without weight may be infinite
        held, counted = (torch.where(weights == 0, 0.0, x) for x in (log_p, log_q))
        value, clipped = _SOFT[self.kind](held, counted, self.clip)
        value = value * self._spec().scale
        metrics = {
            "soft": value.detach(),
            "advantage": torch.where(weights == 0, torch.nan, log_p - log_q.detach()),
        }
        if self.clip is not None:
            metrics["clipped"] = clipped.to(value.dtype)
        sides = {"student": log_q.detach(), "teacher": log_p}
        evidence = {side: x.where(x.isnan(), 0.0) for side, x in sides.items()}
        return Terms((weights * value).sum(), metrics, evidence)
