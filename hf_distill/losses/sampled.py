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
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.heads import Head, Signal
from hf_distill.losses import tokens
from hf_distill.losses.objective import Terms, hard_sum, mixed
from metal_ops import DivergenceSpec, reference
from metal_ops.functional import DivergenceStats, gather_shards

SAMPLED_KINDS = ("policy_gradient", "k3")


class _Soft(NamedTuple):
    """Per token: the loss, with a gradient, before scaling; whether it was clipped."""

    value: Tensor
    clipped: Tensor


def _policy_gradient(log_p: Tensor, log_q: Tensor, clip: float | None) -> _Soft:
    advantage = log_p - log_q.detach()
    bounded = advantage if clip is None else advantage.clamp(-clip, clip)
    return _Soft(-bounded * log_q, bounded != advantage)


def _k3(log_p: Tensor, log_q: Tensor, clip: float | None) -> _Soft:
    ratio = log_p - log_q
    value = torch.expm1(ratio) - ratio
    bounded = value if clip is None else value.clamp(max=clip)
    return _Soft(bounded, bounded != value)


_SOFT: dict[str, Callable[[Tensor, Tensor, float | None], _Soft]] = {
    "policy_gradient": _policy_gradient,
    "k3": _k3,
}


@dataclass(frozen=True)
class SampledObjective:
    """alpha * soft + (1 - alpha) * hard: a loss of the sampled tokens, and cross-entropy.

    Args:
        kind: "policy_gradient" or "k3"; see the module.
        alpha: share of the sampled-token loss, in [0, 1].
        temperature: of both sides in it, > 0.
        temperature_scaling: "t2" multiplies it by temperature², "none" does not.
        clip: None, or a bound > 0 in nats: the advantage of "policy_gradient" is kept in
            [-clip, clip]; the value of "k3" is cut at clip, where its gradient is zero.
        measures_hard: as in `Objective`.

    Raises:
        ValueError: a value is out of range.
    """

    kind: str
    alpha: float
    temperature: float = 1.0
    temperature_scaling: str = "none"
    clip: float | None = None
    measures_hard: bool = field(default=False, kw_only=True)

    extra_names = ("advantage",)

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.kind not in SAMPLED_KINDS:
            raise ValueError(f"kind must be one of {SAMPLED_KINDS}, got {self.kind!r}")
        self._spec()

    def _spec(self) -> DivergenceSpec:
        """A spec with the same temperature, scaling and clip: it has the checks."""
        scaling, clip = self.temperature_scaling, self.clip
        return DivergenceSpec("reverse_kl", 0.5, self.temperature, scaling, clip, "token")

    @property
    def _wants_hard(self) -> bool:
        return self.alpha < 1.0 or self.measures_hard

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Metrics of single tokens that this loss does not compute."""
        hard = () if self._wants_hard else ("hard",)
        clipped = ("clipped",) if self.clip is None else ()
        return (*hard, *clipped, "student_entropy", "teacher_entropy", "top1_agreement")

    def _soft(
        self, log_p: Tensor, log_q: Tensor, weights: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The weighted sum [], and soft, clipped, advantage, log p and log q per token."""
        log_p = log_p.to(log_q.dtype)
        # a token without weight may be infinite
        held = torch.where(weights == 0, log_q.detach(), log_p)
        value, clipped = _SOFT[self.kind](held, log_q, self.clip)
        value = value * self._spec().scale
        advantage = torch.where(weights == 0, torch.nan, log_p - log_q)  # NaN: does not count
        rows = (value, clipped.to(value.dtype), advantage, log_p, log_q)
        return (weights * value).sum(), tuple(row.detach() for row in rows)

    def _terms(self, loss: Tensor, rows: tuple[Tensor, ...], hard: Tensor) -> Terms:
        soft, clipped, advantage, log_p, log_q = rows
        # entropies and agreement are not known; a NaN tells `assert_finite` whose logits are NaN
        zero = torch.zeros_like(soft)
        student, teacher = (zero.masked_fill(x.isnan(), torch.nan) for x in (log_q, log_p))
        stats = DivergenceStats(student, teacher, zero, clipped)
        return Terms(loss, soft, hard, stats, {"advantage": advantage})

    def from_hidden(
        self,
        hidden: Tensor,
        head: Head,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
    ) -> Terms:
        """Terms of N tokens, as `Objective.from_hidden`, a chunk of tokens at a time.

        Raises:
            ValueError: the teacher's signal is sparse.
        """
        if teacher.sparse is not None:
            teacher.dense()  # says why it cannot be read
        assert teacher.hidden is not None
        assert teacher.head is not None
        said, of = teacher.hidden, teacher.head
        weight = gather_shards(of.weight).detach()
        bias = None if of.bias is None else gather_shards(of.bias).detach()
        hard_weights = weights if hard_weights is None else hard_weights

        def piece(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher_logits = reference.head(said[at], weight, bias, of.logit_scale, of.softcap)
                log_p = tokens.gathered(teacher_logits, targets[at], self.temperature)
            log_q = tokens.gathered(logits, targets[at], self.temperature)
            loss, rows = self._soft(log_p, log_q, weights[at])
            hard = torch.zeros_like(log_q)
            if self._wants_hard:
                hard = -tokens.gathered(logits, targets[at])
                loss = mixed(self.alpha, loss, (hard_weights[at] * hard).sum())
            return loss, torch.stack([*rows, hard.detach()])

        loss, values = tokens.sum_over_chunks(hidden, head, piece, hard_weights)
        *rows, hard = values if values.numel() else values.new_zeros(6, 0)
        return self._terms(loss, tuple(rows), hard)

    def from_logits(
        self,
        logits: Tensor,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
        hard_loss: Tensor | None = None,
    ) -> Terms:
        """Terms of N tokens from logits [N, V], as `Objective.from_logits`."""
        with torch.no_grad():
            log_p = tokens.gathered(teacher.dense(), targets, self.temperature)
        log_q = tokens.gathered(logits, targets, self.temperature)
        loss, rows = self._soft(log_p, log_q, weights)
        hard = torch.zeros_like(log_q.detach())
        if self._wants_hard:
            hard_weights = weights if hard_weights is None else hard_weights
            hard_part, hard = hard_sum(logits, targets, hard_weights, hard_loss)
            loss = mixed(self.alpha, loss, hard_part)
        return self._terms(loss, rows, hard)
