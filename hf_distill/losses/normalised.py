"""The JSD over beta (1 - beta): one family from the forward to the reverse KL."""

from dataclasses import replace

from metal_ops import DivergenceSpec

NEAREST_BETA = 1e-12
"""Nearer than this to 0 or 1 the KL itself is taken.

Until there the ops lose no digits: against float64, in float32, with p and q from a hundredth to
several nats apart, the quotient is off by 2e-4 at most (at beta 0.003) and by 4e-7 below 1e-4, its
gradient never by more than at 0.5. Farther out beta times a small probability would leave float32's
normal numbers. The quotient differs from the KL by about beta exp(log p - log q), so at 1e-12 only
where the two are more than some 20 nats apart.
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
