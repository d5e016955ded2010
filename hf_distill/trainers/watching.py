"""The watchdog and the probe of a run."""

import logging
from typing import TYPE_CHECKING, cast

from hf_distill.probes import Probe, make_probe
from hf_distill.teachers import Teacher
from hf_distill.trainers import classifiers
from hf_distill.trainers.groups import WatchdogConfig

if TYPE_CHECKING:
    from hf_distill.trainers.distill import DistillTrainer

logger = logging.getLogger(__name__)


def add_watchdog(trainer: "DistillTrainer", teacher: Teacher) -> Probe | None:
    """Add the watchdog to the callbacks, unless it is off; the probe that it needs, or None."""
    config = cast(WatchdogConfig, trainer.args.watchdog)
    if config.action == "off":
        return None
    of_rows = trainer._classification is not None
    config = classifiers.without_text_limits(config) if of_rows else config
    # before the callbacks that report, so that they see its metrics
    watchdog = config.make()
    watchdog.vocab = trainer._vocabulary.size
    trainer.callback_handler.callbacks.insert(0, watchdog)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.info("the watchdog does not probe the teacher: parameters are sharded")
        return None
    return None if of_rows else make_probe(teacher, trainer.accelerator)
