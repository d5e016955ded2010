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

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.base import Loss, Terms, Tokens
from hf_distill.losses.entropy import entropies
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec

UNIVERSAL = "uld"


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """Return the L1 distance of two tables of probabilities, each row sorted by size.

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
class CrossTokenizerLoss(Loss):
    """Computes alpha * soft + (1 - alpha) * hard: universal logit distillation, cross-entropy.

    The teacher's vocabulary need not be the student's, and it need not speak of all scored tokens
    (`Signal.paired`): the others have soft loss 0. `teacher_entropy` and `paired`, the share of the
    scored tokens that have a soft loss, are means of their own.

    Args:
        alpha: share of the soft loss, in [0, 1].
        temperature: of both sides in it, > 0.
        temperature_scaling: "t2" multiplies it by temperature², "none" does not.
        measures_hard: as in `Loss`.

    Raises:
        ValueError: a value is out of range.
    """

    of_tokens: ClassVar[bool] = True
    copies_logits: ClassVar[bool] = False

    alpha: float = 1.0
    temperature: float = 1.0
    temperature_scaling: str = "none"
    measures_hard: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        self._spec()

    def _spec(self) -> DivergenceSpec:
        """Make a spec with the same temperature and scaling: it has the checks."""
        return DivergenceSpec("tvd", 0.5, self.temperature, self.temperature_scaling)

    def check_signal(self, teacher: Signal, num_tokens: int) -> None:
        """Check what the teacher says of N tokens.

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
        if num_tokens and not len(said):
            raise ValueError(
                f"the teacher must speak of one of {num_tokens} scored tokens, got none"
            )

    def soft(self, logits: Tensor, teacher: Signal, tokens: Tokens) -> Terms:
        """Compute the distance of n tokens' sorted probabilities."""
        log_q = chunks.log_softmax(logits, self.temperature)
        with torch.no_grad():
            log_p = chunks.log_softmax(teacher.dense(), self.temperature).to(log_q.dtype)
        value = self._spec().scale * sorted_distance(log_q.exp(), log_p.exp())
        teacher_entropy, paired = entropies(log_p), torch.ones_like(value.detach())
        evidence = {}
        if teacher.paired is not None:
            value = torch.where(teacher.paired, value, 0.0)
            evidence["teacher"] = torch.where(teacher.paired, teacher_entropy, 0.0)
            teacher_entropy = torch.where(teacher.paired, teacher_entropy, torch.nan)
            paired = teacher.paired.to(value.dtype)
        metrics = {
            "soft": value.detach(),
            "student_entropy": entropies(log_q),
            "teacher_entropy": teacher_entropy,
            "paired": paired,
        }
        return Terms((tokens.soft_weights * value).sum(), metrics, evidence)
