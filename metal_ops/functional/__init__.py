"""Offers the public ops, which check their arguments and call the backend that fits."""

from metal_ops.functional._arguments import DivergenceStats, forbid_second_derivative
from metal_ops.functional.head import Head, OwnRows, gather_shards, is_dtensor, one_local
from metal_ops.functional.hidden import hidden_divergence
from metal_ops.functional.linear import LinearTerms, linear_divergence, linear_scratch_bytes
from metal_ops.functional.logits import (
    WeightedTerms,
    divergence,
    divergence_with_stats,
    weighted_divergence,
)
from metal_ops.functional.sparse import sparse_divergence
from metal_ops.functional.sparse_teacher import PowerSums, SparseTeacher, TailSamples

__all__ = [
    "DivergenceStats",
    "Head",
    "LinearTerms",
    "OwnRows",
    "PowerSums",
    "SparseTeacher",
    "TailSamples",
    "WeightedTerms",
    "divergence",
    "divergence_with_stats",
    "forbid_second_derivative",
    "gather_shards",
    "hidden_divergence",
    "is_dtensor",
    "linear_divergence",
    "linear_scratch_bytes",
    "one_local",
    "sparse_divergence",
    "weighted_divergence",
]
