"""What tells one frozen copy of the student from another, in the checkpoints of its run.

The copy that the teacher "base" keeps of a wholly trained model is taken when the trainer is made.
A run that is resumed must be given the same model as before, or its teacher is another one.
"""

import json
import logging
import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.self_teacher import SelfTeacher

logger = logging.getLogger(__name__)

FILE = "base_fingerprint.json"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
PIECE = 2**24  # values that are added at once, as int64

Fingerprint = dict[str, list[Any]]  # of each parameter its dtype and the sum of its bits

_KNOWN: WeakKeyDictionary[nn.Module, Fingerprint] = WeakKeyDictionary()


def _sum_of_bits(values: Tensor) -> int:
    """Return the sum of the values' bits, read as integers: the same on every device."""
    bits = values.contiguous().flatten().view(INTEGERS[values.element_size()])
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(PIECE))


@torch.no_grad()
def fingerprint(frozen: nn.Module) -> Fingerprint:
    """Return what tells a frozen model's weights from others; it is read once.

    Parameters without values of their own here (in pieces, quantized, on no device) are left out.
    """
    if frozen not in _KNOWN:
        _KNOWN[frozen] = {
            name: [str(p.dtype).removeprefix("torch."), _sum_of_bits(p.data)]
            for name, p in frozen.named_parameters()
            if type(p.data) is Tensor and not p.is_meta and p.is_floating_point()
        }
    return _KNOWN[frozen]


class BaseFingerprint:
    """Keeps in checkpoints which frozen copy a run's teacher is.

    Args:
        frozen: the copy.
    """

    def __init__(self, frozen: nn.Module) -> None:
        self.frozen = frozen

    def save(self, folder: str) -> None:
        """Write it into a checkpoint."""
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
            json.dump(fingerprint(self.frozen), file)

    def load(self, folder: str) -> None:
        """Compare with that of a checkpoint.

        Raises:
            ValueError: the copy has other weights.
        """
        path = os.path.join(folder, FILE)
        if not os.path.isfile(path):
            logger.warning(
                "there is no %s: it is not known whether teacher 'base', a copy of the model that "
                "the trainer was built with, is that of the run that is resumed",
                path,
            )
            return
        with open(path, encoding="utf-8") as file:
            there = json.load(file)
        here = fingerprint(self.frozen)
        same = [name for name in here if name in there and here[name][0] == there[name][0]]
        if len(same) < len(here):
            logger.warning(
                "teacher 'base' is compared with that of %s in %d of %d parameters: the others "
                "have another name or dtype there",
                *(path, len(same), len(here)),
            )
        odd = [name for name in same if here[name] != there[name]]
        if odd:
            raise ValueError(
                "to resume, the trainer must be built with the model as it was before training, "
                "because teacher 'base' is its copy (the checkpoint's weights are loaded after "
                f"that); {len(odd)} of {len(same)} parameters have other values than at the start "
                f"of the run of {folder}, the first is {odd[0]!r}. To go on with another base, "
                f"remove {path}"
            )


def base_fingerprints(teacher: Teacher | None, student: nn.Module) -> list[BaseFingerprint]:
    """Return that of the teacher's frozen copy, if it has one; several copies are the same.

    Args:
        teacher: of the run.
        student: which a self-teacher without a copy runs itself.
    """
    own = [x for x in (teacher.each() if teacher else ()) if isinstance(x, SelfTeacher)]
    copies = [x for x in (each.watched_model(student) for each in own) if x is not student]
    return [BaseFingerprint(x) for x in copies[:1]]
