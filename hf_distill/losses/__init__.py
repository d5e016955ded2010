"""From what student and teacher say of each token to the scalar the optimizer sees."""

from hf_distill.losses.base import (
    ANCHOR_NAME,
    IMPORTANCE_NAMES,
    Anchor,
    Importance,
    Scored,
    behaviour_log_probs,
    step_terms,
)
from hf_distill.losses.cross_tokenizer import UNIVERSAL, UniversalObjective
from hf_distill.losses.divergence import Objective, Terms, assert_finite, normalised_jsd
from hf_distill.losses.entropy import entropy_share
from hf_distill.losses.generalized_jsd import generalized_jsd_loss
from hf_distill.losses.hidden_states import HIDDEN_LOSSES, attention_loss, hidden_loss
from hf_distill.losses.sampled_tokens import SAMPLED_KINDS, SampledObjective
from hf_distill.losses.student import AnyObjective, Student, StudentHidden, StudentLogits
from hf_distill.losses.taid import TaidObjective, taid_target

__all__ = [
    "ANCHOR_NAME",
    "HIDDEN_LOSSES",
    "IMPORTANCE_NAMES",
    "SAMPLED_KINDS",
    "UNIVERSAL",
    "Anchor",
    "AnyObjective",
    "Importance",
    "Objective",
    "SampledObjective",
    "Scored",
    "Student",
    "StudentHidden",
    "StudentLogits",
    "TaidObjective",
    "Terms",
    "UniversalObjective",
    "assert_finite",
    "attention_loss",
    "behaviour_log_probs",
    "entropy_share",
    "generalized_jsd_loss",
    "hidden_loss",
    "normalised_jsd",
    "step_terms",
    "taid_target",
]
