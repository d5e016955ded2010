"""The auxiliary loss of a mixture of experts, beside the loss of tokens.

Shapes: N scored tokens.
"""

from hf_distill.losses.base import ROUTER_NAMES, Terms, Tokens
from hf_distill.models.routers import RouterWatcher, expert_agreement
from hf_distill.models.signals import Signal

AUX, AGREEMENT = ROUTER_NAMES


def add_router_loss(
    terms: Terms, routers: RouterWatcher, teacher: Signal, tokens: Tokens, num_batches: int | None
) -> Terms:
    """Add the student's auxiliary loss to the terms, and what its routers have in common.

    The loss of an optimizer step has the mean over its micro-batches and processes, times the
    model's coefficient, as a term of its own that no alpha scales.

    Args:
        terms: of a micro-batch.
        routers: of the student, after its forward.
        teacher: what it says, with its experts if it has some.
        tokens: the scored ones.
        num_batches: micro-batches of the optimizer step; None is an evaluation, whose loss is a
            mean over tokens.
    """
    count = len(tokens.targets)
    metrics, others = dict(terms.metrics), dict(terms.others)
    if routers.experts is not None and teacher.experts is not None and teacher.paired is None:
        own = routers.experts._replace(chosen=routers.experts.chosen[:, :count])
        shares = expert_agreement(own, teacher.experts)
        if shares is not None:
            metrics[AGREEMENT] = shares
    if routers.aux is None:
        return terms._replace(metrics=metrics)
    aux = routers.aux.to(terms.loss.device)
    if num_batches is None:
        metrics[AUX] = aux.detach().expand(count)
    else:
        others[AUX] = aux.detach()[None]
    part = routers.coefficient * aux / (num_batches or 1)
    return terms._replace(loss=terms.loss + part, metrics=metrics, others=others)
