"""What must hold before a run begins."""

import copy
import logging
import os
from collections.abc import Sequence
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_distill.data.cross_tokenizer_collator import find_cross_tokenizer_collator
from hf_distill.data.hint_collator import HintCollator, find_hint_collator, hint_collator_behind
from hf_distill.data.hint_schedule import hint_schedule_of
from hf_distill.data.span_collator import find_span_collator
from hf_distill.data.token_weights import TokenWeightsConfig
from hf_distill.losses import (
    Loss,
    LossFunction,
    TaidLoss,
    as_loss,
)
from hf_distill.models.heads_apart import shard_heads
from hf_distill.models.pieces import cut_heads, unevenly_held_twice
from hf_distill.models.structure import Kind, check_kind
from hf_distill.run import Run
from hf_distill.teachers import SelfTeacher, Teacher, has_adapters
from hf_distill.trainers import config_schedules
from hf_distill.trainers.distill_config import DistillConfig
from hf_distill.trainers.opsd_config import OPSDConfig

logger = logging.getLogger(__name__)


def check_config(args: Any, trainer: str, has_rollouts: bool) -> None:
    """Check that a config is one that a trainer reads.

    Args:
        args: the config.
        trainer: the name of its class.
        has_rollouts: whether the trainer reads what an `OPSDConfig` adds.

    Raises:
        TypeError: it is another.
    """
    if not isinstance(args, DistillConfig):
        raise TypeError(f"args must be a DistillConfig, got {type(args).__name__}")
    if isinstance(args, OPSDConfig) and not has_rollouts:
        raise TypeError(
            f"a {trainer} reads a DistillConfig, got {type(args).__name__}: its teacher, rollouts "
            "and anchor are read by an OPSDTrainer"
        )


def own_loss(loss: Loss | LossFunction, args: DistillConfig) -> Loss:
    """Return the user's loss as a trainer keeps it: a copy, whose share follows the config.

    Raises:
        TypeError: see `losses.as_loss`.
        ValueError: it has a share of its own.
    """
    made = as_loss(loss)
    if made.alpha != Loss.alpha:
        raise ValueError(
            "the alpha of a loss is the share of the soft loss, which a trainer takes from its "
            f"config, got {made.alpha} in {made!r} and {args.alpha} in the config: set it there, "
            "or give an attribute of your own another name"
        )
    return copy.copy(made)


def losses_of_run(args: DistillConfig, own: Loss | None) -> Sequence[Loss]:
    """Return the losses at the ends of all schedules and between them, see `Run`."""
    if own is None:
        return tuple(args.losses())
    ends = config_schedules.bounds(args, "alpha")
    return [own.with_share(alpha, args.measures_hard) for alpha in ends]


def check_setup(run: Run) -> None:
    """Check a run before its teacher is prepared.

    Raises:
        ValueError: its loss could not be right; the message names the rule and the value.
    """
    _check_processes(run)
    _check_engine(run)
    _check_recomputed(run)
    _check_tied(run)
    _check_heads("student", run.student)
    _check_best_model(run)
    for teacher in run.teachers:
        _check_same_rows(run, teacher)
        _check_heads("teacher", getattr(teacher, "model", None))
        _check_dense(run, teacher)
        _check_drift(run, teacher)
        _check_temperature(run, teacher)
        teacher.check(run)
    _check_contrast(run)
    _check_base_kl(run)
    if run.kind == Kind.CAUSAL:
        check_kind(run.language_model, "student")
        check_hints(find_hint_collator(run.collator), run.teacher)
    _check_whole_rows(run)


def shard_loss(accelerator: Accelerator, has_teacher: bool) -> None:
    """Let output heads stay in pieces, of the models that are prepared from here on.

    Raises:
        ValueError: the engine is not FSDP 2, or there is no teacher.
    """
    kind = accelerator.distributed_type
    if kind != DistributedType.FSDP or not accelerator.is_fsdp2:
        version = " of version 1" if kind == DistributedType.FSDP else ""
        raise ValueError(f"shard_loss needs FSDP 2, got {kind.value}{version}")
    if not has_teacher:
        raise ValueError("shard_loss needs a teacher, whose soft loss it shards; got None")
    shard_heads(accelerator)


def check_hints(collator: HintCollator | None, teacher: Teacher) -> None:
    """Require hints where the teacher is the student itself, which teaches by hints alone.

    Args:
        collator: the trainer's own, or None if another makes the rows.
        teacher: of the run.
    """
    if collator is None or not isinstance(teacher, SelfTeacher):
        return
    collator.needs_hints = True
    if not (collator.hints or collator.has_own_view):
        logger.warning(
            "there are no hints, and the teacher is the student itself (%s), so both say the same "
            "and nothing is taught: give the HintCollator hints, or another model as teacher",
            teacher.kind,
        )


def _check_temperature(run: Run, teacher: Teacher) -> None:
    given = config_schedules.bounds(run.args, "temperature")
    known = teacher.temperature
    if known is not None and not run.own_loss and given != (known, known):
        raise ValueError(
            f"a {type(teacher).__name__}'s log-probabilities are at temperature {known:g}: set "
            f"temperature={known}, got {run.args.temperature}"
        )


def _check_dense(run: Run, teacher: Teacher) -> None:
    """Check that the teacher says what the loss reads."""
    if teacher.dense:
        return
    for loss in run.losses:
        if loss.needs_dense:
            raise ValueError(
                f"{_named(run, loss)} reads the teacher's log-probabilities of the whole "
                f"vocabulary, of which a {type(teacher).__name__} knows some: take another "
                f"{'loss' if run.own_loss else 'divergence'}, a cache with the codec 'full', or a "
                "teacher with logits or hidden states"
            )


def _check_drift(run: Run, teacher: Teacher) -> None:
    """Check that the teacher has a probability for each of the student's tokens."""
    drift = cast(TokenWeightsConfig, run.args.token_weights).drift
    finds = find_cross_tokenizer_collator, find_span_collator
    other_tokens = any(find(run.collator) is not None for find in finds)
    if drift > 0 and (other_tokens or not teacher.dense):
        why = "another tokenizer" if other_tokens else "some entries of the vocabulary"
        raise ValueError(
            "token_weights.drift needs the teacher's probability of each token of the student, got "
            f"{drift} and a {type(teacher).__name__} of {why}"
        )


def _check_base_kl(run: Run) -> None:
    """Check that the base is at hand where the student is to stay near it.

    Raises:
        ValueError: it is not, or the student has no tokens.
    """
    weight, teacher = getattr(run.args, "base_kl_weight", 0.0), run.teacher
    if weight == 0:
        return
    kind = teacher.kind if isinstance(teacher, SelfTeacher) else type(teacher).__name__
    if kind != "base" or run.kind != Kind.CAUSAL:
        raise ValueError(
            "base_kl_weight needs the teacher 'base', which is the student before training, and a "
            f"causal LM; got {weight} with the teacher {kind!r}"
        )


def _check_contrast(run: Run) -> None:
    """Check that the teacher can read a second context, where the collator makes one.

    Raises:
        ValueError: it cannot.
    """
    collator = hint_collator_behind(run.collator)
    if collator is None or not collator.contrasts:
        return
    if not isinstance(run.args, OPSDConfig):
        raise ValueError(
            "a HintCollator with a contrast needs an OPSDTrainer (with on_policy=False for "
            f"completions of the data), got a {type(run.args).__name__}"
        )
    for teacher in run.teachers:
        if not (teacher.dense and teacher.knows_new_rows):
            raise ValueError(
                "a contrast needs a teacher that can be asked about a second context, and that "
                f"says the whole vocabulary; got a {type(teacher).__name__}"
            )


def _named(run: Run, loss: Loss) -> str:
    if run.own_loss:
        return f"the loss {loss!r}"
    return "taid" if isinstance(loss, TaidLoss) else f"divergence {run.args.divergence!r}"


def check_anchor(anchor_weight: float, own_hard_loss: bool) -> None:
    """Check that anchor rows, learnt by cross-entropy, meet no other hard loss.

    Raises:
        ValueError: there is an anchor and another hard loss.
    """
    if anchor_weight > 0 and own_hard_loss:
        raise ValueError(
            f"anchor_weight {anchor_weight} > 0 is a plain cross-entropy; it cannot "
            "be combined with label smoothing, compute_loss_func or a model's own loss"
        )


def check_unweighted(weights: Sequence[Tensor | None]) -> None:
    """Check that batches have no weights of tokens, which the hard loss could not read.

    Raises:
        ValueError: one has.
    """
    if any(each is not None for each in weights):
        raise ValueError(
            "weights of tokens reach neither label smoothing nor compute_loss_func nor a model's "
            "own loss, got both"
        )


def hidden_states_refusal(run: Run, own_hard_loss: bool) -> str | None:
    """Return why a run must read logits and not hidden states, or None."""
    if run.kind.has_classes:
        return "a classifier has few logits"
    if run.args.torch_compile:
        return "torch_compile"
    if own_hard_loss:
        return "label smoothing, compute_loss_func and a model's own loss take logits"
    return None


def _check_whole_rows(run: Run) -> None:
    """Check that each process has whole rows: a token's label is the next one of its row."""
    if run.num_parts > 1:
        raise ValueError(
            "each process must have whole rows, got rows that are split over "
            f"{run.num_parts} processes (context or sequence parallelism): take FSDP, DeepSpeed or "
            "tensor parallelism, or shorter rows"
        )


def _check_engine(run: Run) -> None:
    """Check that the engine that was asked for is the one that there is."""
    args, kind = run.args, run.accelerator.distributed_type
    asked = {"fsdp": bool(args.fsdp), "deepspeed": args.deepspeed is not None}
    asked["fsdp"] |= os.environ.get("ACCELERATE_USE_FSDP") == "true"
    asked["deepspeed"] |= os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    plain = kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    for name, is_asked in asked.items():
        if is_asked and plain and args.use_cpu:
            raise ValueError(
                f"{name} needs devices, and with use_cpu accelerate starts plain data parallel "
                f"processes instead, got {name}={getattr(args, name)!r}, use_cpu=True and "
                f"distributed_type {kind.value}: leave out one of the two"
            )
        if is_asked and plain:
            logger.warning(
                "%s was asked for, but accelerate found no devices for it and made "
                "distributed_type %s: nothing is cut into pieces",
                name,
                kind.value,
            )


def _check_recomputed(run: Run) -> None:
    """Check that layers that are compared are not recomputed by FSDP's own checkpointing."""
    plugin = getattr(getattr(run.accelerator, "state", None), "fsdp_plugin", None)
    if getattr(plugin, "activation_checkpointing", False) and run.args.hidden_layers is not None:
        raise ValueError(
            "hidden_layers must not be compared under FSDP's own activation checkpointing, which "
            "recomputes them without being watched, got fsdp_config activation_checkpointing=True "
            f"and hidden_layers={run.args.hidden_layers!r}: leave out one of the two"
        )


def _check_tied(run: Run) -> None:
    """Check that each process has as many rows of embeddings that are a head's weights too."""
    name = unevenly_held_twice(run.student)
    if name is not None:
        raise ValueError(
            "embeddings that are tied to the head must have as many rows on each process where "
            "Transformers shards the model at loading (of two padded copies only one would be "
            f"trained), got {name} of {run.student.get_parameter(name).shape[0]} rows on "
            f"{run.accelerator.num_processes} processes: take a number of processes that divides "
            "it, or accelerate's FSDP"
        )


def _check_heads(name: str, model: Any) -> None:
    """Check that each process of a model under tensor parallelism has whole attention heads."""
    size = getattr(model, "_tp_size", None) or 1 if isinstance(model, nn.Module) else 1
    cut = cut_heads(model) if size > 1 else None
    if cut is not None:
        raise ValueError(
            f"the attention heads of the {name} must be divisible by tp_size, got tp_size {size} "
            f"and {cut}, whose heads are cut: take a tp_size that divides num_attention_heads and "
            "num_key_value_heads"
        )


def _check_best_model(run: Run) -> None:
    """Check that the best model can be loaded at the end."""
    is_fsdp = run.accelerator.distributed_type == DistributedType.FSDP
    if not is_fsdp or run.accelerator.is_fsdp2:
        return
    if getattr(run.args, "load_best_model_at_end", False) and has_adapters(run.student):
        raise ValueError(
            "the best model's adapters are not loaded under FSDP 1 (the Trainer leaves other "
            "weights, and says nothing), got load_best_model_at_end=True and a student with "
            "adapters: take FSDP 2, or load the best checkpoint after training"
        )


def _check_same_rows(run: Run, teacher: Teacher) -> None:
    """Check that processes that compute a teacher together ask it about the same rows."""
    size = getattr(getattr(teacher, "model", None), "_tp_size", None) or 1
    if size not in (1, run.num_copies):
        raise ValueError(
            f"a teacher under tensor parallelism over {size} processes must be asked about the "
            f"same rows by all of them, and the student's rows are shared by {run.num_copies}: "
            "load the student with the same tp_size, or the teacher without"
        )


def check_without_teacher(args: DistillConfig, collator: Any, own_loss: Any) -> None:
    """Check a trainer that has no teacher.

    Args:
        args: its config.
        collator: its data collator.
        own_loss: the user's, or None.

    Raises:
        ValueError: a setting is of what a teacher says.
    """
    if own_loss is not None:
        raise ValueError(f"a loss of your own compares with a teacher, got {own_loss!r} and None")
    if cast(TokenWeightsConfig, args.token_weights).active():
        raise ValueError("token_weights need a teacher; without one this is a Trainer")
    if hint_schedule_of(collator) is not None:
        raise ValueError("hints that depend on the step need a teacher, got None")


def _check_processes(run: Run) -> None:
    if run.args.n_gpu > 1:
        raise ValueError(
            f"one process per device is needed, got {run.args.n_gpu} GPUs in one process: "
            "start the script with `accelerate launch`"
        )
    # accelerate sets MASTER_ADDR if several processes were asked for; without MPI it starts one
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True"
    if on_cpu and "MASTER_ADDR" in os.environ and run.accelerator.num_processes == 1:
        logger.warning(
            "`accelerate launch --cpu --num_processes N` starts one process unless MPI is "
            "set up; `accelerate launch --multi_gpu --num_processes N` with --use_cpu in "
            "the training arguments starts N processes on the CPU"
        )
