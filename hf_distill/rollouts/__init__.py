"""Completions sampled from the student, by one of several engines."""

from hf_distill.rollouts.config import RolloutConfig
from hf_distill.rollouts.engines import ENGINES, Engine, TellEngine, check_engine, make_engine
from hf_distill.rollouts.environments import Environment, Feedback, play
from hf_distill.rollouts.generate import GenerateEngine, generate
from hf_distill.rollouts.sampling import Sampling, cut_at_end_token, end_token_ids

__all__ = [
    "ENGINES",
    "Engine",
    "Environment",
    "Feedback",
    "GenerateEngine",
    "RolloutConfig",
    "Sampling",
    "TellEngine",
    "check_engine",
    "cut_at_end_token",
    "end_token_ids",
    "generate",
    "make_engine",
    "play",
]
