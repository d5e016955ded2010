"""The trainers and their configs."""

from hf_distill.trainers.distill import DistillConfig, DistillTrainer
from hf_distill.trainers.opsd import OPSDConfig, OPSDTrainer

__all__ = ["DistillConfig", "DistillTrainer", "OPSDConfig", "OPSDTrainer"]
