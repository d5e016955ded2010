"""Takes a block of rows from logits to loss and gradient, over all or some of the vocabulary."""

from collections.abc import Callable

from torch import Tensor

from metal_ops.backends.blocks.full import full_divergence
from metal_ops.backends.blocks.rows import Buffers, LoadedRows, load_rows, row_statistics
from metal_ops.backends.blocks.support import support_divergence
from metal_ops.backends.blocks.terms import MIXTURES
from metal_ops.spec import DivergenceSpec


def block_divergence(
    student: Tensor,
    teacher: Tensor,
    spec: DivergenceSpec,
    buffers: Buffers,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    want_stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return (loss [rows], stats [NUM_STATS, rows] or None) of one block of logits [rows, V].

    The gradient of weight * loss, weight [rows], goes to `out`, which may be `student` itself.
    """
    buffers = buffers.first(len(student))
    full, temperature = spec.support == "full", spec.temperature
    bare = full and spec.kind in MIXTURES and not want_stats  # the logs are not needed
    log_q, log_p = (buffers.q, buffers.p) if bare else (buffers.log_q, buffers.log_p)
    shift = not full or spec.kind == "soft_ce"  # the logs themselves are summed, not differences
    loaded = LoadedRows(
        buffers,
        *load_rows(student, temperature, log_q, buffers.q, shift),
        *load_rows(teacher, temperature, log_p, buffers.p, shift),
    )
    stats = row_statistics(loaded) if want_stats else None
    factor = None if weight is None else weight * (spec.scale / temperature)
    if full:
        loss, clipped = full_divergence(loaded, spec, factor, out)
    else:
        loss, clipped = support_divergence(student, teacher, loaded, spec, factor, out)
    if stats is not None and clipped is not None:
        stats[3] = clipped
    return loss * spec.scale, stats


# block_divergence, or what does the same
BlockDivergence = Callable[..., tuple[Tensor, Tensor | None]]
