"""One block of rows: what every divergence shares. Loading, exact terms, clips, statistics."""

from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops.backends import _terms
from metal_ops.backends._terms import MIXTURES, Row
from metal_ops.spec import DivergenceSpec

NUM_BUFFERS = 5
NUM_STATS = 4  # student entropy, teacher entropy, top-1 agreement, clipped


class Buffers(NamedTuple):
    """Scratch of [rows, V] each, for one block after the other."""

    log_q: Tensor
    log_p: Tensor
    q: Tensor
    p: Tensor
    spare: Tensor

    @staticmethod
    def of(like: Tensor, rows: int, vocab: int) -> "Buffers":
        """Buffers for blocks of up to `rows` rows, in the precision the op computes `like` in."""
        dtype = accumulator(like)
        return Buffers(*like.new_empty(NUM_BUFFERS, rows, vocab, dtype=dtype).unbind(0))

    def first(self, rows: int) -> "Buffers":
        """The same memory for a block of `rows` rows."""
        return Buffers(*(x[:rows] for x in self))


def accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: what sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Loaded(NamedTuple):
    """Buffers in which q and p await division by their sums, and the logs subtraction of theirs."""

    buffers: Buffers
    q_sum: Tensor  # [rows, 1]
    p_sum: Tensor

    def pick(self, index: Tensor, kind: str) -> Row:
        """The rows of `index` ([n] int64), normalised; without logs for kinds that need none."""
        q_sum, p_sum = self.q_sum[index], self.p_sum[index]
        q, p = self.buffers.q[index].div_(q_sum), self.buffers.p[index].div_(p_sum)
        if kind in MIXTURES:
            return Row(p, q, p[:0], q[:0])
        log_q, ratio = self.buffers.log_q[index], self.buffers.log_p[index]
        # each is a logit less the row's largest: the large parts cancel first
        ratio.sub_(log_q).sub_((p_sum / q_sum).log_())
        ratio.masked_fill_((p == 0) & (q == 0), 0.0)
        return Row(p, q, log_q.sub_(q_sum.log()), ratio)


def load(x: Tensor, temperature: float, log_e: Tensor, e: Tensor) -> Tensor:
    """log_e = (x - max x) / temperature and e = exp(log_e); returns the sum of e, [rows, 1]."""
    largest = x.amax(-1, keepdim=True)
    if x.dtype != log_e.dtype:
        e.copy_(x)
        x, largest = e, largest.to(e.dtype)
    torch.sub(x, largest, out=log_e)
    if temperature != 1.0:
        log_e.mul_(1 / temperature)
    torch.exp(log_e, out=e)
    return e.sum(-1, keepdim=True)


class Exact(NamedTuple):
    """A block by `_terms`: loss, and whether an entry was clipped, [rows]; sum of h [rows, 1]."""

    loss: Tensor
    clipped: Tensor | None
    h_sum: Tensor
    gradient: Tensor  # h - q h_sum, [rows, V]


def exact(row: Row, spec: DivergenceSpec, whole: bool = False) -> Exact:
    """Loss and gradient for the student's scaled logits, before token clips and scaling.

    With `whole` the entries are summed as they are defined, although they need not add up to one.
    """
    f, zero, h, multiple = _terms.terms(row, spec)
    bound = spec.clip if spec.clip_level == "vocab_entry" else None
    clipped = None
    if whole or bound is not None:
        h = h + multiple * row.q
    elif zero is not None:
        f = f + zero  # not in place: f may be h too
    if bound is not None:
        over = f > bound
        f, h, clipped = f.clamp(max=bound), h.masked_fill(over, 0.0), over.any(-1)
    h_sum = h.sum(-1, keepdim=True)
    return Exact(f.sum(-1), clipped, h_sum, h - row.q * h_sum)


def clip_tokens(loss: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """(loss, factor of its gradient, whether clipped) under a clip of whole tokens, each [rows]."""
    if spec.clip is None or spec.clip_level == "vocab_entry":
        return loss, 1.0, None
    over = loss > spec.clip
    factor = 0.0 if spec.clip_level == "token" else spec.clip / loss
    return loss.clamp(max=spec.clip), torch.where(over, factor, 1.0), over


def _entropy(log_e: Tensor, e: Tensor, total: Tensor, spare: Tensor) -> Tensor:
    entropy = torch.mul(e, log_e, out=spare).sum(-1)
    if bool(entropy.isnan().any()):  # 0 * -inf
        entropy = spare.masked_fill_(e == 0, 0.0).sum(-1)
    return total.log().squeeze(-1).sub_(entropy / total.squeeze(-1))


def statistics(loaded: Loaded) -> Tensor:
    """[NUM_STATS, rows], nothing clipped yet."""
    (log_q, log_p, q, p, spare), q_sum, p_sum = loaded
    student = _entropy(log_q, q, q_sum, spare)
    teacher = _entropy(log_p, p, p_sum, spare)
    # both are 0 at their largest entries and negative elsewhere
    agree = (torch.add(log_q, log_p, out=spare).amax(-1) == 0).to(q.dtype)
    return torch.stack([student, teacher, agree, torch.zeros_like(agree)])
