"""The contract of `kernels.Kernels` in PyTorch: tests what the kernel backends share."""

import sys

import torch
from torch import Tensor

from metal_ops import DivergenceSpec
from metal_ops.backends import kernels
from metal_ops.backends.blocks.hidden import compare_hidden_states
from metal_ops.backends.blocks.rows import exact_loss
from metal_ops.backends.blocks.terms import Mix, Probabilities, terms
from metal_ops.backends.kernels import HardTerm


def _row(
    student: Tensor, teacher: Tensor, spec: DivergenceSpec
) -> tuple[Probabilities, Tensor, Tensor]:
    x, y = (z.float() / spec.temperature for z in (student, teacher))
    x_sum, y_sum = x.logsumexp(-1, keepdim=True), y.logsumexp(-1, keepdim=True)
    log_q, log_p = x - x_sum, y - y_sum
    absent = (log_p == -torch.inf) & (log_q == -torch.inf)
    shift = y.amax(-1, keepdim=True) - x.amax(-1, keepdim=True)
    ratio = (y - x - shift).sub_(y_sum - x_sum - shift).masked_fill(absent, 0.0)
    return Probabilities(log_p.exp(), log_q.exp(), log_q, ratio), x_sum, y_sum


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


class Torch:
    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        row, x_sum, y_sum = _row(student, teacher, spec)
        whole = exact_loss(row, spec)
        tops = [(x == x.amax(-1, keepdim=True)) for x in (student, teacher)]
        clipped = torch.zeros_like(weights) if whole.clipped is None else whole.clipped.float()
        values = [
            whole.loss,
            whole.h_sum[:, 0],
            x_sum[:, 0],
            y_sum[:, 0],
            _entropy(row.q),
            _entropy(row.p),
            (tops[0] & tops[1]).any(-1).float(),
            clipped,
        ]
        return torch.stack(values).masked_fill(weights == 0, 0.0)

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        factor: Tensor,
        values: Tensor,
        spec: DivergenceSpec,
        hard: HardTerm | None,
        out: Tensor,
    ) -> None:
        row, _, _ = _row(student, teacher, spec)
        bound = spec.clip if spec.clip_level == "vocab_entry" else None
        f, _, h = terms(row, spec.kind, Mix.of(spec), bound is not None)
        if bound is not None:
            h = h.masked_fill(f > bound, 0.0)
        grad = (h - row.q * values[kernels.H_SUM][:, None]) * factor[:, None]
        grad = grad.masked_fill(factor[:, None] == 0, 0.0)
        if hard is not None:
            q = (student.float() - hard.log_sum[:, None]).exp()
            q.scatter_add_(-1, hard.labels[:, None], -torch.ones_like(q[:, :1]))
            grad += q.mul_(hard.share[:, None]).masked_fill(hard.share[:, None] == 0, 0.0)
        out.copy_(grad)

    def log_sums(self, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        x = logits.float() / temperature
        padded = torch.nn.functional.pad(x, (0, 1))
        last = ids.long().clamp_max(logits.shape[-1])
        return x.logsumexp(-1), padded.scatter(-1, last, -torch.inf)[:, :-1].logsumexp(-1)

    def spread(
        self, logits: Tensor, log_sum: Tensor, factor: Tensor, temperature: float, out: Tensor
    ) -> None:
        e = (logits.float() / temperature - log_sum[:, None]).exp() * factor[:, None]
        out.copy_(e.masked_fill(factor[:, None] == 0, 0.0))

    def hidden_states(
        self, student: Tensor, teacher: Tensor, weights: Tensor, kind: str, out: Tensor | None
    ) -> Tensor:
        absent = weights == 0
        loss, grad = compare_hidden_states(student.float(), teacher.float(), kind, weights)
        if out is not None:
            out.copy_(grad.masked_fill(absent[:, None], 0.0))
        return loss.masked_fill(absent, 0.0)


KERNELS = Torch()


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    return kernels.unsupported(student, teacher)


def forward(*args):
    return kernels.forward(KERNELS, *args)


def backward(*args):
    return kernels.backward(KERNELS, *args)


def sparse(*args):
    return kernels.sparse(KERNELS, *args)


def hidden_states(*args):
    return kernels.hidden_states(KERNELS, *args)


def linear(*args):
    return kernels.linear(KERNELS, *args)


MODULE = sys.modules[__name__]
