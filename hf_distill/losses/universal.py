"""Universal logit distillation: a loss between models with different vocabularies.

With q the student's probabilities of the next token and p the teacher's, each sorted by size and
the shorter one followed by zeros, a token's loss is

    sum_i |q_(i) - p_(i)|

This is the Wasserstein distance of the two where moving mass between any two entries costs the
same: it compares how sure the models are, not of what. It lies in [0, 2], and is 0 for any two
distributions with the same sorted values, also where they mean different tokens; the cross-entropy
beside it says which token is meant.

The paper adds lambda (1.5) times this to the cross-entropy. Here alpha * soft + (1 - alpha) * hard
is the same up to a factor: lambda = alpha * scale / (1 - alpha), where scale is the temperature
scaling, so that alpha = 0.6 without scaling is lambda = 1.5. Two more differences: the release of
the paper takes the mean over the compared tokens of a row and then over the rows of a micro-batch;
here the sum over tokens is divided by the number of labelled tokens of the whole optimizer step, so
that a token counts alike in short and long rows and in any micro-batch. The student's tokens
without a teacher's beside them are among those.

Temperatures above 1 take more from this loss than from a KL divergence. Both sides go towards
uniform, and where the student's vocabulary is the smaller one its sorted probabilities are then all
above the teacher's: the gradient is 0, whatever the logits. With random logits of 49,152 and
151,936 entries (standard deviations 3 and 4) its norm at temperature 2, 4 and 8 is 6 %, 0.2 % and
0.02 % of that at 1, and 0 at 16. With equal vocabularies it falls as 1 / T at large T, not as
1 / T² like that of a KL divergence, so that "t2" raises its share. The release has 1.

Source:
    N. Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
    for LLMs", arXiv:2402.12030, and its release, github.com/Nicolas-BZRD/llm-recipes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.heads import Head, Signal
from hf_distill.losses import tokens
from hf_distill.losses.objective import Terms, hard_sum, mixed
from metal_ops import DivergenceSpec, DivergenceStats, reference
from metal_ops.functional import gather_shards

UNIVERSAL = "uld"


class _Beside(NamedTuple):
    """The teacher beside the student's tokens.

    spoken [N] bool: the tokens that it says something of. logits: from a slice of the N tokens to
    [n, V of the teacher], anything where it says nothing. vocab: that V.
    """

    spoken: Tensor
    logits: Callable[[slice], Tensor]
    vocab: int


def _beside(teacher: Signal, num_tokens: int, device: torch.device) -> _Beside:
    """A signal about some of the N tokens, token by token.

    Raises:
        ValueError: it is sparse, or is about no token at all.
    """
    if teacher.sparse is not None:
        raise ValueError(
            f"divergence {UNIVERSAL!r} sorts the teacher's whole distribution, a sparse signal "
            f"knows {teacher.sparse.ids.shape[-1]} entries of it"
        )
    said = teacher.logits if teacher.hidden is None else teacher.hidden
    assert said is not None
    spoken = teacher.paired
    if spoken is None:
        spoken = torch.ones(num_tokens, dtype=torch.bool, device=device)
    if num_tokens and not len(said):
        raise ValueError(f"the teacher must speak of one of {num_tokens} scored tokens, got none")
    # a gather needs no waiting for the device to know how many tokens of a chunk are spoken of
    places = (spoken.cumsum(0) - 1).clamp_min(0)
    head = teacher.head
    if head is None:
        return _Beside(spoken, lambda at: said[places[at]], said.shape[-1])
    weight, bias = gather_shards(head.weight).detach(), head.bias
    bias = None if bias is None else gather_shards(bias).detach()

    def project(at: slice) -> Tensor:
        return reference.head(said[places[at]], weight, bias, head.logit_scale, head.softcap)

    return _Beside(spoken, project, len(weight))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(tokens.wide(logits) / temperature, dim=-1)


def _entropy(log_probs: Tensor) -> Tensor:
    """[n] nats; an entry of probability 0 adds nothing."""
    log_probs = log_probs.detach()
    probs = log_probs.exp()
    return -(probs * torch.where(probs > 0, log_probs, probs)).sum(-1)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """The L1 distance of two tables of probabilities, each row sorted by size.

    Args:
        q: [N, V], with a gradient if it has one: that of each entry goes to the entry it was
            before the sorting.
        p: [N, another V].

    Returns:
        [N], in [0, 2].
    """
    q, p = (x.sort(dim=-1, descending=True).values for x in (q, p))
    width = min(q.shape[-1], p.shape[-1])
    both = (q[:, :width] - p[:, :width]).abs().sum(-1)
    return both + q[:, width:].sum(-1) + p[:, width:].sum(-1)


@dataclass(frozen=True)
class UniversalObjective:
    """alpha * soft + (1 - alpha) * hard: universal logit distillation, and cross-entropy.

    The teacher's vocabulary need not be the student's, and it need not speak of all scored tokens
    (`Signal.paired`): the others have soft loss 0. `teacher_entropy` and `paired`, the share of the
    scored tokens that have a soft loss, are means of their own.

    Args:
        alpha: share of the soft loss, in [0, 1].
        temperature: of both sides in it, > 0.
        temperature_scaling: "t2" multiplies it by temperature², "none" does not.
        measures_hard: as in `Objective`.

    Raises:
        ValueError: a value is out of range.
    """

    alpha: float
    temperature: float = 1.0
    temperature_scaling: str = "none"
    measures_hard: bool = field(default=False, kw_only=True)

    extra_names = ("teacher_entropy", "paired")

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        self._spec()

    @property
    def _reads_hard(self) -> bool:
        return self.alpha < 1.0 or self.measures_hard

    def _spec(self) -> DivergenceSpec:
        """A spec with the same temperature and scaling: it has the checks."""
        return DivergenceSpec("tvd", 0.5, self.temperature, self.temperature_scaling)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Metrics of single tokens that this loss does not compute."""
        hard = () if self._reads_hard else ("hard",)
        return (*hard, "clipped", "top1_agreement", "teacher_entropy")

    def _soft(
        self, logits: Tensor, beside: _Beside, at: slice, weights: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The weighted sum [] of a chunk, and soft and both entropies per token."""
        log_q = _log_softmax(logits, self.temperature)
        with torch.no_grad():
            log_p = _log_softmax(beside.logits(at), self.temperature).to(log_q.dtype)
        spoken = beside.spoken[at]
        value = self._spec().scale * sorted_distance(log_q.exp(), log_p.exp())
        value = torch.where(spoken, value, 0.0)
        teacher_entropy = torch.where(spoken, _entropy(log_p), 0.0)
        return (weights[at] * value).sum(), (value.detach(), _entropy(log_q), teacher_entropy)

    @staticmethod
    def _terms(loss: Tensor, values: Tensor, hard: Tensor, weights: Tensor, on: Tensor) -> Terms:
        soft, student_entropy, teacher_entropy = values
        zero = torch.zeros_like(soft)
        stats = DivergenceStats(student_entropy, teacher_entropy, zero, zero)
        # NaN: does not count
        extra = {
            "teacher_entropy": torch.where(on & (weights != 0), teacher_entropy, torch.nan),
            "paired": torch.where(weights != 0, on.to(soft.dtype), torch.nan),
        }
        return Terms(loss, soft, hard, stats, extra)

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
            ValueError: the teacher's signal is sparse, or about no token.
        """
        hard_weights = weights if hard_weights is None else hard_weights
        beside = _beside(teacher, len(hidden), hidden.device)

        def piece(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            loss, rows = self._soft(logits, beside, at, weights)
            hard = torch.zeros_like(rows[0])
            if self._reads_hard:
                hard = -tokens.gathered(logits, targets[at])
                loss = mixed(self.alpha, loss, (hard_weights[at] * hard).sum())
            return loss, torch.stack([*rows, hard.detach()])

        largest = torch.maximum(weights.abs(), hard_weights.abs())
        width = max(len(head.weight), beside.vocab)
        loss, values = tokens.sum_over_chunks(hidden, head, piece, largest, width)
        values = values if values.numel() else values.new_zeros(4, 0)
        return self._terms(loss, values[:3], values[3], hard_weights, beside.spoken)

    def from_logits(
        self,
        logits: Tensor,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
        hard_loss: Tensor | None = None,
    ) -> Terms:
        """Terms of N tokens from logits [N, V], as `Objective.from_logits`.

        Sorted and soft-maxed copies are made of a chunk of tokens at a time.
        """
        hard_weights = weights if hard_weights is None else hard_weights
        beside = _beside(teacher, len(logits), logits.device)

        def piece(part: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            loss, rows = self._soft(part, beside, at, weights)
            return loss, torch.stack(rows)

        width = max(logits.shape[-1], beside.vocab)
        loss, values = tokens.sum_over_chunks(logits, None, piece, weights, width)
        values = values if values.numel() else values.new_zeros(3, 0)
        hard = torch.zeros_like(values[0])
        if self._reads_hard:
            hard_part, hard = hard_sum(logits, targets, hard_weights, hard_loss)
            loss = mixed(self.alpha, loss, hard_part)
        return self._terms(loss, values, hard, hard_weights, beside.spoken)
