"""Losses: from what student and teacher say of each token to the scalar the optimizer sees."""

from hf_distill.losses.base import (
    ANCHOR_NAME,
    IMPORTANCE_NAMES,
    Anchor,
    Importance,
    Loss,
    LossSettings,
    Terms,
    Tokens,
)
from hf_distill.losses.behaviour import behaviour_log_probs
from hf_distill.losses.contrast import ContrastConfig, ContrastLoss, ContrastWeights
from hf_distill.losses.cross_tokenizer import UNIVERSAL, CrossTokenizerLoss
from hf_distill.losses.divergence import ClipConfig, DivergenceLoss, normalised_jsd
from hf_distill.losses.drift import Drift
from hf_distill.losses.entropy import entropy_share
from hf_distill.losses.finite import not_finite
from hf_distill.losses.function import FunctionLoss, LossFunction, as_loss
from hf_distill.losses.generalized_jsd import generalized_jsd_loss
from hf_distill.losses.hidden_states import (
    HIDDEN_LOSSES,
    HiddenConfig,
    attention_loss,
    hidden_loss,
)
from hf_distill.losses.sampled_tokens import SAMPLED_KINDS, SampledTokenLoss
from hf_distill.losses.spans import SPANS, SpanLoss
from hf_distill.losses.step import step_terms
from hf_distill.losses.taid import TaidConfig, TaidLoss, taid_target

__all__ = [
    "ANCHOR_NAME",
    "HIDDEN_LOSSES",
    "IMPORTANCE_NAMES",
    "SAMPLED_KINDS",
    "SPANS",
    "UNIVERSAL",
    "Anchor",
    "ClipConfig",
    "ContrastConfig",
    "ContrastLoss",
    "ContrastWeights",
    "CrossTokenizerLoss",
    "DivergenceLoss",
    "Drift",
    "FunctionLoss",
    "HiddenConfig",
    "Importance",
    "Loss",
    "LossFunction",
    "LossSettings",
    "SampledTokenLoss",
    "SpanLoss",
    "TaidConfig",
    "TaidLoss",
    "Terms",
    "Tokens",
    "as_loss",
    "attention_loss",
    "behaviour_log_probs",
    "entropy_share",
    "generalized_jsd_loss",
    "hidden_loss",
    "normalised_jsd",
    "not_finite",
    "step_terms",
    "taid_target",
]
