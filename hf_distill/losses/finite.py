"""Where a loss that is not a number comes from."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_distill.losses.base import Terms
from hf_distill.models.signals import Signal

BESIDE = ("hidden", "attention", "anchor", "aux")  # terms of a loss beside soft and hard


def not_finite(terms: Terms, teacher: Signal | None = None) -> FloatingPointError:
    """Return the error that says which side a loss that is not finite comes from.

    Args:
        terms: of the loss, which is NaN or infinite.
        teacher: what it said, to tell whose probability of 0 makes a divergence infinite.
    """
    named = list(_odd_sides(terms)) or [*_odd_soft(terms, teacher), *_odd_others(terms)]
    cause = " and ".join(named) or "the hard loss is not finite"
    return FloatingPointError(f"the loss must be finite, got {terms.loss.item()}: {cause}")


def _odd_sides(terms: Terms) -> Iterator[str]:
    for side in ("student", "teacher"):
        values = terms.evidence.get(side, terms.metrics.get(f"{side}_entropy"))
        bad = 0 if values is None else int((~torch.isfinite(values)).sum())
        if values is not None and bad:
            yield f"{side} logits are NaN at {bad} of {len(values)} tokens"


def _odd_soft(terms: Terms, teacher: Signal | None) -> Iterator[str]:
    """Yield what is wrong with the soft losses of tokens, if something is."""
    soft = terms.metrics.get("soft")
    if soft is None:
        return
    count, bad, infinite = len(soft), int(soft.isnan().sum()), int(soft.isinf().sum())
    built_in = bool(terms.evidence) or "teacher_entropy" in terms.metrics
    if built_in and infinite:
        why = _why_infinite(soft, teacher)
        yield f"the divergence is infinite at {infinite} of {count} tokens ({why})"
    elif built_in and bad:
        why = "neither side is NaN: the entries that are read have no mass, 0 / 0"
        yield f"the divergence is NaN at {bad} of {count} tokens ({why})"
    else:
        kinds = (("NaN", bad), ("infinite", infinite))
        for kind, odd in kinds:
            if odd:
                yield f"the soft loss is {kind} at {odd} of {count} tokens"


def _why_infinite(soft: Tensor, teacher: Signal | None) -> str:
    """Say whose probability is 0 at the first token of an infinite divergence."""
    at = int(soft.isinf().nonzero()[0, 0])
    if teacher is None or _gives_zero(teacher.rows(slice(at, at + 1))):
        return "the teacher gives a token probability 0"
    return (
        "the student gives a token probability 0, or one so small that the loss overflows, and the "
        "teacher does not; clip bounds the loss of a token"
    )


def _gives_zero(teacher: Signal) -> bool:
    if teacher.hidden is not None and teacher.head is None:  # the student's
        return False
    if teacher.sparse is None:
        return bool((teacher.dense() == -torch.inf).any())
    known = teacher.sparse
    kept = (known.log_probs == -torch.inf) & (known.ids >= 0)
    return bool(kept.any()) or bool((known.log_tail == -torch.inf).any())


def _odd_others(terms: Terms) -> Iterator[str]:
    """Yield other parts of the loss that are not finite."""
    values = {**terms.metrics, **terms.others}
    for name in BESIDE:
        bad = int((~values[name].isfinite()).sum()) if name in values else 0
        if bad:
            yield f"the loss {name!r} is not finite at {bad} of {len(values[name])} tokens"
    hard = values.get("hard")
    infinite = 0 if hard is None else int(hard.isinf().sum())
    if hard is not None and infinite:
        why = "the student gives a label probability 0"
        yield f"the cross-entropy is infinite at {infinite} of {len(hard)} tokens ({why})"
