"""The likelihoods of spans: a loss between a student and a teacher with another tokenizer.

Spans are the smallest runs of tokens of both sides that write the same bytes, see `data.spans`.
With L_q(s) the student's log-probability of a span, the sum over its tokens, L_p(s) the teacher's
of its own tokens, and A = L_p(s) - L_q(s):

- Spans of several tokens count L_q(s) - L_p(s) = -A, and have the gradient -A grad L_q(s), A held
  constant. This is the policy gradient of the reverse KL divergence KL(q || p) of the span's text:
  if spans are sampled from q, the value has the divergence as its mean and the gradient its
  gradient, because sum_s q(s) grad L_q(s) = 0. On any other text the gradient is that of A² / 2,
  which is least where both give the span one likelihood.
- A span that is one token on both sides, which both vocabularies have, is compared over all such
  tokens C: with Q = sum_C q(y), it counts sum_C q(y) / Q (log q(y) - log p(y)), and has the
  gradient sum_C q(y) / Q (log q(y) - log p(y)) grad log q(y). These are the means of the value and
  the gradient above over the tokens of C that could have been sampled in its place. If C is the
  whole vocabulary, as with one tokenizer on both sides, they are KL(q || p) and its gradient.

A step's sum over spans is divided by the student's scored tokens. Tokens in no span have soft loss
0. What the estimate leaves out: a text may be written in other tokens than those, and where the
teacher's tokens cut the text may depend on what follows, so that the means are exact where a span's
end is known from its own tokens, as with one tokenizer.

Source:
    Y. Niu et al., "Breaking the Tokenizer Barrier: On-Policy Distillation across Model Families",
    arXiv:2606.09456. There a token i of a chunk gets the target log q_i L_p / L_q, so that its own
    advantage is log q_i (L_p / L_q - 1) with the sum A over the chunk, inside a clipped ratio of
    PPO; the release leaves out chunks of more than six tokens. Here each token gets A itself, the
    one that makes the gradient that of the span's divergence; for a span of one token both are one.
    The comparison over the common tokens takes the place of the hybrid loss of TRL's GOLD trainer.
    It is a generalised JSD over the probabilities of the tokens with one name, not renormalised,
    plus the L1 distance of the other ones by rank, weighed by the share of the vocabulary that is
    common; of several tokens it scales the distribution at one of them by the probabilities of the
    others.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.base import Loss, Terms, Tokens, without_odd_gradients
from hf_distill.losses.entropy import entropies
from hf_distill.losses.sampled_tokens import checked_spec
from hf_distill.models.signals import Signal
from hf_distill.models.spans import CommonIds, Spans
from metal_ops import DivergenceSpec

SPANS = "spans"


@dataclass(frozen=True)
class SpanLoss(Loss):
    """Computes alpha * soft + (1 - alpha) * hard: the likelihoods of spans, cross-entropy.

    See the module. The soft loss of a span is spread evenly over its tokens; the weight of a span
    is the mean weight of its tokens. Metrics are means over tokens: `paired`, the share of them
    that are in a span; `one_to_one`, the share that are compared over the common vocabulary; and
    `span_gap`, |A| in nats of the spans of the others.

    Args:
        alpha: share of the soft loss, in [0, 1].
        temperature: of both sides in it, > 0; the means hold at 1, where completions are sampled.
        temperature_scaling: "t2" multiplies it by temperature², "none" does not.
        clip: None, or a bound > 0 in nats: A of spans of several tokens is kept in [-clip, clip].
        measures_hard: as in `Loss`.

    Raises:
        ValueError: a value is out of range.
    """

    of_tokens: ClassVar[bool] = True

    alpha: float = 1.0
    temperature: float = 1.0
    temperature_scaling: str = "none"
    clip: float | None = None
    measures_hard: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        self._spec()

    def _spec(self) -> DivergenceSpec:
        return checked_spec(self.temperature, self.temperature_scaling, self.clip)

    def check_signal(self, teacher: Signal, num_tokens: int) -> None:
        """Check what the teacher says of N tokens.

        Raises:
            ValueError: it is sparse, or does not say which tokens are a span.
        """
        super().check_signal(teacher, num_tokens)
        if teacher.spans is None:
            raise ValueError(
                f"divergence {SPANS!r} needs batches of a SpanCollator, got one without spans"
            )

    def __call__(self, student: Signal, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the terms of N tokens; the likelihoods of spans are known before any gradient.

        Args:
            student: hidden states and the head, or logits; with a gradient.
            teacher: of its own M tokens, with `spans`.
            tokens: the student's targets and weights.

        Raises:
            ValueError: see `check_signal`.
        """
        self.check_signal(teacher, len(tokens.targets))
        with torch.no_grad():
            spans = self._measured(student, teacher, tokens)
        return super().__call__(student, replace(teacher, spans=spans), tokens)

    def _measured(self, student: Signal, teacher: Signal, tokens: Tokens) -> Spans:
        """Return the spans with what each of the student's tokens adds to the loss."""
        spans = teacher.spans
        assert spans is not None
        log_q = chunks.log_probs(student, tokens.targets, self.temperature)
        log_p = chunks.log_probs(teacher, spans.targets, self.temperature).to(log_q.dtype)
        inside = spans.student >= 0
        number = torch.where(inside, spans.student, spans.size)  # the last sum is of no span
        weights = tokens.soft_weights.to(log_q.dtype)

        def sums(at: Tensor, values: Tensor) -> Tensor:
            return log_q.new_zeros(spans.size + 1).index_add_(0, at, values)

        counts = sums(number, torch.ones_like(log_q))
        their_counts = sums(spans.teacher, torch.ones_like(log_p))
        one, rows = _single(spans, tokens.targets, number, counts, their_counts)
        mean = (sums(number, weights) / counts.clamp_min(1))[number]
        said = torch.where(inside, sums(spans.teacher, log_p)[number], 0.0)
        gap = sums(number, log_q)[number] - said
        gap = torch.where(inside & ~one & (mean != 0), gap, 0.0)
        held = gap if self.clip is None else gap.clamp(-self.clip, self.clip)
        held = self._spec().scale * held
        values, pulls = held / counts[number], mean * held
        measured = {"values": values, "pulls": pulls, "gaps": gap.abs(), "said": said}
        return replace(spans, rows=rows, single=one, **measured)

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the loss of n tokens of measured spans."""
        spans = teacher.spans
        assert spans is not None
        weights = tokens.soft_weights
        if logits.requires_grad:
            logits = without_odd_gradients(logits, (weights == 0) & (spans.pulls == 0))
        log_q = chunks.log_softmax(logits, self.temperature)
        with torch.no_grad():
            known = teacher.dense()
            log_p = (
                chunks.log_softmax(known, self.temperature).to(log_q.dtype) if len(known) else None
            )
        weights = weights.to(log_q.dtype)
        counts = spans.single & (weights != 0)
        own = log_q.gather(-1, tokens.targets[:, None]).squeeze(-1)
        several = spans.values.to(log_q.dtype)
        pull = (spans.pulls.to(log_q.dtype) * torch.where(spans.pulls == 0, 0.0, own)).sum()
        single = torch.zeros_like(several)
        if log_p is not None:
            masked = log_q.masked_fill(~counts[:, None], 0.0)  # an infinite one has no gradient
            mean, single = _over_common(masked, log_p, spans.common)
            scale = self._spec().scale
            mean, single = (torch.where(counts, scale * x, 0.0) for x in (mean, single))
            pull = pull + (weights * mean).sum()
        value = torch.where(spans.single, single, several)
        loss = (weights * value).sum() + pull - pull.detach()
        return Terms(loss, *self._told(log_q, log_p, value, spans))

    def _told(
        self, log_q: Tensor, log_p: Tensor | None, value: Tensor, spans: Spans
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return metrics, and evidence of what is not finite."""
        inside, several = spans.student >= 0, (spans.student >= 0) & ~spans.single
        entropy = torch.full_like(value, torch.nan) if log_p is None else entropies(log_p)
        said = torch.where(spans.single, entropy, spans.said.to(value.dtype))
        nan = torch.full_like(value, torch.nan)
        metrics = {
            "soft": value.detach(),
            "student_entropy": entropies(log_q),
            "teacher_entropy": torch.where(spans.single, entropy, nan),
            "paired": inside.to(value.dtype),
            "one_to_one": spans.single.to(value.dtype),
            "span_gap": torch.where(several, spans.gaps.to(value.dtype), nan),
        }
        if self.clip is not None:
            clipped = several & (spans.gaps > self.clip)
            metrics["clipped"] = clipped.to(value.dtype)
        return metrics, {"teacher": torch.where(said.isnan(), said, 0.0)}


def _single(
    spans: Spans, targets: Tensor, number: Tensor, counts: Tensor, their_counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [N] which tokens are one token on both sides, and a row of the teacher for each."""
    if not len(spans.targets):
        return torch.zeros_like(targets, dtype=torch.bool), torch.zeros_like(targets)
    places = torch.arange(len(spans.teacher), device=targets.device)
    rows = torch.zeros_like(counts, dtype=torch.long).scatter_(0, spans.teacher, places)[number]
    alone = (counts[number] == 1) & (their_counts[number] == 1) & (spans.student >= 0)
    return alone & (spans.common.of_student[targets] == spans.targets[rows]), rows


def _over_common(log_q: Tensor, log_p: Tensor, common: CommonIds) -> tuple[Tensor, Tensor]:
    """Compare n tokens over the entries that both vocabularies have.

    Args:
        log_q: [n, V] of the student, with a gradient.
        log_p: [n, V'] of the teacher.
        common: the entries.

    Returns:
        [n] what has the gradient, of no use as a value; [n] the value in nats, without gradient.
    """
    if not common.all:
        log_q, log_p = log_q[:, common.student], log_p[:, common.teacher]
    q = log_q.exp()
    ratio = torch.where(q > 0, log_q - log_p, 0.0)
    mass = q.detach().sum(-1).clamp_min(torch.finfo(q.dtype).tiny)
    value = (q.detach() * ratio.detach()).sum(-1) / mass
    # d (q ratio - q) = q ratio d log q, entry by entry
    return (q * ratio - q).sum(-1) / mass, value
