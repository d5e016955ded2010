"""The trainers and their configs."""

from hf_distill.trainers.distill_config import DistillConfig
from hf_distill.trainers.distill_trainer import DistillTrainer
from hf_distill.trainers.opsd_config import OPSDConfig
from hf_distill.trainers.opsd_trainer import OPSDTrainer

__all__ = ["DistillConfig", "DistillTrainer", "OPSDConfig", "OPSDTrainer"]
