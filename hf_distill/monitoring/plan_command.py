"""The command `plan`: what a device needs on each engine, as a table or as JSON."""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from typing import Any

from hf_distill.monitoring.memory_plan import ENGINES, Planner, first_that_fits, plan_all
from hf_distill.monitoring.model_sizes import load_config
from hf_distill.monitoring.plan_settings import DTYPES, MOMENTS, OPTIMS, Plan, PlanSettings
from hf_distill.teachers.self_teacher import SELF_TEACHERS

logger = logging.getLogger(__name__)

GIB = 2**30
SHARE = 0.9  # of a device's memory that a plan may take: its context and gaps are in no plan
TITLES = ("at the loss", "in the backward", "at the step")


def add_plan(parsers: Any) -> None:
    """Add the command to those of a command line."""
    plan = parsers.add_parser("plan", help="how much memory a run takes on a device")
    plan.set_defaults(run=run)
    plan.add_argument("model", help="the student: of the hub, or a folder with config.json")
    plan.add_argument("teacher_model", nargs="?", metavar="TEACHER", help="another model")
    plan.add_argument("--engine", choices=ENGINES, help="all that there are, if it is left out")
    plan.add_argument("--devices", type=int, default=1, help="of all machines; 1, if left out")
    plan.add_argument("--memory", type=float, help="GiB of a device: name the first engine to fit")
    plan.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the student's weights; %(default)s, if left out",
    )
    plan.add_argument(
        "--bf16", action="store_true", help="mixed precision, as in TrainingArguments"
    )
    plan.add_argument("--batch_size", type=int, default=1, help="rows on a device; 1, if left out")
    plan.add_argument("--length", type=int, default=1024, help="tokens of a row; 1024, if left out")
    plan.add_argument("--scored_tokens", type=int, help="of a batch on a device, if not all")
    plan.add_argument("--gradient_accumulation_steps", type=int, default=1, help="1, if left out")
    plan.add_argument("--gradient_checkpointing", action="store_true")
    plan.add_argument("--optim", default="adamw", choices=OPTIMS, help="adamw, if left out")
    plan.add_argument("--lora_rank", type=int, help="train adapters on all linear layers")
    plan.add_argument("--teacher", choices=SELF_TEACHERS, help="without TEACHER: base, if left out")
    plan.add_argument("--teacher_dtype", choices=DTYPES, help="its config's, if it is left out")
    plan.add_argument("--reduce_bucket_size", type=int, help="DeepSpeed's; 'auto', if left out")
    plan.add_argument("--shard_loss", action="store_true", help="of FSDP 2: heads stay in pieces")
    plan.add_argument(
        "--device", default="cuda", choices=("cuda", "mps", "cpu"), help="cuda, if left out"
    )
    plan.add_argument("--json", action="store_true", help="bytes, for programs")


def settings_of(options: argparse.Namespace) -> PlanSettings:
    """Return the settings that a command line gives.

    Raises:
        ValueError: TEACHER and --teacher are both given, or a value is out of range.
    """
    if options.teacher_model is not None and options.teacher is not None:
        raise ValueError(
            "the teacher is another model or the student itself, got TEACHER "
            f"{options.teacher_model!r} and --teacher {options.teacher}"
        )
    if options.memory is not None and not options.memory > 0:
        raise ValueError(f"memory must be above 0 GiB, got {options.memory:g}")
    if options.shard_loss and options.engine not in (None, "fsdp2"):
        raise ValueError(f"shard_loss needs engine fsdp2, got {options.engine}")
    given = {x: getattr(options, x) for x in PlanSettings.__dataclass_fields__ if x != "teacher"}
    kind = options.teacher or "base"
    return PlanSettings(**given, teacher="model" if options.teacher_model is not None else kind)


def run(options: argparse.Namespace) -> int:
    """Print the plan of one engine or of all; returns the exit status."""
    try:
        settings = settings_of(options)
        student = load_config(options.model)
        teacher = None if options.teacher_model is None else load_config(options.teacher_model)
        planner = Planner(student, teacher, settings)
        plans, refused = _plans(planner, options.engine)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    for remark in remarks(planner):
        logger.warning("%s", remark)
    fits = None
    if options.memory is not None:
        fits = first_that_fits(plans, int(options.memory * GIB * SHARE))
    if options.json:
        found = {"assumed": assumed(planner), "plans": [x.to_dict() for x in plans]}
        found |= {"refused": refused, "fits": None if fits is None else fits.engine}
        print(json.dumps(found, indent=1))
        return 0
    logger.info("%s", assumed(planner))
    print("\n".join(_one(plans[0]) if options.engine else all_engines(plans, refused)))
    if options.memory is not None:
        print(said_of(plans, fits, options.memory))
    return 0


def _plans(planner: Planner, engine: str | None) -> tuple[list[Plan], dict[str, str]]:
    if engine is not None:
        return [planner.plan(engine)], {}
    return plan_all(planner)


def remarks(planner: Planner) -> list[str]:
    """Return what of a plan can be counted but hardly be meant."""
    student, teacher, found = planner.student, planner.teacher, []
    for name, sizes in (("student", student), ("teacher", teacher)):
        if sizes is None:
            continue
        config = sizes.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and planner.settings.length > limit:
            found.append(
                f"rows of {planner.settings.length} tokens are longer than the {limit} of the "
                f"{name}'s max_position_embeddings"
            )
    if teacher is not None and teacher.vocab != student.vocab:
        found.append(
            f"the student's head has {student.vocab} entries and the teacher's {teacher.vocab}: "
            "with one tokenizer the larger is cut, with two only divergence='uld' compares them"
        )
    return found


def assumed(planner: Planner) -> str:
    """Say what a plan is made from."""
    settings, student, teacher = planner.settings, planner.student, planner.teacher
    size = _count(p.numel for p in student.parameters)
    trained = _count(p.numel for p in student.parameters if p.trained)
    if teacher is None:
        other = f"the student itself ({settings.teacher})"
    else:
        other_size = _count(p.numel for p in teacher.parameters)
        other = f"{other_size} parameters in {str(teacher.dtype).removeprefix('torch.')}"
    parts = [
        f"student {size} parameters in {settings.dtype}, {trained} trained by "
        f"{settings.optim}{', bf16' if settings.bf16 else ''}",
        f"teacher {other}",
        f"devices: {settings.devices}, each with {settings.batch_size} x {settings.length} tokens, "
        f"{settings.tokens} scored",
        "gradient checkpointing" if settings.gradient_checkpointing else "all activations kept",
        "in no plan: the device's context, gaps between allocations, buffers of collectives",
    ]
    return "assumed: " + "; ".join(parts)


def _one(plan: Plan) -> list[str]:
    """Return the table of one engine."""
    lines = [_line(f"GiB per device, {plan.engine}", TITLES), _line("---", ["---:"] * 3)]
    for row in plan.rows:
        sizes = [getattr(row, x) for x in MOMENTS]
        if any(sizes):
            kind = f"{row.kind} (estimate)" if row.is_estimate else row.kind
            lines.append(_line(kind, [_gib(x) for x in sizes]))
    moments = plan.moments
    lines.append(_line("sum", [_gib(x) for x in moments.values()]))
    largest = max(moments, key=lambda x: moments[x])
    read = "logits" if plan.by_logits else "hidden states"
    lines.append(
        f"needs {_gib(plan.needs)} GiB per device, {TITLES[MOMENTS.index(largest)]}; the student "
        f"is read by its {read}"
    )
    if plan.unknown is not None:
        lines.append(f"without activations, which cannot be counted: {plan.unknown}")
    return lines


def all_engines(plans: list[Plan], refused: dict[str, str]) -> list[str]:
    """Return the table of all engines, each at the moment that needs most."""
    kinds = [row.kind for row in plans[0].rows]
    lines = [
        _line("GiB per device when it needs most", [*kinds, "needs"]),
        _line("---", ["---:"] * (len(kinds) + 1)),
    ]
    for plan in plans:
        moments = plan.moments
        largest = max(moments, key=lambda x: moments[x])
        cells = [_gib(getattr(row, largest)) for row in plan.rows]
        lines.append(_line(plan.engine, [*cells, _gib(plan.needs)]))
    lines += [f"without {engine}: {why}" for engine, why in refused.items()]
    if plans[0].unknown is not None:
        lines.append(f"without activations, which cannot be counted: {plans[0].unknown}")
    return lines


def said_of(plans: list[Plan], fits: Plan | None, memory: float) -> str:
    """Say which engine is the first to fit into a device of `memory` GiB."""
    if fits is not None:
        return f"take {fits.engine}: {_gib(fits.needs)} GiB is within {SHARE:.0%} of {memory:g} GiB"
    least = min(plans, key=lambda x: x.needs)
    return (
        f"nothing fits: {least.engine} needs least, {_gib(least.needs)} GiB, and {SHARE:.0%} of "
        f"{memory:g} GiB is less"
    )


def _line(first: str, cells: Any) -> str:
    return "| " + " | ".join([first, *cells]) + " |"


def _count(sizes: Iterable[int]) -> str:
    total = sum(sizes)
    return f"{total / 1e9:.2f} B" if total >= 1e8 else f"{total / 1e6:.2f} M"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
