# type: ignore  - where Triton is not installed, nor is its language Python's
"""Triton kernels over rows of hidden states [N, H], a program a row.

They follow the formulas of `blocks.hidden`: float32 sums, rows as in `rows`. A column past the end
reads as zero on both sides.
"""

import triton
import triton.language as tl

from metal_ops.reference import NORM_MIN as _NORM_MIN

NORM_MIN = tl.constexpr(_NORM_MIN)


@triton.jit
def _pair(student, teacher, cols, size):
    """Load (s, t, s - t) at some columns."""
    inside = cols < size
    s = tl.load(student + cols, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + cols, mask=inside, other=0.0).to(tl.float32)
    return s, t, s - t


@triton.jit
def _erase(out, size, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(out + cols, tl.zeros([BLOCK], out.dtype.element_ty), mask=cols < size)


@triton.jit
def mse(
    student,
    teacher,
    weights,
    out,
    loss,
    size,
    student_stride,
    teacher_stride,
    out_stride,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss [N]; with GRAD, write weights times its gradient to `out` [N, H]."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    out += row * out_stride
    if weight != 0:
        student += row * student_stride
        teacher += row * teacher_stride
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            _, _, d = _pair(student, teacher, cols, size)
            total += d * d
            if GRAD:
                slope = (d * (weight * 2 / size)).to(out.dtype.element_ty)
                tl.store(out + cols, slope, mask=cols < size)
        tl.store(loss + row, tl.sum(total, 0) / size)
    else:
        tl.store(loss + row, 0.0)
        if GRAD:
            _erase(out, size, BLOCK)


@triton.jit
def _short(norm):
    """Compute 1 - |u|^2 of a row of length `norm`."""
    ratio = norm / NORM_MIN
    return tl.where(norm < NORM_MIN, (1 - ratio) * (1 + ratio), 0.0)


@triton.jit
def _lengths(student, teacher, size, BLOCK: tl.constexpr):
    """Compute |s|, |t|, (s - t).(s + t)."""
    s_square = tl.zeros([BLOCK], tl.float32)
    t_square = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        s, t, d = _pair(student, teacher, start + tl.arange(0, BLOCK), size)
        s_square += s * s
        t_square += t * t
        product += d * (s + t)
    s_norm = tl.sqrt_rn(tl.sum(s_square, 0))
    t_norm = tl.sqrt_rn(tl.sum(t_square, 0))
    return s_norm, t_norm, tl.sum(product, 0)


@triton.jit
def cosine(
    student,
    teacher,
    weights,
    out,
    loss,
    size,
    student_stride,
    teacher_stride,
    out_stride,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write as `mse`; `blocks.hidden` has w = of_s s + of_d d + of_t t, s student, t teacher."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    out += row * out_stride
    if weight != 0:
        student += row * student_stride
        teacher += row * teacher_stride
        s_norm, t_norm, product = _lengths(student, teacher, size, BLOCK)
        a = tl.where(s_norm < NORM_MIN, NORM_MIN, s_norm)
        b = tl.where(t_norm < NORM_MIN, NORM_MIN, t_norm)
        longer = (s_norm >= NORM_MIN) & (t_norm >= NORM_MIN)
        apart = tl.where(longer, product / (a + b), a - b)
        near = (a <= 2 * b) & (b <= 2 * a)
        of_s, of_d = tl.where(near, 0.0, 1.0), tl.where(near, 1.0, 0.0)
        of_t = -tl.where(near, apart, a) / b
        square = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            s, t, d = _pair(student, teacher, start + tl.arange(0, BLOCK), size)
            u = (of_s * s + of_d * d + of_t * t) / a
            square += u * u
        value = (tl.sum(square, 0) + _short(s_norm) + _short(t_norm)) / 2
        tl.store(loss + row, value)
        if GRAD:
            constant = s_norm < NORM_MIN
            of_s = tl.where(constant, 0.0, of_s - value)
            of_d = tl.where(constant, 0.0, of_d)
            of_t = tl.where(constant, -a / b, of_t)
            for start in range(0, size, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                s, t, d = _pair(student, teacher, cols, size)
                # one division after the other: a^2 may be too small or too large
                slope = (of_s * (s / a) + of_d * (d / a) + of_t * (t / a)) * (weight / a)
                tl.store(out + cols, slope.to(out.dtype.element_ty), mask=cols < size)
    else:
        tl.store(loss + row, 0.0)
        if GRAD:
            _erase(out, size, BLOCK)
