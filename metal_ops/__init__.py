"""Computes divergences of a student's and a teacher's softmax, fused with the work around them.

The package is named after its Metal kernels; the same ops run on every device torch has.
`python -m metal_ops` says what it takes on this machine, and tests and times it there. With
METAL_OPS_STRICT=1 in the environment a kernel that fails raises, where else another backend takes
over; with METAL_OPS_CHECK=1 every result of a kernel is compared with the chunked backend's.
"""

from metal_ops._dispatch import available_backends, choices
from metal_ops.functional import (
    DivergenceStats,
    Head,
    LinearTerms,
    PowerSums,
    SparseTeacher,
    TailSamples,
    WeightedTerms,
    divergence,
    divergence_with_stats,
    hidden_divergence,
    linear_divergence,
    linear_scratch_bytes,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.presets import preset
from metal_ops.spec import DivergenceSpec

__all__ = [
    "DivergenceSpec",
    "DivergenceStats",
    "Head",
    "LinearTerms",
    "PowerSums",
    "SparseTeacher",
    "TailSamples",
    "WeightedTerms",
    "available_backends",
    "choices",
    "divergence",
    "divergence_with_stats",
    "hidden_divergence",
    "linear_divergence",
    "linear_scratch_bytes",
    "preset",
    "sparse_divergence",
    "weighted_divergence",
]
