"""A block of rows from logits to loss and gradient, over the full vocabulary or a part of it."""

from torch import Tensor

from metal_ops.backends import _full, _support
from metal_ops.backends._rows import Buffers, Loaded, load, statistics
from metal_ops.backends._terms import MIXTURES
from metal_ops.spec import DivergenceSpec


def divergence(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    buffers: Buffers,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    want_stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(loss [rows], stats [NUM_STATS, rows] or None) of one block of logits [rows, V].

    The gradient of weight * loss, weight [rows], goes to `out`, which may be `student` itself.
    """
    buffers = buffers.first(len(student))
    full, temperature = spec.support == "full", spec.temperature
    bare = full and spec.kind in MIXTURES and not want_stats  # the logs are not needed
    log_q, log_p = (buffers.q, buffers.p) if bare else (buffers.log_q, buffers.log_p)
    shift = not full or spec.kind == "soft_ce"  # the logs themselves are summed, not differences
    loaded = Loaded(
        buffers,
        *load(student, temperature, log_q, buffers.q, shift),
        *load(teacher, temperature, log_p, buffers.p, shift),
    )
    stats = statistics(loaded) if want_stats else None
    factor = None if weight is None else weight * (spec.scale / temperature)
    if full:
        loss, clipped = _full.divergence(loaded, spec, factor, out)
    else:
        loss, clipped = _support.divergence(student, teacher, loaded, spec, factor, out)
    if stats is not None and clipped is not None:
        stats[3] = clipped
    return loss * spec.scale, stats
