"""What surrounds the loss of the tokens: corrections of their weights, and an anchor's tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.losses import chunks
from hf_distill.losses.base import ANCHOR_NAME, IMPORTANCE_NAMES, Terms, Tokens
from hf_distill.losses.contrast import CONTRAST_NAME, ContrastWeights, contrast_factors
from hf_distill.losses.divergence import DivergenceLoss
from hf_distill.losses.drift import DRIFT_NAME, drift_factors
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec


def _corrected(student: Signal, tokens: Tokens) -> tuple[Tokens, dict[str, Tensor]]:
    """Return the tokens with weights of the soft loss, and what is logged of the ratios.

    Truncated importance sampling: a token's soft term counts min(q(y) / q_behaviour(y), clip)
    times, held constant. Both are read at temperature 1, like the student in the hard loss,
    whatever the temperature of sampling: the ratio is that of the student's own movement, and 1
    while it has not moved.
    """
    if tokens.importance is None:
        return tokens, {}
    behaviour, clip = tokens.importance
    known = ~behaviour.isnan()
    present = chunks.log_probs(student, tokens.targets)
    # two probabilities of 0 are no movement; a ratio that overflows is the largest there is
    moved = torch.where(present == behaviour, 0.0, present - behaviour)
    ratio = moved.exp().clamp(max=torch.finfo(moved.dtype).max)
    used = torch.where(known, ratio.clamp(max=clip), 1.0)
    # a NaN is no value: the tokens of which nothing is known, or that do not count
    counts = known & (tokens.weights != 0)
    metrics: dict[str, Tensor] = {}
    for name, value in zip(IMPORTANCE_NAMES, (ratio, (ratio > clip).to(ratio.dtype)), strict=True):
        metrics[name] = torch.where(counts, value, torch.nan)
    return tokens._replace(corrected=tokens.weights * used.to(tokens.weights.dtype)), metrics


BASE_KL, BASE_KL_NAME = DivergenceLoss(DivergenceSpec("reverse_kl")), "base_kl"

TokenLoss = Callable[[Signal, Signal, Tokens], Terms]


def _factors(
    student: Signal, teacher: Signal, tokens: Tokens, contrast: ContrastWeights | None
) -> dict[str, Tensor]:
    """Return, by name, factors [N] of the soft loss that depend on what both sides say."""
    found: dict[str, Tensor] = {}
    if tokens.drift is not None:
        found[DRIFT_NAME] = drift_factors(tokens.drift, student, teacher, tokens.targets)
    if contrast is not None and teacher.contrast is not None:
        found[CONTRAST_NAME] = contrast_factors(contrast, teacher, tokens.targets)
    return found


def step_terms(
    loss: TokenLoss,
    student: Signal,
    teacher: Signal,
    tokens: Tokens,
    contrast: ContrastWeights | None = None,
    base_kl_weight: float = 0.0,
) -> Terms:
    """Compute the terms of a micro-batch, with what surrounds the loss of its tokens.

    Args:
        loss: a `Loss`, or a function like one.
        student: what it says of the N scored tokens, and behind them of the anchor's M.
        teacher: what it says of the N tokens.
        tokens: the tokens and their weights.
        contrast: how tokens are weighed by the teacher's second context, if it has read one.
        base_kl_weight: of KL(student || base), where the teacher's signal has a base.

    Raises:
        ValueError: the teacher's signal is about another number of tokens.
        TypeError: the loss returns something else than `Terms`.
    """
    anchor, supervised = tokens.anchor, None
    if teacher.paired is None and len(teacher) != len(tokens.targets):
        raise ValueError(
            f"the teacher's signal must have a row for each of {len(tokens.targets)} scored tokens "
            f"(outputs[side.predicts]), got {len(teacher)}"
        )
    if anchor is not None:
        student, supervised = student.split([len(tokens.targets), len(anchor.targets)])
    tokens, metrics = _corrected(student, tokens)
    for name, factor in _factors(student, teacher, tokens, contrast).items():
        corrected = tokens.soft_weights * factor.to(tokens.weights.dtype)
        tokens, metrics = tokens._replace(corrected=corrected), {**metrics, name: factor}
    terms = loss(student, teacher, tokens)
    if not isinstance(terms, Terms):
        raise TypeError(f"a loss of tokens must return Terms, got a {type(terms).__name__}")
    if base_kl_weight > 0 and teacher.base is not None:
        stays = BASE_KL(student, teacher.base, Tokens(tokens.targets, tokens.weights))
        terms = terms._replace(loss=terms.loss + base_kl_weight * stays.loss)
        metrics = {**metrics, BASE_KL_NAME: stays.metrics["soft"]}
    if metrics:
        terms = terms._replace(metrics={**terms.metrics, **metrics})
    if anchor is None or supervised is None:
        return terms
    anchor_loss, per_token = chunks.cross_entropy(supervised, anchor.targets, anchor.weights)
    others = {**terms.others, ANCHOR_NAME: per_token.detach()}
    return terms._replace(loss=terms.loss + anchor_loss, others=others)
