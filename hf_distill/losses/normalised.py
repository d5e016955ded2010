"""The JSD over beta (1 - beta): one family from the forward to the reverse KL."""

from dataclasses import replace

from metal_ops import DivergenceSpec

NEAREST_BETA = 1e-12
"""Nearer than this to 0 or 1 the KL itself is taken.

The ops do not lose digits on the way: with p and q from a hundred thousandth apart to unrelated, in
float32, loss and gradient of the quotient are as exact at beta 1e-30 as at 0.5 (values to 3e-7, or
3e-4 where p and q nearly agree, at every beta). Below 1e-12 beta times a small probability leaves
float32's normal numbers, and the quotient differs from the KL by 1e-5 at most unless log p - log q
passes 23 nats somewhere, half a vocabulary apart.
"""


def normalised_jsd(spec: DivergenceSpec) -> tuple[DivergenceSpec, float]:
    """A spec and a factor whose product is JSD / (beta (1 - beta)), clip included.

    With p the teacher, q the student and m = beta p + (1 - beta) q it is KL(p || m) / (1 - beta) +
    KL(q || m) / beta, which tends to KL(p || q) as beta goes to 0 and to KL(q || p) as it goes to
    1; four times the JSD at 0.5. The JSD itself goes to 0 there.

    Args:
        spec: of kind "jsd"; its clip bounds the quotient.

    Raises:
        ValueError: the spec is of another kind.
    """
    if spec.kind != "jsd":
        raise ValueError(f"the kind must be 'jsd', got {spec.kind!r}")
    if not NEAREST_BETA <= spec.beta <= 1 - NEAREST_BETA:
        return replace(spec, beta=float(round(spec.beta))), 1.0
    size = spec.beta * (1 - spec.beta)
    return replace(spec, clip=None if spec.clip is None else spec.clip * size), 1 / size
