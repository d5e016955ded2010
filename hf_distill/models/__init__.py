"""Models: what they are made of, and what they say about scored tokens."""

from hf_distill.models.forward import Reader
from hf_distill.models.modes import evaluating, kept_rng
from hf_distill.models.signals import Head, Signal, TailRule
from hf_distill.models.structure import causal_lm, is_classifier, unwrap, vocab_size

__all__ = [
    "Head",
    "Reader",
    "Signal",
    "TailRule",
    "causal_lm",
    "evaluating",
    "is_classifier",
    "kept_rng",
    "unwrap",
    "vocab_size",
]
