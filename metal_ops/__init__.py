"""Divergences between a student's and a teacher's softmax, fused with the work around them.

The package is named after its Metal kernels; the same ops run on every device torch has.
"""

from metal_ops._dispatch import available_backends
from metal_ops.functional import (
    DivergenceStats,
    SparseTeacher,
    divergence,
    divergence_with_stats,
    hidden_divergence,
    linear_divergence,
    linear_divergence_with_stats,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.spec import DivergenceSpec

__all__ = [
    "DivergenceSpec",
    "DivergenceStats",
    "SparseTeacher",
    "available_backends",
    "divergence",
    "divergence_with_stats",
    "hidden_divergence",
    "linear_divergence",
    "linear_divergence_with_stats",
    "sparse_divergence",
    "weighted_divergence",
]
