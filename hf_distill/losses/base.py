"""A micro-batch's part of the loss of an optimizer step: soft, hard, reused tokens, anchor."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_distill.data import sides
from hf_distill.losses import chunks
from hf_distill.losses.divergence import Terms
from hf_distill.losses.student import AnyObjective, Student
from hf_distill.models.forward import Reader, evaluating
from hf_distill.models.signals import Head, Signal
from hf_distill.models.structure import unwrap

IMPORTANCE_NAMES = ("importance_ratio", "importance_clipped")
ANCHOR_NAME = "anchor"


class Importance(NamedTuple):
    """What corrects for a student that has moved since it sampled the tokens.

    behaviour [N]: the log-probability of each token under the student that sampled it, at
    temperature 1; NaN where it is not known. clip: the largest ratio, > 0.
    """

    behaviour: Tensor
    clip: float


class Anchor(NamedTuple):
    """M tokens of supervised training beside the others: targets [M] int64, weights [M]."""

    targets: Tensor
    weights: Tensor


class Scored(NamedTuple):
    """The N tokens that are compared with the teacher: targets [N] int64, weights [N].

    The weights make a sum over tokens the mean over an optimizer step. The anchor's tokens, if
    there are some, come behind these in what the student says.
    """

    targets: Tensor
    weights: Tensor
    importance: Importance | None = None
    anchor: Anchor | None = None


def _importance(student: Student, scored: Scored) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights [N] of the soft term, and what is logged of the ratios.

    Truncated importance sampling: a token's soft term counts min(q(y) / q_behaviour(y), clip)
    times, held constant. Both are read at temperature 1, like the student in the hard loss,
    whatever the temperature of sampling: the ratio is that of the student's own movement, and 1
    while it has not moved.
    """
    if scored.importance is None:
        return scored.weights, {}
    behaviour, clip = scored.importance
    known = ~behaviour.isnan()
    ratio = (student.log_probs(scored.targets) - behaviour).exp()
    used = torch.where(known, ratio.clamp(max=clip), 1.0)
    # a NaN is no value: the tokens of which nothing is known, or that do not count
    counts = known & (scored.weights != 0)
    extra: dict[str, Tensor] = {}
    for name, value in zip(IMPORTANCE_NAMES, (ratio, (ratio > clip).to(ratio.dtype)), strict=True):
        extra[name] = torch.where(counts, value, torch.nan)
    return scored.weights * used.to(scored.weights.dtype), extra


def step_terms(
    student: Student,
    objective: AnyObjective,
    teacher: Signal,
    scored: Scored,
) -> Terms:
    """The terms of a micro-batch.

    Args:
        student: what it says of the N scored tokens, and behind them of the anchor's M.
        objective: soft and hard loss.
        teacher: its signal at the N tokens.
        scored: the tokens and their weights.
    """
    anchor = scored.anchor
    if anchor is None:
        return _compared(student, objective, teacher, scored)
    student, supervised = student.split([len(scored.targets), len(anchor.targets)])
    terms = _compared(student, objective, teacher, scored)
    loss, per_token = supervised.cross_entropy(anchor.targets, anchor.weights)
    return terms._replace(
        loss=terms.loss + loss, extra={**terms.extra, ANCHOR_NAME: per_token.detach()}
    )


def _compared(
    student: Student,
    objective: AnyObjective,
    teacher: Signal,
    scored: Scored,
) -> Terms:
    weights, extra = _importance(student, scored)
    terms = student.terms(objective, teacher, scored.targets, weights, scored.weights)
    return terms._replace(extra={**terms.extra, **extra})


@torch.no_grad()
def behaviour_log_probs(reader: Reader, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of a batch's scored tokens under the student as it is now.

    For completions that are used for several optimizer steps: called once behind the rollout, on
    the batch as it will be trained on (the same rows, padded alike), its result goes into the batch
    as `behaviour_log_probs`.

    Args:
        reader: of the student.
        model: the student, wrapped or not; it is read in eval mode and is then as before.
        batch: with labels [B, T].

    Returns:
        [B, T] float32 (float64 for float64 models), aligned with the labels: at each scored token
        its log-probability at temperature 1 in nats; NaN elsewhere.
    """
    side = sides.student_side(batch)
    targets = sides.targets(batch["labels"], side.predicts)
    model = unwrap(model)

    def read(hidden: Tensor, head: Head) -> Tensor:
        return chunks.log_probs(hidden, head, targets)

    with evaluating(model):
        if reader.reads_hidden(model, side.inputs):
            found = reader.at_head(model, side, read)
        else:
            found = chunks.gathered(reader.logits(model, side), targets)
    result = torch.full(side.predicts.shape, torch.nan, dtype=found.dtype, device=found.device)
    result[:, 1:][side.predicts[:, :-1]] = found
    return result
