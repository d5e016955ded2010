"""The contrast of a right and a wrong hint: as a weight of tokens, or as the target."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.base import Loss, Terms, Tokens
from hf_distill.losses.chunks import at_least_float32
from hf_distill.losses.divergence import DivergenceLoss
from hf_distill.losses.log_mean import LogMean, mean_log_probs
from hf_distill.models.signals import Signal

CONTRAST_NAME = "contrast_factor"
CONTRAST_KINDS = ("weight", "target")
MOST_NATS = 1e4  # of one token, where one context excludes what the other allows


@dataclass
class ContrastConfig:
    """Says what is made of what the teacher says with the right hint and with the wrong one.

    It is read where the `HintCollator` has a `contrast`.

    Raises:
        ValueError: a value is out of range.
    """

    kind: str = field(
        default="weight",
        metadata={
            "help": "weight lets tokens count by how much the two hints differ on them. target "
            "lets the student learn what the right hint changes and the wrong one does not."
        },
    )
    scale: float = field(
        default=1.3,
        metadata={
            "help": "weight: the difference of the token's log-probabilities, in nats, at which "
            "its weight is tanh(1) = 0.76. It must be greater than 0."
        },
    )
    threshold: float = field(
        default=0.02,
        metadata={"help": "weight: weights up to this one are 0. It must be in [0, 1)."},
    )
    strength: float = field(
        default=1.0,
        metadata={
            "help": "target: how far the target goes from the student, as a multiple of the "
            "difference of the two contexts. It must be greater than 0."
        },
    )
    bound: float = field(
        default=10.0,
        metadata={
            "help": "target: the difference of an entry is bent to stay within this, in nats. It "
            "must be greater than 0."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.kind not in CONTRAST_KINDS:
            raise ValueError(f"contrast.kind must be one of {CONTRAST_KINDS}, got {self.kind!r}")
        for name in ("scale", "strength", "bound"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"contrast.{name} must be positive and finite, got {value}")
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"contrast.threshold must be in [0, 1), got {self.threshold}")


class ContrastWeights(NamedTuple):
    """Says how tokens are weighed: share of the contrast in [0, 1], and its settings."""

    share: float
    config: ContrastConfig


@torch.no_grad()
def contrast_factors(weights: ContrastWeights, teacher: Signal, targets: Tensor) -> Tensor:
    """Return 1 - share + share * g of each token, with g = tanh(abs(e) / scale).

    e = log p(y | right hint) - log p(y | wrong hint) at temperature 1, and g is 0 up to the
    threshold. Of K wrong hints it is the mean of the probabilities, p(y | wrong) =
    1/K sum_k p(y | wrong hint k), over those that the token's row has. Where the hints say the
    same, nothing is left of a token at share 1.

    Args:
        weights: the share, scale and threshold.
        teacher: with its contrast. Hidden states of both are projected once more.
        targets: [N] int64.

    Returns:
        [N] float32 (float64 for float64 signals), in [0, 1].

    Source:
        e, its mean over K wrong hints, its tanh and the threshold are those of RLCSD
        (arXiv:2606.11709, and the README and settings of its release). RLCSD adds them, with their
        sign, to the advantage of a sampled token; that their size weighs a token of a divergence is
        a use of them made here.
    """
    assert teacher.contrast is not None
    right, mean = chunks.log_probs(teacher, targets), LogMean()
    for each in teacher.contrasts:
        mean.add(chunks.log_probs(each, targets), each.absent)
    wrong = mean.value()
    # both may exclude the token, which is no difference
    apart = torch.where(right == wrong, 0.0, right - wrong).abs().clamp(max=MOST_NATS)
    found = torch.tanh(apart / weights.config.scale)
    found = torch.where(found > weights.config.threshold, found, 0.0)
    return 1 - weights.share + weights.share * found


@torch.no_grad()
def contrast_target(
    logits: Tensor, right: Tensor, wrong: Tensor, share: float, config: ContrastConfig
) -> Tensor:
    """Return the logits of the target, without gradient.

        d = log p(v | right hint) - log p(v | wrong hint), minus its mean over v
        log target = (1 - share) * log p(v | right hint)
                     + share * (log q(v) + strength * bound * tanh(d / bound)) + constant

    At share 1 and with two contexts that say the same it is the student q itself, held constant, so
    that nothing is learnt. At share 0 it is the teacher with the right hint.

    Args:
        logits: [n, V], the student's.
        right: [n, V], the teacher's with the right hint.
        wrong: [n, V], the teacher's with the wrong one; of several the log of the mean probability,
            beside log-probabilities for the right one.
        share: in [0, 1].
        config: strength and bound.

    Returns:
        [n, V] in float32 (float64 if one side is).

    Source:
        The PMI-like target of Purified OPSD (arXiv:2607.02234), whose second context is the
        reference without the question: a base distribution times the exponential of a difference of
        two contexts that is centred, bent by tanh and scaled. That is how a public reimplementation
        reads its section 3.2; the paper's text was not at hand. Taking the student at this step for
        the base, so that equal contexts give no signal, and the share are choices made here.
    """
    # constants of a row change nothing: neither the target nor a centred difference
    one, other, own = (at_least_float32(x) for x in (right, wrong, logits))
    gap = torch.where(one == other, 0.0, one - other).clamp(-MOST_NATS, MOST_NATS)
    gap = gap - gap.mean(-1, keepdim=True)
    gap = config.strength * config.bound * torch.tanh(gap / config.bound)
    if share == 1.0:
        return own + gap
    return (1 - share) * one + share * (own + gap)


@torch.no_grad()
def _both(teacher: Signal) -> tuple[Tensor, Tensor]:
    """Return what the teacher says behind the right hint and behind the wrong ones, [n, V] each."""
    contrasts = teacher.contrasts
    if len(contrasts) == 1:
        return teacher.dense(), contrasts[0].dense()
    # one after the other: their logits are not there at once
    wrong = mean_log_probs((x.dense(), x.absent) for x in contrasts)
    return at_least_float32(teacher.dense()).log_softmax(-1), wrong


@dataclass(frozen=True)
class ContrastLoss(DivergenceLoss):
    """Computes the divergence to a target of two contexts, see `contrast_target`.

    Logits exist a chunk of tokens at a time. Without a second context, or at share 0, this is the
    divergence to the teacher. The entropy "teacher_entropy" is the target's.

    Args:
        spec: the divergence.
        alpha: share of the divergence, in [0, 1].
        share: of the contrast, in [0, 1].
        config: strength and bound.
    """

    needs_dense: ClassVar[bool] = True

    share: float = 1.0
    config: ContrastConfig = field(default_factory=ContrastConfig)

    def __call__(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms of N tokens, see `Loss`."""
        if teacher.contrast is None or self.share == 0.0:
            return super().__call__(student, teacher, tokens)
        return Loss.__call__(self, student, teacher, tokens)

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the divergence of n tokens from their targets."""
        if teacher.contrast is None or self.share == 0.0:
            return super().soft(logits, teacher, tokens)
        target = contrast_target(logits.detach(), *_both(teacher), self.share, self.config)
        return super().soft(logits, Signal(logits=target), tokens)
