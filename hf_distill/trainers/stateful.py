"""What a run keeps beside the model: in checkpoints, and never in the model that is saved."""

import os
from contextlib import nullcontext
from typing import Any

from safetensors.torch import load_file, save_file

from hf_distill.teachers import Teacher
from hf_distill.trainers.hidden import HiddenAlignment
from hf_distill.trainers.hinting import HintingTrainer
from hf_distill.trainers.taid import Taid

TEACHER_FILE = "teacher.safetensors"


class StatefulTrainer(HintingTrainer):
    """A `Trainer` with a teacher, projections of hidden states and the t of TAID, or without."""

    teacher: Teacher | None = None
    _layers: HiddenAlignment | None = None
    _taid: Taid | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; projections of hidden states are a part of the model meanwhile."""
        with nullcontext() if self._layers is None else self._layers.attached():
            return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with nullcontext() if self._layers is None else self._layers.detached():
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with nullcontext() if self._layers is None else self._layers.detached():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with nullcontext() if self._layers is None else self._layers.detached():
            super()._load_best_model()

    def _parts(self) -> list[HiddenAlignment | Taid]:
        """What has a file of its own in a checkpoint."""
        return [part for part in (self._layers, self._taid) if part is not None]

    def _save_extra(self, folder: str) -> None:
        """Write what resuming needs besides the Trainer's own files."""
        state = {} if self.teacher is None else self.teacher.state_dict()
        if state and self.args.should_save:
            save_file(state, os.path.join(folder, TEACHER_FILE))
        for part in self._parts():
            if self.args.should_save:
                part.save(folder)

    def _load_extra(self, folder: str) -> None:
        """Read what `_save_extra` wrote; the state is the checkpoint's."""
        for part in self._parts():
            part.load(folder)
        if self.teacher is None or not self.teacher.state_dict():
            return
        path = os.path.join(folder, TEACHER_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the teacher's state must be in the checkpoint: no {path}")
        self.teacher.load_state_dict(load_file(path))
