"""The trainers and their configs."""

from hf_distill.trainers.configs import DistillConfig, OPSDConfig
from hf_distill.trainers.distill import DistillTrainer
from hf_distill.trainers.opsd import OPSDTrainer

__all__ = ["DistillConfig", "DistillTrainer", "OPSDConfig", "OPSDTrainer"]
