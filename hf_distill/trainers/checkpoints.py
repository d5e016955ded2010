"""Checkpoints that were written to the end, and those that a killed run left half written.

The Trainer writes a checkpoint file by file, and resumes from the folder with the highest step,
whatever is in it. Here trainer_state.json is the mark of a whole one: it is removed before anything
is written over an old checkpoint, and comes last, when every process has written its files.
"""

import json
import logging
import os
import re

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def unmark(folder: str) -> None:
    """Take the mark from a checkpoint that is about to be written again."""
    path = os.path.join(folder, TRAINER_STATE_NAME)
    if os.path.isfile(path):
        os.remove(path)


def flaw(folder: str) -> str | None:
    """Why a checkpoint is not whole, or None."""
    path = os.path.join(folder, TRAINER_STATE_NAME)
    if not os.path.isfile(path):
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)
    except ValueError:
        return f"its {TRAINER_STATE_NAME}, which is written last, ends too early"
    return None


def last_whole(output_dir: str) -> str | None:
    """The folder of the last whole checkpoint; later ones that are not are logged.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    steps = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", x) for x in os.listdir(output_dir))
    latest_first = sorted((x for x in steps if x), key=lambda x: int(x[1]), reverse=True)
    found = [os.path.join(output_dir, x[0]) for x in latest_first]
    for folder in found:
        reason = flaw(folder)
        if reason is None:
            return folder
        logger.warning("%s is passed over: %s; it may be removed", folder, reason)
    if found:
        raise ValueError(
            f"no checkpoint in {output_dir} was written to the end: remove {', '.join(found)} and "
            "start anew"
        )
    return None


def assert_whole(folder: str) -> None:
    """Check a checkpoint that the user names.

    Raises:
        ValueError: it was not written to the end.
    """
    reason = flaw(folder)
    if reason is not None:
        raise ValueError(
            f"the checkpoint {folder} was not written to the end: {reason}; remove the folder and "
            "resume from an earlier one (resume_from_checkpoint=True finds it)"
        )
