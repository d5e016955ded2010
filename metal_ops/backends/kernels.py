"""Makes the ops of a kernel language's five functions over rows.

Shapes: N rows, V vocabulary, K kept entries. Kernels read float32, float16 or bfloat16 rows that
may be strided (the last dimension is contiguous), count in float32 and write in the dtype of `out`.
"""

from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metal_ops.backends.blocks import linear as from_hidden
from metal_ops.backends.blocks.linear import (
    BlockLoss,
    HardLabels,
    LossAndGradients,
    LossSettings,
    Needs,
    Projection,
)
from metal_ops.backends.blocks.rows import (
    AGREEMENT,
    CLIPPED,
    H_SUM,
    LOSS,
    NUM_STATS,
    NUM_VALUES,
    P_ENTROPY,
    P_LOG_SUM,
    Q_ENTROPY,
    Q_LOG_SUM,
    HardTerm,
    RowGradients,
    clip_tokens,
)
from metal_ops.backends.blocks.support import KeptEntries, category_loss, choose_entries
from metal_ops.spec import DivergenceSpec

__all__ = [
    "AGREEMENT",
    "CLIPPED",
    "H_SUM",
    "LOSS",
    "NUM_VALUES",
    "P_ENTROPY",
    "P_LOG_SUM",
    "Q_ENTROPY",
    "Q_LOG_SUM",
    "HardTerm",
    "Kernels",
    "backward",
    "forward",
    "hidden_states",
    "linear",
    "sparse",
    "unsupported",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Kernels(RowGradients, Protocol):
    """Lists what a backend implements. Nothing is read of a row that need not be."""

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        """Return [NUM_VALUES or more, N] float32 of the vocabulary, before token clips and scaling.

        What follows the NUM_VALUES rows is for the same backend's `backward`.

        LOSS is sum(f), H_SUM is sum(h) of `blocks.terms`, the log-sums are of logits / temperature.
        Rows whose weight [N] is 0 give zeros and are not read.
        """
        ...

    def log_sums(self, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-sum-exp of a row's logits / temperature, and that without the entries `ids`.

        Each is [N] float32, -inf for a sum of nothing. ids [N, K] int32 ascend; those of V and
        above, at the end, name no entry.
        """
        ...

    def spread(
        self, logits: Tensor, log_sum: Tensor, factor: Tensor, temperature: float, out: Tensor
    ) -> None:
        """Write factor * exp(logits / temperature - log_sum) to `out`; zeros where factor is 0.

        `out` [N, V] may be `logits`; log_sum and factor are [N] float32.
        """
        ...

    def hidden_states(
        self, student: Tensor, teacher: Tensor, weights: Tensor, kind: str, out: Tensor | None
    ) -> Tensor:
        """Compute the difference of hidden states [N, H], one dtype on both sides: [N] float32.

        "mse" is sum(d^2) / H with d = s - t. "cosine" is 1 - s.t / (a b) with a = max(|s|, 1e-8),
        b = max(|t|, 1e-8), by the formulas of `blocks.hidden`, which lose nothing where s and t
        agree. Where weights [N] are 0 the result is 0 and nothing is read. `out` [N, H] gets
        weights times the gradient for the student, zeros where the weight is 0.
        """
        ...


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Say why no kernel takes these tensors, or None."""
    for x in (student, teacher):
        if x.dtype not in DTYPES:
            return f"needs float32, float16 or bfloat16, got {x.dtype}"
    return None


def _one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype that holds both, with contiguous rows."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return _with_rows(student.to(dtype)), _with_rows(teacher.to(dtype))


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _log_probs(
    kernels: Kernels, logits: Tensor, kept: KeptEntries, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities, kept [N, K] and rest [N, 1], and log-sums [N], rest first."""
    log_sum, log_rest = kernels.log_sums(logits, kept.ascending, temperature)
    inside = logits.gather(-1, kept.ids).float().mul_(1 / temperature).sub_(log_sum[:, None])
    inside.masked_fill_(~kept.valid, -torch.inf)
    return inside, (log_rest - log_sum)[:, None], log_rest, log_sum


class _StudentSupport(NamedTuple):
    """Holds the student's side of a support."""

    logits: Tensor
    kept: KeptEntries
    log_probs: tuple[Tensor, Tensor, Tensor, Tensor]

    def weigh(
        self,
        kernels: Kernels,
        log_p: tuple[Tensor, Tensor],
        spec: DivergenceSpec,
        weight: Tensor,
        alpha: float,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, clipped) [N] to the teacher's log-probabilities; gradients go to `out`."""
        inside, tail, log_rest, log_all = self.log_probs
        factor, counts = weight * (alpha * spec.scale / spec.temperature), weight != 0
        weighed = category_loss(log_p, (inside, tail), spec, factor)
        if out is not None:
            log_sum = log_all if spec.missing == "zero" else log_rest
            outside = torch.zeros_like(weight)
            if weighed.outside is not None:
                outside = weighed.outside[:, 0]
            absent = factor == 0  # where the loss may be infinite
            outside = outside.masked_fill(absent | (log_sum == -torch.inf), 0.0)
            kernels.spread(self.logits, log_sum, outside, spec.temperature, out)
            gradient = weighed.inside.masked_fill(absent[:, None], 0.0).to(out.dtype)
            self.kept.put(out, gradient)
        clipped = torch.zeros_like(counts) if weighed.clipped is None else weighed.clipped
        return weighed.loss.masked_fill(~counts, 0.0), clipped & counts


def _divergence(
    kernels: Kernels,
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    weight: Tensor,
    out: Tensor | None,
    values: Tensor | None,
    alpha: float = 1.0,
    hard: HardTerm | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, clipped) [N]; the gradient of weight * alpha * loss goes to `out`.

    So does the hard term, if the support is full.
    """
    if spec.support != "full":
        ids = choose_entries(student, teacher, spec)
        kept = KeptEntries(ids, student.shape[-1])
        log_p = _log_probs(kernels, teacher, kept, spec.temperature)
        part = _StudentSupport(student, kept, _log_probs(kernels, student, kept, spec.temperature))
        return part.weigh(kernels, log_p[:2], spec, weight, alpha, out)
    assert values is not None
    loss, shrink, clipped = clip_tokens(values[LOSS], spec)
    if out is not None:
        factor = weight * (alpha * spec.scale / spec.temperature)
        factor = factor if shrink is None else factor * shrink
        kernels.backward(student, teacher, factor, values, spec, hard, out)
    return loss, values[CLIPPED] if clipped is None else clipped


def _stats(values: Tensor, clipped: Tensor) -> Tensor:
    """Return the statistics [NUM_STATS, N]."""
    return torch.cat([values[Q_ENTROPY : AGREEMENT + 1], clipped.to(values.dtype)[None]])


def forward(
    kernels: Kernels,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do `chunked.forward` by kernels."""
    dtype = student.dtype
    student, teacher = _one_dtype(student, teacher)
    weights = student.new_ones(len(student), dtype=torch.float32) if weights is None else weights
    weights = weights.float().contiguous()
    grad, values = None, None
    if want_grad:
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    if want_stats or spec.support == "full":
        values = kernels.forward(student, teacher, weights, spec)
    loss, clipped = _divergence(kernels, student, teacher, spec, weights, grad, values)
    stats = loss.new_zeros(NUM_STATS, 0)
    if want_stats:
        assert values is not None
        stats = _stats(values, clipped)
    return loss * spec.scale, stats, None if grad is None else grad.to(dtype)


def backward(
    kernels: Kernels, upstream: Tensor, student: Tensor, teacher: Tensor, spec: DivergenceSpec
) -> Tensor:
    """Do `chunked.backward` by kernels."""
    grad = forward(kernels, student, teacher, upstream, spec, True, False)[2]
    assert grad is not None
    return grad


def sparse(
    kernels: Kernels,
    student: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    spec: DivergenceSpec,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Do `chunked.sparse` by kernels."""
    ids, log_probs, log_tail = teacher
    student = _with_rows(student)
    weights = student.new_ones(len(student), dtype=torch.float32) if weights is None else weights
    out = None
    if want_grad:
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
    kept = KeptEntries(ids, student.shape[-1])
    log_p = log_probs.float().masked_fill(~kept.valid, -torch.inf), log_tail.float()[:, None]
    part = _StudentSupport(student, kept, _log_probs(kernels, student, kept, spec.temperature))
    loss, _ = part.weigh(kernels, log_p, spec, weights.float().contiguous(), 1.0, out)
    return loss * spec.scale, out


def hidden_states(
    kernels: Kernels,
    student: Tensor,
    teacher: Tensor,
    kind: str,
    weights: Tensor | None,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Do `chunked.hidden_states` by kernels."""
    dtype = student.dtype
    student, teacher = _one_dtype(student, teacher)
    weights = student.new_ones(len(student), dtype=torch.float32) if weights is None else weights
    out = None
    if want_grad:
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
    loss = kernels.hidden_states(student, teacher, weights.float().contiguous(), kind, out)
    return loss, None if out is None else out.to(dtype)


def _cross_entropy(
    kernels: Kernels, student: Tensor, hard: HardLabels, weight: Tensor
) -> tuple[Tensor, HardTerm]:
    """Return the cross-entropy [N] at temperature 1, and what its gradient needs."""
    assert hard.labels is not None
    nothing = hard.labels.new_empty(len(student), 0, dtype=torch.int32)
    log_sum, _ = kernels.log_sums(student, nothing, 1.0)
    at_label = student.gather(-1, hard.labels[:, None])[:, 0].float()
    return log_sum - at_label, HardTerm(hard.labels, log_sum, weight * (1 - hard.alpha))


def _make_block_loss(
    kernels: Kernels, settings: LossSettings, tokens: int
) -> tuple[int, BlockLoss]:
    """Take a whole chunk at a time."""
    heads, spec, want_grad, want_stats = settings
    full = spec.support == "full"

    def block_loss(logits: tuple[Tensor, Tensor], weight: Tensor, hard: HardLabels) -> Tensor:
        student, teacher = (head.finish(x) for head, x in zip(heads, logits, strict=True))
        two_parts = hard.labels is not None and not full  # of the gradient, added in float32
        if two_parts:
            student = student.float()
        student, teacher = _one_dtype(student, teacher)
        values = out = term = None
        if want_stats or full:
            values = kernels.forward(student, teacher, weight, spec)
        if want_grad:
            in_place = student is logits[0] and not two_parts
            out = logits[0] if in_place else torch.empty_like(student)
        cross_entropy = torch.zeros_like(weight)
        if hard.labels is not None:
            cross_entropy, term = _cross_entropy(kernels, student, hard, weight)
        soft, clipped = _divergence(
            kernels, student, teacher, spec, weight, out, values, hard.alpha, term
        )
        if out is not None and term is not None and two_parts:
            share = term.share[:, None]
            out.addcmul_(student.sub(term.log_sum[:, None]).exp_(), share)
            out.scatter_add_(-1, term.labels[:, None], -share)
        if out is not None and out is not logits[0]:
            heads[0].unfinish(out, student, logits[0])
        both = torch.stack([soft * spec.scale, cross_entropy])
        if values is None or not want_stats:
            return both
        return torch.cat([both, _stats(values, clipped)])

    return tokens, block_loss


def linear(
    kernels: Kernels,
    student: Projection,
    teacher: Projection | Tensor,
    weights: Tensor,
    hard: HardLabels,
    spec: DivergenceSpec,
    needs: Needs,
    want_stats: bool,
) -> LossAndGradients:
    """Do `chunked.linear`, the rows of a chunk by kernels.

    Tokens of weight 0 are projected like the others: to leave them out, the host would have to
    know how many there are, and wait for all that the device has to do before.
    """
    given = from_hidden.cleared(student, teacher, weights, hard)
    make_block_loss = partial(_make_block_loss, kernels)
    found = from_hidden.linear_of_all(*given, spec, needs, want_stats, make_block_loss)
    absent = weights == 0
    stats = found.stats.masked_fill(absent, 0.0) if want_stats else found.stats
    return found._replace(per_token=found.per_token.masked_fill(absent, 0.0), stats=stats)
