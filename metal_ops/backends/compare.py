"""Says by how much the results of two correct backends may differ, for METAL_OPS_CHECK.

Shapes: N rows, V entries of a row. With eps that of float32 (float64 for float64) and x the range
of a row's logits / temperature and a quarter of the largest (which is subtracted, for the most
part), a probability is right to k = ROOM (1 + x) eps of itself. Then may differ

    loss      by k (loss + sqrt(loss) + k): where p and q nearly agree it and its error are small;
              and by k from 2^-10 nats on
    gradient  by k and eps of its own dtype of the row's largest, and by k of the row's factor times
              its largest probability, below which two terms may have cancelled

and by more only where a rule jumps: by the mass of entries whose sign (tvd) or bound (clip) is
undecided. A row that is wrong by 3 % differs by more, in every dtype; one in which p and q agree to
1 % and the logits are 100 away from zero if it is wrong by 20 %. The logits of `linear` are not at
hand: it has limits of its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metal_ops import reference
from metal_ops.backends.blocks.full import NEAR
from metal_ops.backends.blocks.rows import accumulator
from metal_ops.reference import NORM_MIN
from metal_ops.spec import DivergenceSpec

# tests/metal_ops/ops/torch_kernels.py, correct in another way, needs 4, for the JSD of rows
# shifted by 100, and 2 without shifts
ROOM = 6.0
# of linear: k where the logits, of which it depends, are inside the op
LINEAR_ROOM = 2e-4
ROWS = 64  # compared at a time

Pair = tuple[Tensor, Tensor]


class Limits(NamedTuple):
    """Holds what the rows of one call allow, [N] each, float64."""

    k: Tensor
    loss_floor: Tensor  # of the divergence before scaling, where it need not be small
    gradient_floor: Tensor  # for a factor of one
    jump: Tensor  # of the gradient, for a factor of one
    undecided: Tensor  # whether clipped and unclipped are both right


def _finite_largest(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x.abs(), 0.0).amax(-1) if x.shape[-1] else x.new_zeros(len(x))


def _range(x: Tensor) -> Tensor:
    finite = x.isfinite()
    largest = torch.where(finite, x, -torch.inf).amax(-1)
    least = torch.where(finite, x, torch.inf).amin(-1)
    range_ = (largest - least).clamp_min(0.0)  # of nothing finite: -inf
    return range_ + _finite_largest(x) / 4


def _sparse_log_p(known: tuple[Tensor, ...], vocab: int) -> Tensor:
    """Return the teacher's log-probabilities [N, V + 1], the tail last."""
    ids, log_probs, log_tail = known
    out = torch.full((len(ids), vocab + 1), -torch.inf, dtype=torch.float64, device=ids.device)
    out.scatter_(-1, torch.where(ids < 0, vocab, ids), log_probs.double())
    out[:, -1] = log_tail.double()
    return out


class Sides(NamedTuple):
    """Holds log-probabilities by category, x, and an entry's largest probability; float64."""

    log_p: Tensor
    log_q: Tensor
    x: Tensor
    top: Tensor


def _sides(student: Tensor, teacher: Any, spec: DivergenceSpec) -> Sides:
    vocab = student.shape[-1]
    y = student.double() / spec.temperature
    log_q, x = y.log_softmax(-1), _range(y)
    top = log_q.amax(-1)
    if isinstance(teacher, tuple):
        log_p = _sparse_log_p(teacher, student.shape[-1])
        x = torch.maximum(x, _finite_largest(log_p))
        kept = log_p[:, :-1] > -torch.inf
        log_q = reference.restrict(log_q, kept, spec.missing)
        if spec.missing != "tail":
            log_p = reference.restrict(log_p[:, :-1], kept, spec.missing)
        return Sides(log_p, log_q, x, _top_of(top, log_p, log_q, vocab))
    z = teacher.double() / spec.temperature
    log_p, x = z.log_softmax(-1), torch.maximum(x, _range(z))
    if spec.support != "full":
        kept = reference.support(student, teacher, spec)
        log_p, log_q = (reference.restrict(v, kept, spec.missing) for v in (log_p, log_q))
    return Sides(log_p, log_q, x, _top_of(top, log_p, log_q, vocab))


def _top_of(top: Tensor, log_p: Tensor, log_q: Tensor, vocab: int) -> Tensor:
    """Return the largest probability but the tail's, whose gradient is spread over its entries."""
    tops = [top, log_p[:, :vocab].amax(-1), log_q[:, :vocab].amax(-1)]
    return torch.stack(tops).amax(0).exp()


def _limits(student: Tensor, teacher: Any, spec: DivergenceSpec) -> Limits:
    log_p, log_q, x, largest = _sides(student, teacher, spec)
    k = ROOM * (1 + x) * torch.finfo(accumulator(student)).eps
    p, q = log_p.exp(), log_q.exp()
    f = reference.entries(log_p, log_q, spec.kind, spec.beta)
    loss = f.sum(-1).abs().nan_to_num(posinf=0.0)
    of_beta = 1.0
    if spec.kind == "alpha":  # whose terms are divided by it
        of_beta = 1 / (spec.beta * (1 - spec.beta))
    by_entry = spec.clip is not None and spec.clip_level == "vocab_entry"
    pure = spec.kind not in ("soft_ce", "tvd") and spec.missing != "zero" and not by_entry
    one = torch.ones_like(loss)
    jumps = torch.zeros_like(loss, dtype=torch.bool)[:, None]
    undecided = jumps[:, 0]
    if spec.kind == "tvd":
        jumps = (log_p - log_q).abs() <= k[:, None]
    if spec.clip is not None and by_entry:
        jumps = jumps | ((f - spec.clip).abs() <= k[:, None] * (1 + spec.clip))
        undecided = jumps.any(-1)
    jump = ((p + q) * (1 + _size(log_p) + _size(log_q)) * jumps).sum(-1)
    if spec.clip is not None and not by_entry:
        undecided = (loss - spec.clip).abs() <= k * (loss + loss.sqrt() + spec.clip)
        jump = jump + undecided * (1 + loss)
    return Limits(k * of_beta, one * (not pure), largest * (1 + loss), jump.nan_to_num(), undecided)


def _size(log: Tensor) -> Tensor:
    return torch.where(log.isfinite(), log.abs(), 0.0)


def _loss_room(want: Tensor, k: Tensor, floor: Tensor, scale: float) -> Tensor:
    loss = want.double().abs() / scale
    # from NEAR on the chunked backend sums what does not cancel term by term
    floor = torch.maximum(floor, (loss >= NEAR).double())
    return k * (loss + loss.sqrt() + k + floor) * scale


def _gradient_room(want: Tensor, factor: Tensor, limits: Limits) -> Tensor:
    """Return the room [N] for a gradient [N, V] of rows that were given a factor [N]."""
    largest = _finite_largest(want.double())
    relative = limits.k + torch.finfo(want.dtype).eps
    inside = limits.k * limits.gradient_floor + limits.jump
    info = torch.finfo(want.dtype)
    # numbers below may come out as zero; float16 has its own, and float32 behind them
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).tiny)
    return relative * largest + factor.double().abs() * inside + least


def _find(name: str, got: Tensor, want: Tensor, room: Tensor) -> str | None:
    """Say where [N] or [N, V] differ by more than room [N]."""
    if got.shape != want.shape or got.dtype != want.dtype:
        shapes = f"{got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
        return f"{name} is {shapes}"
    got, want = (x.double().reshape(len(x), -1) for x in (got, want))
    same = (got == want) | ((got - want).abs() <= room.nan_to_num()[:, None])
    # where a result is not finite, which of its entries are so is not agreed upon
    lost = ~want.isfinite().all(-1, keepdim=True) & ~got.isfinite().all(-1, keepdim=True)
    wrong = ~(same | lost)
    if not bool(wrong.any()):
        return None
    excess = torch.where(wrong, (got - want).abs().nan_to_num(nan=torch.inf), -1.0)
    row, column = divmod(int(excess.argmax()), got.shape[1])
    return (
        f"{name} of row {row}, entry {column}, is {float(got[row, column]):.9g}, "
        f"chunked {float(want[row, column]):.9g}, may differ by {float(room[row]):.3g}; "
        f"{int(wrong.any(-1).sum())} of {len(got)} rows differ"
    )


def _find_stats(got: Tensor, want: Tensor, limits: Limits, vocab: int) -> str | None:
    """Do as `_find` for statistics [NUM_STATS, N]."""
    entropy = limits.k * (1 + torch.log(torch.tensor(float(vocab), dtype=torch.float64)).item())
    exact = torch.zeros_like(entropy)
    rooms = (entropy, entropy, exact, limits.undecided.double())
    names = ("student_entropy", "teacher_entropy", "top1_agreement", "clipped")
    found = (_find(*x) for x in zip(names, got, want, rooms, strict=True))
    return next((x for x in found if x is not None), None)


def _in_blocks(student: Tensor, teacher: Any, spec: DivergenceSpec) -> Limits:
    parts = []
    for start in range(0, len(student), ROWS):
        at = slice(start, start + ROWS)
        some = tuple(x[at] for x in teacher) if isinstance(teacher, tuple) else teacher[at]
        parts.append(_limits(student[at], some, spec))
    return Limits(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _of_logits(
    student: Tensor,
    teacher: Any,
    weights: Tensor | None,
    spec: DivergenceSpec,
    got: tuple[Tensor | None, ...],
    want: tuple[Tensor | None, ...],
) -> str | None:
    """Compare results (loss or None, stats or None, gradient or None)."""
    if not len(student):
        return None
    limits = _in_blocks(student, teacher, spec)
    weights = torch.ones_like(limits.k) if weights is None else weights
    if want[0] is not None and got[0] is not None:
        room = _loss_room(want[0], limits.k, limits.loss_floor, spec.scale)
        found = _find("the loss", got[0], want[0], room)
        if found:
            return found
    if want[1] is not None and got[1] is not None and want[1].numel():
        found = _find_stats(got[1], want[1], limits, student.shape[-1])
        if found:
            return found
    if want[2] is None or got[2] is None:
        return None
    factor = weights * (spec.scale / spec.temperature)
    room = _gradient_room(want[2], factor, limits)
    return _find("the gradient", got[2], want[2], room)


def _of_hidden(
    student: Tensor, teacher: Tensor, kind: str, weights: Tensor | None, got: Any, want: Any
) -> str | None:
    if not len(student):
        return None
    s, t = student.double(), teacher.double()
    k = ROOM * torch.finfo(accumulator(student)).eps * torch.ones_like(s[:, 0])
    weights = torch.ones_like(k) if weights is None else weights.double()
    floor = torch.zeros_like(k)
    if kind == "cosine":  # what is left of s - t once they are turned alike
        a, b = (x.norm(dim=-1).clamp_min(NORM_MIN) for x in (s, t))
        floor = (s - t).norm(dim=-1) / torch.maximum(a, b) / a
    found = _find("the loss", got[0], want[0], _loss_room(want[0], k, 0 * k, 1.0))
    if found or want[1] is None:
        return found
    none = torch.zeros_like(k)
    limits = Limits(k, none, floor, none, none.bool())
    return _find("the gradient", got[1], want[1], _gradient_room(want[1], weights, limits))


def _of_linear(args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    """Compare results of a whole vocabulary; their gradients may be of some of its rows."""
    student, _, weights, hard, spec = args[:5]
    k = torch.full((len(weights),), LINEAR_ROOM, dtype=torch.float64, device=weights.device)
    one = torch.ones_like(k)
    size = weights.double().abs()
    losses = want[1].double().abs().nan_to_num(posinf=0.0)
    rooms = [_loss_room(want[1][0], k, one, spec.scale), k * (1 + losses[1])]
    total = (size * (hard.alpha * rooms[0] + (1 - hard.alpha) * rooms[1]).nan_to_num()).sum()
    low = torch.finfo(student.weight.dtype).eps
    relative = LINEAR_ROOM + (16 * low if low > 1e-6 else 0.0)
    pairs: list[tuple[str, Pair, Tensor]] = [
        ("the loss", (got[0][None], want[0][None]), total[None]),
        ("the divergence", (got[1][0], want[1][0]), rooms[0]),
        ("the cross-entropy", (got[1][1], want[1][1]), rooms[1]),
    ]
    # which entries are undecided is not known here: a gradient that jumps there is not compared
    steady = spec.kind != "tvd" and spec.clip is None
    # a gradient's row is a sum of products whose rounding is that of its factors
    scale = max(spec.scale / spec.temperature * hard.alpha, 1 - hard.alpha) * student.logit_scale
    for name, i, floor in (
        ("the gradient of hidden states", 3, size * _top(student.weight)),
        ("the gradient of the weight", 4, size.sum() * _top(student.hidden)),
        ("the gradient of the bias", 5, size.sum()),
    ):
        if want[i] is not None and steady:
            rows = want[i].double().reshape(len(want[i]), -1)
            floor = LINEAR_ROOM * abs(scale) * floor
            pairs.append((name, (got[i], want[i]), relative * _finite_largest(rows) + floor))
    if want[2].numel():
        limits = Limits(k, one, one, one, one.bool())
        found = _find_stats(got[2], want[2], limits, len(student.weight))
        if found:
            return found
    for name, (x, y), room in pairs:
        found = _find(name, x, y, room) if len(x) else None
        if found:
            return found
    return None


def _top(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def difference(op: str, args: tuple[Any, ...], got: Any, want: Any) -> str | None:
    """Say what a backend's result `got` of `op` has that `want`, the chunked one's, excludes."""
    # not every device has float64
    args, got, want = tree_map_only(Tensor, Tensor.cpu, (args, got, want))
    if op in ("linear", "split_linear"):
        return _of_linear(args, got, want)
    if op == "hidden_states":
        student, teacher, kind, weights = args[:4]
        return _of_hidden(student, teacher, kind, weights, got, want)
    if op == "backward":
        upstream, student, teacher, spec = args
        return _of_logits(student, teacher, upstream, spec, (None, None, got), (None, None, want))
    student, teacher, weights, spec = args[:4]
    if op == "sparse":
        got, want = (got[0], None, got[1]), (want[0], None, want[1])
    return _of_logits(student, teacher, weights, spec, got, want)


def require_equal(op: str, backend: str, args: tuple[Any, ...], got: Any, want: Any) -> None:
    """Return if both results may be right.

    Raises:
        RuntimeError: they may not; with op, backend, row and values.
    """
    found = difference(op, args, got, want)
    if found is not None:
        spec = next((str(x) for x in args if isinstance(x, (DivergenceSpec, str))), "")
        raise RuntimeError(f"METAL_OPS_CHECK: {op} of the {backend} backend, {spec}: {found}")
