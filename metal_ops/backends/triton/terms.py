# type: ignore  - where Triton is not installed, nor is its language Python's
"""The terms of `blocks.terms` in Triton, an entry at a time: f, zero and h of every kind.

The formulas are the same. float32 in and out. Where a comparison might lose a NaN (maximum and
minimum do) there is a `where`.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal number: GPUs may flush what is less
UP = tl.constexpr(2.0**64)  # times a probability: room for a mixture far below the least of them


@triton.jit
def _times(weight, value):
    """Return weight * value with 0 * anything = 0; a NaN weight stays."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _expm1(x):
    """Compute exp(x) - 1 for x <= 0; by its series where the difference would cancel."""
    series = 1 / 5040 + x * (1 / 40320)
    series = 1 / 120 + x * (1 / 720 + x * series)
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1)


@triton.jit
def _log_share(a, m, excess):
    """Compute log(a / m), given excess = a / m - 1: from it where they agree, else from a / m."""
    ratio = a / m
    far = tl.log(tl.where(ratio < TINY, TINY, ratio))
    s = excess / (2 + excess)  # log(1 + excess) = 2 artanh(s)
    s2 = s * s
    near = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9)))))
    return tl.where(tl.abs(excess) < 0.3, near, far)


@triton.jit
def _difference(p, q, ratio):
    """Compute q - p from the logarithm of their ratio."""
    less = _expm1(-tl.abs(ratio))
    return tl.where(p > q, p, q) * tl.where(ratio > 0, less, -less)


@triton.jit
def _mixture(a, b, beta, rest):
    """Return a, b and m = beta a + rest b, all times UP; and (a - b) / m, with 0 / 0 = 0."""
    a, b = a * UP, b * UP
    m = beta * a + rest * b
    m = tl.where(m < TINY, TINY, m)
    return a, b, m, (a - b) / m


@triton.jit
def _kl(p, q, ratio, beta, rest, KIND: tl.constexpr, WHOLE: tl.constexpr):
    difference = _difference(p, q, ratio)
    forward_h = -p if WHOLE else difference
    reverse = _times(q, -ratio)
    reverse_h = reverse + q if WHOLE else reverse
    if KIND == "forward_kl":
        f, zero, h = _times(p, ratio), difference, forward_h
    elif KIND == "reverse_kl":
        f, zero, h = reverse, -difference, reverse_h
    else:
        f = beta * _times(p, ratio) + rest * reverse
        zero = (beta - rest) * difference
        h = beta * forward_h + rest * reverse_h
    return f, zero, h


@triton.jit
def _jsd(p, q, beta, rest):
    p_up, q_up, m, relative = _mixture(p, q, beta, rest)
    h = rest * q * _log_share(q_up, m, -beta * relative)
    f = beta * p * _log_share(p_up, m, rest * relative)
    return f + h, h


@triton.jit
def _skew_kl(p, q, beta, rest, WHOLE: tl.constexpr):
    p_up, _, m, relative = _mixture(p, q, beta, rest)
    f = p * _log_share(p_up, m, rest * relative)
    h = -rest * q * (p_up / m) if WHOLE else -rest * rest * q * relative
    return f, rest * (q - p), h


@triton.jit
def _skew_reverse_kl(p, q, beta, rest, WHOLE: tl.constexpr):
    q_up, p_up, m, relative = _mixture(q, p, beta, rest)
    f = q * _log_share(q_up, m, rest * relative)
    h = f + (rest * q * (p_up / m) if WHOLE else -beta * rest * q * relative)
    return f, rest * (p - q), h


@triton.jit
def _alpha(p, q, ratio, beta, rest):
    far = -tl.abs(ratio)
    near = far > -1
    power = tl.where(ratio > 0, rest, beta)
    larger = tl.where(p > q, p, q)
    # nearby, all three less the larger of p and q
    g = larger * tl.exp(far * power)
    less_g, less = _expm1(far * power), _expm1(far)
    f = tl.where(near, (power * less - less_g) * larger, beta * p + rest * q - g)
    h = tl.where(near, (tl.where(ratio > 0, less, 0.0) - less_g) * larger, q - g)
    return f / (beta * rest), h / beta


@triton.jit
def terms(p, q, log_q, ratio, beta, rest, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Return (f, zero, h) as `blocks.terms.terms`; rest is 1 - beta. All are 0 if p and q are."""
    zero = tl.zeros_like(p)
    if KIND == "soft_ce":
        f = _times(p, -log_q)
        h = -p if WHOLE else _difference(p, q, ratio)
    elif KIND == "tvd":
        difference = _difference(p, q, ratio)
        f = 0.5 * tl.abs(difference)
        h = tl.where(difference > 0, 0.5 * q, tl.where(difference < 0, -0.5 * q, difference))
    elif KIND == "jsd":
        f, h = _jsd(p, q, beta, rest)
    elif KIND == "skew_kl":
        f, zero, h = _skew_kl(p, q, beta, rest, WHOLE)
    elif KIND == "skew_reverse_kl":
        f, zero, h = _skew_reverse_kl(p, q, beta, rest, WHOLE)
    elif KIND == "alpha":
        f, h = _alpha(p, q, ratio, beta, rest)
    else:
        f, zero, h = _kl(p, q, ratio, beta, rest, KIND, WHOLE)
    return f, zero, h
