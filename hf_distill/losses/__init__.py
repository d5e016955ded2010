"""From what student and teacher say of each token to the scalar the optimizer sees."""

from hf_distill.losses.jsd import generalized_jsd_loss
from hf_distill.losses.objective import Objective, Terms, assert_finite
from hf_distill.losses.sampled import SAMPLED_KINDS, SampledObjective
from hf_distill.losses.step import (
    ANCHOR_NAME,
    IMPORTANCE_NAMES,
    Anchor,
    Importance,
    Scored,
    behaviour_log_probs,
    step_terms,
)
from hf_distill.losses.student import Student, StudentHidden, StudentLogits
from hf_distill.losses.universal import UNIVERSAL, UniversalObjective

__all__ = [
    "ANCHOR_NAME",
    "IMPORTANCE_NAMES",
    "SAMPLED_KINDS",
    "UNIVERSAL",
    "Anchor",
    "Importance",
    "Objective",
    "SampledObjective",
    "Scored",
    "Student",
    "StudentHidden",
    "StudentLogits",
    "Terms",
    "UniversalObjective",
    "assert_finite",
    "behaviour_log_probs",
    "generalized_jsd_loss",
    "step_terms",
]
