# type: ignore  - where Triton is not installed, nor is its language Python's
"""Triton kernels over rows of logits: one program a row, or several where there are few rows.

N rows, V vocabulary. Rows may be strided, their last dimension is contiguous; row offsets are
int64. What is summed is kept a lane at a time in float32 and put together at the end, in an order
that does not depend on timing. A column past the end reads as -inf and adds nothing.
"""

import triton
import triton.language as tl

from metal_ops.backends import kernels
from metal_ops.backends.triton.terms import terms

LOSS = tl.constexpr(kernels.LOSS)
H_SUM = tl.constexpr(kernels.H_SUM)
Q_LOG_SUM = tl.constexpr(kernels.Q_LOG_SUM)
P_LOG_SUM = tl.constexpr(kernels.P_LOG_SUM)
Q_ENTROPY = tl.constexpr(kernels.Q_ENTROPY)
P_ENTROPY = tl.constexpr(kernels.P_ENTROPY)
AGREEMENT = tl.constexpr(kernels.AGREEMENT)
CLIPPED = tl.constexpr(kernels.CLIPPED)
NUM_VALUES = tl.constexpr(kernels.NUM_VALUES)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no difference is inf - inf


@triton.jit
def _load(row, cols, wanted):
    """Load float32 entries of a row, -inf where not wanted."""
    return tl.load(row + cols, mask=wanted, other=float("-inf")).to(tl.float32)


@triton.jit
def _take(x, top, total, inv_t):
    """Take x into each lane's running (largest, sum of exp((. - largest) * inv_t))."""
    above = x > top
    e = tl.exp(-tl.abs(x - top) * inv_t)  # one exponential, whichever of the two is larger
    return tl.where(above, x, top), tl.where(above, total * e + 1, total + e)


@triton.jit
def _merge(top, total, inv_t):
    """Merge the lanes' (largest, sum) into one."""
    largest = tl.max(top, 0)
    return largest, tl.sum(total * tl.exp((top - largest) * inv_t), 0)


@triton.jit
def _fold(x, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    """Fold [BLOCK] to [BLOCK // FOLD], by sums of neighbours."""
    return tl.sum(tl.reshape(x, [BLOCK // FOLD, FOLD]), 1)


@triton.jit
def _log_sum(top, total, inv_t):
    return top * inv_t + tl.log(total)


@triton.jit
def _normalise(student, teacher, first, last, inv_t, BLOCK: tl.constexpr):
    """Return (largest, sum) of columns [first, last) of a student's and a teacher's row."""
    x_top = tl.full([BLOCK], LOWEST, tl.float32)
    y_top = tl.full([BLOCK], LOWEST, tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    y_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < last
        x_top, x_sum = _take(_load(student, cols, inside), x_top, x_sum, inv_t)
        y_top, y_sum = _take(_load(teacher, cols, inside), y_top, y_sum, inv_t)
    x_top, x_sum = _merge(x_top, x_sum, inv_t)
    y_top, y_sum = _merge(y_top, y_sum, inv_t)
    return x_top, x_sum, y_top, y_sum


@triton.jit
def normalise(
    student,
    teacher,
    weights,
    partials,
    vocab,
    student_stride,
    teacher_stride,
    columns,
    inv_t,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write partials [4, N, SPLITS] from splits of `columns` each; of rows that count only."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(weights + row) != 0:
        first = split * columns
        x_top, x_sum, y_top, y_sum = _normalise(
            student + row * student_stride,
            teacher + row * teacher_stride,
            first,
            tl.minimum(first + columns, vocab),
            inv_t,
            BLOCK,
        )
        slot, plane = partials + row * SPLITS + split, tl.num_programs(0).to(tl.int64) * SPLITS
        tl.store(slot, x_top)
        tl.store(slot + plane, x_sum)
        tl.store(slot + 2 * plane, y_top)
        tl.store(slot + 3 * plane, y_sum)


@triton.jit
def _sums(
    student,
    teacher,
    first,
    last,
    normalisers,
    inv_t,
    beta,
    rest,
    bound,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Sum columns [first, last): f, h, both entropies; whether a largest is shared, one is cut."""
    x_top, x_sum, y_top, y_sum = normalisers
    x_log, y_log = tl.log(x_sum), tl.log(y_sum)
    apart = tl.log(tl.div_rn(y_sum, x_sum))  # of equal sums, zero
    # what a thread loads at a time it sums first: fewer registers, so more programs at once
    loss = tl.zeros([BLOCK // FOLD], tl.float32)
    h_sum = tl.zeros([BLOCK // FOLD], tl.float32)
    q_entropy = tl.zeros([BLOCK // FOLD], tl.float32)
    p_entropy = tl.zeros([BLOCK // FOLD], tl.float32)
    shared = tl.zeros([BLOCK // FOLD], tl.int32)
    clipped = tl.zeros([BLOCK // FOLD], tl.int32)
    end = first + tl.cdiv(last - first, BLOCK) * BLOCK
    for done in range(first, last, BLOCK):
        # backwards: what was read last is still in a cache
        cols = (end - BLOCK) - (done - first) + tl.arange(0, BLOCK)
        x, y = _load(student, cols, cols < last), _load(teacher, cols, cols < last)
        # relative to each row's largest, so that a constant on a row cancels first
        x_less, y_less = x - x_top, y - y_top
        q, p = tl.exp(x_less * inv_t) / x_sum, tl.exp(y_less * inv_t) / y_sum
        log_q, log_p = x_less * inv_t - x_log, y_less * inv_t - y_log
        ratio = tl.where((p == 0) & (q == 0), 0.0, (y_less - x_less) * inv_t - apart)
        f, zero, h = terms(p, q, log_q, ratio, beta, rest, KIND, CLIP)
        if CLIP:
            over = f > bound
            f, h = tl.where(over, bound, f), tl.where(over, 0.0, h)
            clipped += _fold(over.to(tl.int32), BLOCK, FOLD)
        else:
            f += zero
        loss += _fold(f, BLOCK, FOLD)
        h_sum += _fold(h, BLOCK, FOLD)
        q_entropy -= _fold(tl.where(q == 0, 0.0, q * log_q), BLOCK, FOLD)
        p_entropy -= _fold(tl.where(p == 0, 0.0, p * log_p), BLOCK, FOLD)
        shared += _fold(((x == x_top) & (y == y_top)).to(tl.int32), BLOCK, FOLD)
    loss, h_sum = tl.sum(loss, 0), tl.sum(h_sum, 0)
    q_entropy, p_entropy = tl.sum(q_entropy, 0), tl.sum(p_entropy, 0)
    shared, clipped = tl.max(shared, 0) > 0, tl.max(clipped, 0) > 0
    return loss, h_sum, q_entropy, p_entropy, shared.to(tl.float32), clipped.to(tl.float32)


@triton.jit
def forward(
    student,
    teacher,
    weights,
    partials,
    values,
    vocab,
    student_stride,
    teacher_stride,
    columns,
    inv_t,
    beta,
    rest,
    bound,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SPLITS: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write values [NUM_VALUES, N, SPLITS]; sums over the splits are the row's (flags: above 0).

    With GIVEN, partials [4, N] are the normalisers of rows of which these are some columns.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, plane = values + row * SPLITS + split, tl.num_programs(0).to(tl.int64) * SPLITS
    if tl.load(weights + row) != 0:
        student += row * student_stride
        teacher += row * teacher_stride
        first = split * columns
        last = tl.minimum(first + columns, vocab)
        if GIVEN:
            part, count = partials + row, tl.num_programs(0).to(tl.int64)
            x_top, x_sum = tl.load(part), tl.load(part + count)
            y_top, y_sum = tl.load(part + 2 * count), tl.load(part + 3 * count)
        elif SPLITS == 1:
            x_top, x_sum, y_top, y_sum = _normalise(student, teacher, first, last, inv_t, BLOCK)
        else:
            part = partials + row * SPLITS + tl.arange(0, SPLITS)
            x_top, x_sum = _merge(tl.load(part), tl.load(part + plane), inv_t)
            y_top, y_sum = _merge(tl.load(part + 2 * plane), tl.load(part + 3 * plane), inv_t)
        loss, h_sum, q_entropy, p_entropy, shared, clipped = _sums(
            student,
            teacher,
            first,
            last,
            (x_top, x_sum, y_top, y_sum),
            inv_t,
            beta,
            rest,
            bound,
            KIND,
            CLIP,
            BLOCK,
            FOLD,
        )
        tl.store(slot + LOSS * plane, loss)
        tl.store(slot + H_SUM * plane, h_sum)
        q_log_sum, p_log_sum = _log_sum(x_top, x_sum, inv_t), _log_sum(y_top, y_sum, inv_t)
        tl.store(slot + Q_LOG_SUM * plane, tl.where(split == 0, q_log_sum, 0.0))
        tl.store(slot + P_LOG_SUM * plane, tl.where(split == 0, p_log_sum, 0.0))
        tl.store(slot + Q_ENTROPY * plane, q_entropy)
        tl.store(slot + P_ENTROPY * plane, p_entropy)
        whole = x_sum + y_sum  # NaN if an entry is: then no entry is the largest
        tl.store(slot + AGREEMENT * plane, tl.where(whole == whole, shared, 0.0))
        tl.store(slot + CLIPPED * plane, clipped)
    else:
        for value in tl.static_range(NUM_VALUES):
            tl.store(slot + value * plane, 0.0)


@triton.jit
def backward(
    student,
    teacher,
    factor,
    values,
    labels,
    hard_log_sum,
    hard_share,
    out,
    vocab,
    student_stride,
    teacher_stride,
    out_stride,
    inv_t,
    beta,
    rest,
    bound,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a block of `out` [N, V], which may be `student`: an entry is read, then written."""
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.num_programs(0).to(tl.int64)
    inside = cols < vocab
    scale = tl.load(factor + row)
    soft = scale != 0
    needed, share = soft, 0.0
    if HARD:
        share = tl.load(hard_share + row)
        needed = soft | (share != 0)
    x = _load(student + row * student_stride, cols, inside & needed)
    y = _load(teacher + row * teacher_stride, cols, inside & soft)
    q_log_sum = tl.load(values + Q_LOG_SUM * rows + row)
    p_log_sum = tl.load(values + P_LOG_SUM * rows + row)
    h_sum = tl.load(values + H_SUM * rows + row)
    log_q = x * inv_t - q_log_sum
    q, p = tl.exp(log_q), tl.exp(y * inv_t - p_log_sum)
    ratio = (y - x) * inv_t - (p_log_sum - q_log_sum)
    ratio = tl.where((p == 0) & (q == 0), 0.0, ratio)
    f, _, h = terms(p, q, log_q, ratio, beta, rest, KIND, CLIP)
    if CLIP:
        h = tl.where(f > bound, 0.0, h)
    grad = tl.where(soft, scale * (h - q * h_sum), 0.0)
    if HARD:
        at_label = (cols == tl.load(labels + row)).to(tl.float32)
        hard = share * (tl.exp(x - tl.load(hard_log_sum + row)) - at_label)
        grad += tl.where(share != 0, hard, 0.0)
    tl.store(out + row * out_stride + cols, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_log_sums(top, total, kept_top, kept_total, all_sums, rest_sums, inv_t):
    """Store the log-sums of everything and of the rest, from (largest, sum) of rest and kept."""
    tl.store(rest_sums, _log_sum(top, total, inv_t))
    largest = tl.maximum(top, kept_top)
    total = total * tl.exp((top - largest) * inv_t)
    total += kept_total * tl.exp((kept_top - largest) * inv_t)
    tl.store(all_sums, _log_sum(largest, total, inv_t))


@triton.jit
def log_sums(
    logits,
    bits,
    partials,
    result,
    vocab,
    stride,
    words,
    columns,
    inv_t,
    KEPT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write result [2, N], all and rest; with splits, partials [4, N, SPLITS] for `join_log_sums`.

    With KEPT, bits [N, words] int32 have a one for each entry that is not of the rest.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    logits += row * stride
    bits += row * words
    first = split * columns
    last = tl.minimum(first + columns, vocab)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    kept_top = tl.full([BLOCK], LOWEST, tl.float32)
    kept_total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < last
        x = _load(logits, cols, inside)
        if KEPT:
            word = tl.load(bits + (cols >> 5), mask=inside, other=0)
            kept = ((word >> (cols & 31)) & 1) != 0
            old_top, old_total = tl.where(kept, kept_top, top), tl.where(kept, kept_total, total)
            new_top, new_total = _take(x, old_top, old_total, inv_t)
            top, total = tl.where(kept, top, new_top), tl.where(kept, total, new_total)
            kept_top = tl.where(kept, new_top, kept_top)
            kept_total = tl.where(kept, new_total, kept_total)
        else:
            top, total = _take(x, top, total, inv_t)
    top, total = _merge(top, total, inv_t)
    kept_top, kept_total = _merge(kept_top, kept_total, inv_t)
    if SPLITS == 1:
        _store_log_sums(top, total, kept_top, kept_total, result + row, result + rows + row, inv_t)
    else:
        slot, plane = partials + row * SPLITS + split, rows * SPLITS
        tl.store(slot, top)
        tl.store(slot + plane, total)
        tl.store(slot + 2 * plane, kept_top)
        tl.store(slot + 3 * plane, kept_total)


@triton.jit
def join_log_sums(partials, result, inv_t, SPLITS: tl.constexpr):
    """Write result [2, N] from partials [4, N, SPLITS]."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slot, plane = partials + row * SPLITS + tl.arange(0, SPLITS), rows * SPLITS
    top, total = _merge(tl.load(slot), tl.load(slot + plane), inv_t)
    kept_top, kept_total = _merge(tl.load(slot + 2 * plane), tl.load(slot + 3 * plane), inv_t)
    _store_log_sums(top, total, kept_top, kept_total, result + row, result + rows + row, inv_t)


@triton.jit
def spread(logits, log_sum, factor, out, vocab, stride, out_stride, inv_t, BLOCK: tl.constexpr):
    """Write a block of `out` [N, V], which may be `logits`: an entry is read, then written."""
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < vocab
    scale = tl.load(factor + row)
    x = _load(logits + row * stride, cols, inside & (scale != 0))
    e = scale * tl.exp(x * inv_t - tl.load(log_sum + row))
    e = tl.where(scale == 0, 0.0, e)
    tl.store(out + row * out_stride + cols, e.to(out.dtype.element_ty), mask=inside)
