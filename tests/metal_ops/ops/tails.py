"""Teachers of which a few entries are known and draws from the rest, made from dense ones."""

import math

import torch
from torch import Tensor

from metal_ops import PowerSums, SparseTeacher, TailSamples, reference


def split(teacher: Tensor, top_k: int, temperature: float) -> tuple[Tensor, SparseTeacher, Tensor]:
    """(log-probabilities [N, V], what is known of them, log-shares of the tail [N, V])."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_probs, ids = log_p.topk(top_k)
    tail = log_p.scatter(-1, ids, -math.inf)
    log_tail = tail.logsumexp(-1)
    known = SparseTeacher(ids, log_probs, log_tail, temperature)
    return log_p, known, tail - log_tail[:, None]


def draw(log_p: Tensor, proposal: Tensor, num_draws: int) -> TailSamples:
    """Independent draws [N, n] by log-probabilities [N, V]."""
    ids = torch.multinomial(proposal.exp(), num_draws, replacement=True)
    log_weights = -math.log(num_draws) - proposal.gather(-1, ids)
    return TailSamples(ids, log_p.gather(-1, ids), log_weights)


def sampled(
    teacher: Tensor, top_k: int, num_draws: int, temperature: float, flat: float = 1.0
) -> SparseTeacher:
    """The top_k entries and draws by the tail to the power `flat`."""
    log_p, known, shares = split(teacher, top_k, temperature)
    return known._replace(samples=draw(log_p, (flat * shares).log_softmax(-1), num_draws))


def all_drawn(teacher: Tensor, top_k: int, temperature: float) -> SparseTeacher:
    """Every entry of the tail once, with the weight of a sum: no noise is left."""
    log_p, known, _ = split(teacher, top_k, temperature)
    order = log_p.sort(dim=-1, descending=True).indices[:, top_k:]
    samples = TailSamples(
        order, log_p.gather(-1, order), torch.zeros_like(order, dtype=log_p.dtype)
    )
    return known._replace(samples=samples)


def with_powers(teacher: Tensor, known: SparseTeacher, orders: tuple[float, ...]) -> SparseTeacher:
    """Its power sums over all that is not known."""
    log_p = (teacher / known.temperature).log_softmax(-1)
    tail = log_p.scatter(-1, known.ids, -math.inf)
    log_sums = torch.stack([(a * tail).logsumexp(-1) for a in orders], dim=-1)
    num_tail = (tail > -math.inf).sum(-1)
    return known._replace(powers=PowerSums(orders, log_sums, num_tail, (0.5, 4.0)))


def by_reference(student: Tensor, teacher: SparseTeacher, spec, max_ratio: float) -> Tensor:
    """The definition: the tail as one category, and the correction; no clip."""
    assert teacher.samples is not None
    samples = teacher.samples.ids, teacher.samples.log_probs, teacher.samples.log_weights
    known = teacher.ids, teacher.log_probs, teacher.log_tail
    bucket = reference.sparse_divergence(student, *known, spec)
    return bucket + reference.tail_correction(
        student, teacher.ids, teacher.log_tail, samples, spec, max_ratio
    )
