"""What a run keeps beside the model, in checkpoints that are whole or not used."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_distill.losses.hidden_states import HiddenAlignment
from hf_distill.losses.taid import TaidCallback
from hf_distill.models.modes import without_checkpoint_wrappers
from hf_distill.models.tensors import assert_same_tensors
from hf_distill.teachers import Teacher
from hf_distill.teachers.base_fingerprint import BaseFingerprint, base_fingerprints

logger = logging.getLogger(__name__)

LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")
WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")  # how files of weights end


def load_renamed(model: PreTrainedModel, folder: str) -> None:
    """Load weights that `save_pretrained` has written under other names than the model has.

    It does so for image-text models whose repositories have old names. `Trainer` looks for the
    model's own names, and would go on with the weights that the model has.

    Args:
        model: without wrappers.
        folder: of the checkpoint.

    Raises:
        ValueError: a weight is missing, or the checkpoint has one of another model.
    """
    read: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    made, found = read
    wrong = {name: sorted(map(str, found[name])) for name in LOADING_FAULTS if found.get(name)}
    if wrong:
        raise ValueError(f"{folder} must have the weights of a {type(model).__name__}: {wrong}")
    model.load_state_dict(made.state_dict())


def remove_mark(folder: str) -> None:
    """Take the mark from a checkpoint that is about to be written again."""
    path = os.path.join(folder, TRAINER_STATE_NAME)
    if os.path.isfile(path):
        os.remove(path)


def find_flaw(folder: str) -> str | None:
    """Return why a checkpoint is not whole, or None."""
    path = os.path.join(folder, TRAINER_STATE_NAME)
    if not os.path.isfile(path):
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)
    except ValueError:
        return f"its {TRAINER_STATE_NAME}, which is written last, ends too early"
    return None


def last_whole_checkpoint(output_dir: str) -> str | None:
    """Return the folder of the last whole checkpoint, and log later ones that are not.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    steps = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", x) for x in os.listdir(output_dir))
    latest_first = sorted((x for x in steps if x), key=lambda x: int(x[1]), reverse=True)
    found = [os.path.join(output_dir, x[0]) for x in latest_first]
    for folder in found:
        reason = find_flaw(folder)
        if reason is None:
            return folder
        logger.warning("%s is passed over: %s; it may be removed", folder, reason)
    if found:
        raise ValueError(
            f"no checkpoint in {output_dir} was written to the end: remove {', '.join(found)} and "
            "start anew"
        )
    return None


def assert_whole_checkpoint(folder: str) -> None:
    """Check a checkpoint that the user names.

    Raises:
        ValueError: there is none, or it was not written to the end.
    """
    reason = find_absence(folder)
    if reason is not None:
        raise ValueError(f"Can't find a valid checkpoint at {folder}: {reason}")
    reason = find_flaw(folder)
    if reason is not None:
        raise ValueError(
            f"the checkpoint {folder} was not written to the end: {reason}; remove the folder and "
            "resume from an earlier one (resume_from_checkpoint=True finds it). If it is a saved "
            "model, load the model from it and train without resume_from_checkpoint"
        )


def find_absence(folder: str) -> str | None:
    """Return why a path is no checkpoint at all, not even one that is not whole, or None."""
    if not os.path.isdir(folder):
        return "there is no such folder"
    names = os.listdir(folder)
    if TRAINER_STATE_NAME in names:
        return None
    inside = [x for x in names if x.startswith(f"{PREFIX_CHECKPOINT_DIR}-")]
    if inside:
        last = max(inside, key=lambda x: (len(x), x))
        return f"it holds checkpoints, of which one must be named, {last} say"
    return None if any(x.endswith(WEIGHTS) for x in names) else "it holds no weights"


ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


def zero_ranks(folder: str) -> set[int]:
    """Return the ranks whose part of the optimizer DeepSpeed's ZeRO has written to a checkpoint.

    On machines without a shared disk a folder has those of its own machine only.
    """
    latest = os.path.join(folder, "latest")
    if not os.path.isfile(latest):
        return set()
    with open(latest, encoding="utf-8") as file:
        inner = os.path.join(folder, file.read().strip())
    names = os.listdir(inner) if os.path.isdir(inner) else []
    found = (ZERO_FILE.fullmatch(x) for x in names)
    return {int(x[1]) for x in found if x}


class ResumableTrainer(Trainer):
    """Keeps files of a subclass in its checkpoints, and passes over those that are not whole."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Do as `Trainer` does, but pass over checkpoints that were not written to the end.

        Raises:
            ValueError: the checkpoint that is named, or every one there is, is such a one; or
                DeepSpeed cannot go on from it.
        """
        if resume_from_checkpoint is True:
            found = last_whole_checkpoint(cast(str, self.args.output_dir))
            resume_from_checkpoint = True if found is None else found
        elif resume_from_checkpoint:
            assert_whole_checkpoint(resume_from_checkpoint)
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, str):
            self._check_processes(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _check_processes(self, folder: str) -> None:
        """Check that as many processes go on from a checkpoint of ZeRO as have written it.

        Raises:
            ValueError: they are others.
        """
        plugin = cast(Any, self.accelerator.state).deepspeed_plugin
        if plugin.get_value("checkpoint.load_universal", False):
            return
        ranks, own, world = zero_ranks(folder), self.args.process_index, self.args.world_size
        fits = not ranks or (own in ranks and max(ranks) < world)
        if any(gather_object([not fits])):  # all processes say so, or none
            raise ValueError(
                f"DeepSpeed goes on from a checkpoint with as many processes as have written it, "
                f"{folder} has parts of {len(ranks)} and this run has {world}: take as many, or "
                "DeepSpeed's universal checkpoints (checkpoint.load_universal in its config)"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            remove_mark(os.path.join(self._get_output_dir(trial), folder))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # the Trainer's last file before trainer_state.json, the upload and the removal of old ones
        super()._save_rng_state(output_dir)
        self._save_extra(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_extra(self, folder: str) -> None:
        """Write what resuming needs besides the Trainer's own files."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # first: an optimizer of other tensors does not say whose
            self._load_extra(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_extra(self, folder: str) -> None:
        """Read what `_save_extra` wrote; the state is the checkpoint's."""


TEACHER_FILE = "teacher.safetensors"


def add_to_optimizer(
    optimizer: torch.optim.Optimizer, projections: nn.Module, student: nn.Module, scheduler: Any
) -> None:
    """Put projections of hidden layers into an optimizer that was made without them.

    Args:
        optimizer: one that lists parameters of the student; another trains what it finds.
        projections: their parameters get the optimizer's own defaults.
        student: that they are a part of.
        scheduler: the user's, or None.

    Raises:
        ValueError: there is a scheduler, which has a rate for the groups that it knows only.
    """
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in projections.parameters() if p.requires_grad and id(p) not in listed]
    if not missing or not any(id(p) in listed for p in student.parameters()):
        return
    if scheduler is not None:
        raise ValueError(
            "hidden_layers of different widths have projections, which must be trained: they are "
            f"not in the {type(optimizer).__name__} that was given with its scheduler; give "
            "optimizers=(optimizer, None), to which they are added, or optimizer_cls_and_kwargs"
        )
    optimizer.add_param_group({"params": missing})
    logger.info(
        "%d projections of hidden layers were added to the optimizer, with its defaults",
        len(missing),
    )


def check_are_parameters(accelerator: Accelerator, layers: HiddenAlignment) -> None:
    """Check that projections of hidden layers stay parameters, which checkpoints are made of.

    Raises:
        ValueError: FSDP 1 is told to keep flat tensors only.
    """
    if layers.projections is None or accelerator.distributed_type != DistributedType.FSDP:
        return
    if not (accelerator.is_fsdp2 or cast(Any, accelerator.state).fsdp_plugin.use_orig_params):
        raise ValueError(
            "hidden_layers of different widths have projections, which FSDP 1 keeps as parameters "
            "of their own with use_orig_params only: leave it out of fsdp_config, got False"
        )


class StatefulTrainer(ResumableTrainer):
    """Keeps a teacher, projections of hidden states and the t of TAID, where there are any."""

    teacher: Teacher | None = None
    _layers: HiddenAlignment | None = None
    _taid: TaidCallback | None = None
    _has_other_names: bool = False  # the weights of the checkpoint that was read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._attached = ExitStack()
        super().__init__(*args, **kwargs)

    def _attach_layers(self) -> None:
        """Make projections of hidden layers a part of the model from now on."""
        if self._layers is not None:
            check_are_parameters(self.accelerator, self._layers)
            self._attached.enter_context(self._layers.attached())

    def _detach_layers(self) -> None:
        """Make the model what it was before `_attach_layers`."""
        self._attached.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Do as `Trainer` does; a user's optimizer gets the projections of hidden layers too.

        Raises:
            ValueError: they cannot be put into it, because its scheduler is the user's as well.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        projections = None if self._layers is None else self._layers.projections
        if projections is not None:
            add_to_optimizer(optimizer, projections, cast(nn.Module, self.model), self.lr_scheduler)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do as `Trainer` does; a model whose checkpoints FSDP writes in pieces is written whole.

        The `Trainer` writes nothing where the `state_dict_type` of FSDP is not FULL_STATE_DICT.
        """
        if self.is_fsdp_enabled and not _internal_call:
            kind = str(cast(Any, self.accelerator.state).fsdp_plugin.state_dict_type)
            if "FULL_STATE_DICT" not in kind:
                logger.info("save_model: the whole model, though checkpoints are by %s", kind)
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._layers is not None and state_dict is not None:
            state_dict = self._layers.left_out(state_dict)
        with self._bare(), nullcontext() if self._layers is None else self._layers.detached():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._bare():  # an engine's weights are written here as well
            super()._save_optimizer_and_scheduler(output_dir)

    def _bare(self) -> AbstractContextManager[None]:
        return without_checkpoint_wrappers(cast(nn.Module, self.model_wrapped))

    @contextmanager
    def _as_checkpoints_have_it(self) -> Iterator[None]:
        """Inside the block the model has the modules that its checkpoints have weights of."""
        of_engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        layers = None if of_engine else self._layers
        with self._bare(), nullcontext() if layers is None else layers.detached():
            yield

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._as_checkpoints_have_it():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_renamed(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Do as `Trainer` does, but for weights that have other names in a checkpoint."""
        others = bool(load_result.missing_keys and load_result.unexpected_keys)
        self._has_other_names = others and isinstance(self.model, PreTrainedModel)
        if not self._has_other_names:
            super()._issue_warnings_after_load(load_result)

    def _load_renamed(self, folder: str) -> None:
        if self._has_other_names:
            self._has_other_names = False
            load_renamed(cast(PreTrainedModel, self.model), folder)

    def _load_best_model(self) -> None:
        with self._as_checkpoints_have_it():
            super()._load_best_model()
            self._load_renamed(cast(str, self.state.best_model_checkpoint))
        folder = cast(str, self.state.best_model_checkpoint)
        if self._layers is not None and self._layers.is_in(folder):
            self._layers.load(folder, cast(nn.Module, self.model_wrapped))

    def _parts(self) -> list[TaidCallback | BaseFingerprint]:
        """Return what one process writes to a file of its own in a checkpoint."""
        bases = base_fingerprints(self.teacher, cast(nn.Module, self.model))
        return [*bases, *([] if self._taid is None else [self._taid])]

    def _save_extra(self, folder: str) -> None:
        """Write what resuming needs besides the Trainer's own files."""
        state = {} if self.teacher is None else self.teacher.state_dict()
        if state and self.args.should_save:
            save_file(state, os.path.join(folder, TEACHER_FILE))
        if self._layers is not None:
            self._layers.save(folder, cast(nn.Module, self.model_wrapped), self.args.should_save)
        for part in self._parts():
            if self.args.should_save:
                part.save(folder)

    def _load_extra(self, folder: str) -> None:
        """Read what `_save_extra` wrote; the state is the checkpoint's.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file is of a run with another student, teacher or layers.
        """
        for part in self._parts():
            part.load(folder)
        if self._layers is not None:
            self._layers.load(folder, cast(nn.Module, self.model_wrapped))
        path = os.path.join(folder, TEACHER_FILE)
        wanted = {} if self.teacher is None else self.teacher.state_dict()
        if self.teacher is None or not wanted:
            if os.path.isfile(path):
                logger.warning("%s is not read: this run's teacher has no state to restore", path)
            return
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the teacher's state must be in the checkpoint: no {path}")
        found = load_file(path)
        assert_same_tensors(path, found, wanted)
        self.teacher.load_state_dict(found)
