"""TAID, Temporally Adaptive Interpolated Distillation: the target moves to the teacher."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_distill.heads import Head, Signal
from hf_distill.losses.objective import Objective, Terms
from hf_distill.losses.tokens import wide
from metal_ops import weighted_divergence

TEACHER_KL = "taid_teacher_kl"


@torch.no_grad()
def taid_target(logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """(1 - t) * student + t * teacher, the logits of TAID's target, without gradient.

    Args:
        logits: [..., V], the student's.
        teacher_logits: [..., V], in any dtype.
        t: in [0, 1].

    Returns:
        [..., V] in float32 (float64 if one side is), and at the end points that side as it is. An
        entry that is -inf on one side is so in the target, but at the other side's end point.
    """
    if t == 0.0:
        return logits.detach()
    if t == 1.0:
        return teacher_logits
    return (1 - t) * wide(logits) + t * wide(teacher_logits)


@dataclass(frozen=True)
class TaidObjective(Objective):
    """An `Objective` whose soft loss is KL(p_t || q), a target between student and teacher.

    p_t = softmax(((1 - t) * student + t * teacher) / temperature) of the logits, the student's held
    constant, and q is the student. At t = 0 loss and gradient are zero, at t = 1 this is forward_kl
    to the teacher. The statistics are the teacher's, not the target's; `extra` holds what the soft
    loss would be at t = 1, [N], as "taid_teacher_kl".

    Args:
        spec: of kind "forward_kl".
        alpha: share of the divergence, in [0, 1].
        t: in [0, 1].

    Raises:
        ValueError: the kind is another one, or t is out of range.

    Source:
        Shing et al. 2025, arXiv:2501.16937: its J is this KL. The authors' release reports the
        cross-entropy with p_t, which has the same gradient.
    """

    t: float = 1.0
    extra_names: tuple[str, ...] = field(default=(TEACHER_KL,), init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        if self.spec.kind != "forward_kl":
            raise ValueError(f"taid needs divergence 'forward_kl', got {self.spec.kind!r}")
        if not 0.0 <= self.t <= 1.0:
            raise ValueError(f"the t of taid must be in [0, 1], got {self.t}")

    def from_hidden(
        self,
        hidden: Tensor,
        head: Head,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
    ) -> Terms:
        """As `Objective.from_hidden`; the logits of both sides exist a chunk of tokens at a time.

        Raises:
            ValueError: the teacher's signal is sparse.
        """
        _check_dense(teacher)
        if self.t == 1.0:
            return _at_end(
                super().from_hidden(hidden, head, teacher, targets, weights, hard_weights), weights
            )
        assert teacher.hidden is not None
        assert teacher.head is not None
        states, frozen = teacher.hidden, teacher.head.gathered()

        def part(at: slice) -> Signal:
            return Signal(hidden=states[at], head=frozen)

        hard_weights = weights if hard_weights is None else hard_weights
        return self._in_chunks(hidden, head, part, targets, weights, hard_weights)

    def from_logits(
        self,
        logits: Tensor,
        teacher: Signal,
        targets: Tensor,
        weights: Tensor,
        hard_weights: Tensor | None = None,
        hard_loss: Tensor | None = None,
    ) -> Terms:
        """As `Objective.from_logits`.

        Raises:
            ValueError: the teacher's signal is sparse.
        """
        _check_dense(teacher)
        with torch.no_grad():
            known = teacher.dense()
        scored = (targets, weights, hard_weights, hard_loss)
        if self.t == 1.0:
            return _at_end(super().from_logits(logits, Signal(logits=known), *scored), weights)
        target = Signal(logits=taid_target(logits, known, self.t))
        terms = super().from_logits(logits, target, *scored)
        at_end = weighted_divergence(logits.detach(), known, self.spec, weights=weights, stats=True)
        assert at_end.stats is not None
        stats = at_end.stats._replace(clipped=terms.stats.clipped)
        return terms._replace(stats=stats, extra=_extra(at_end.per_token, weights))


def _check_dense(teacher: Signal) -> None:
    if teacher.sparse is not None:
        raise ValueError(
            "taid mixes the logits of student and teacher, so it needs the teacher's logits or "
            f"hidden states; got {teacher.sparse.ids.shape[-1]} entries of the vocabulary"
        )


def _extra(per_token: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """A token that does not count has no value."""
    return {TEACHER_KL: torch.where(weights != 0, per_token, torch.nan)}


def _at_end(terms: Terms, weights: Tensor) -> Terms:
    return terms._replace(extra=_extra(terms.soft, weights))
