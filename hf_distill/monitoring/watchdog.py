"""Says when distillation goes wrong, from what the trainer logs, and what to do about it."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_distill.models.structure import Kind, causal_lm, vocab_size
from hf_distill.monitoring.faults import (
    AGAINST_START,
    BOUNDS,
    CHECKS,
    ENTROPIES,
    LENGTHS,
    PREFIX_NAME,
    SETTLED,
    WITHOUT_START,
    Check,
    Finding,
    Limits,
    Scene,
)
from hf_distill.monitoring.probes import Probe, make_probe
from hf_distill.run import Run
from hf_distill.schedules import Schedule

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "raise", "off")

EXACTLY_UNIFORM = 1e-5  # of ln V / temperature²: far above rounding, far below any random head

FEW_STEPS = 3  # no more logs than the default window has

CLEARLY_WORSE = 3.0  # times as far beyond the limit as at the last warning


class WatchdogError(RuntimeError):
    """Distillation has gone wrong, and the watchdog's action is "raise"."""


def _pooled(logs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the share of all completions of some logs, and their number."""
    count = sum(number for _, number in logs)
    return sum(share * number for share, number in logs) / count, count


class Watchdog(TrainerCallback, ExportableState):
    """Reads every training log and reports faults of distillation, once each, and when worse.

    A metric is compared with a fixed limit, or with its own start, the median of the first logs;
    then the median of the last logs counts, so that one noisy log is no fault. Of completion_ended
    it is the share of all completions of these logs, and a fall that four standard errors explain
    is no fault. Neither it nor completion_length is read while a prefix cuts completions. While a
    fault holds, the log has `watchdog_<fault>`: how many times the metric is beyond its limit, from
    1 to 10.
    `DistillTrainer` adds a watchdog by itself, see `DistillConfig.watchdog`. Starts and reports are
    in the checkpoint.

    Args:
        action: "warn" logs a warning; "stop" also ends the training, with what a normal end does;
            "raise" raises; "off" does nothing.
        window: logs of which the median is taken, >= 1.
        limits: a `Limits`, or a mapping with some of its fields.

    Raises:
        ValueError: action is unknown or window is less than 1.
        WatchdogError: from a log, if action is "raise".
    """

    def __init__(
        self,
        action: str = "warn",
        window: int = 3,
        limits: Limits | Mapping[str, float | None] | None = None,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"watchdog action must be one of {ACTIONS}, got {action!r}")
        if window < 1:
            raise ValueError(f"watchdog window must be at least 1, got {window}")
        self.action, self.window = action, window
        self.limits = limits if isinstance(limits, Limits) else Limits(**(limits or {}))
        self.first: dict[str, list[list[float]]] = {}  # value and number of completions
        self.last: dict[str, list[list[float]]] = {}
        self.reported: dict[str, float] = {}
        self.num_logs = 0
        self.vocab: int | None = None  # entries of the logits that are used; None: all

    def state(self) -> dict[str, Any]:
        """Return what the checkpoint keeps, as transformers' `ExportableState` wants it."""
        limits = {x.name: getattr(self.limits, x.name) for x in dataclasses.fields(Limits)}
        return {
            "args": {"action": self.action, "window": self.window, "limits": limits},
            "attributes": {
                "first": self.first,
                "last": self.last,
                "reported": self.reported,
                "num_logs": self.num_logs,
            },
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start anew, or from a checkpoint: the Trainer restores callbacks only on request."""
        name = type(self).__name__
        kept = state.stateful_callbacks.get(name) if state.global_step else None
        kept = kept[0] if isinstance(kept, list) else kept
        fresh = {"first": {}, "last": {}, "reported": {}, "num_logs": 0}
        for key, value in (fresh if kept is None else kept["attributes"]).items():
            setattr(self, key, value)
        # the Trainer fails to save where the checkpoint it resumed from had no watchdog
        state.stateful_callbacks.setdefault(name, self.state())
        if self.action != "off":
            self._warn_of_few_logs(args, state)

    def _warn_of_few_logs(self, args: Any, state: Any) -> None:
        every, window, num_steps = state.logging_steps, self.window, state.max_steps
        few = args.logging_strategy == "steps" and num_steps <= window * every
        if not (few and state.is_world_process_zero):
            return
        if num_steps > window:
            told = f"set logging_steps to at most {(num_steps - 1) // window}"
        else:
            more = " and logging_steps=1" if every > 1 else ""
            told = f'take more than {window} steps, or a smaller watchdog={{"window": ...}}{more}'
        # a run so short is an example or a trial, of which there is nothing to watch
        logger.log(
            logging.INFO if num_steps <= FEW_STEPS else logging.WARNING,
            "the watchdog reads logs: with logging_steps %d its window of %d logs takes %d steps, "
            "of a run of %d steps, so it sees little; %s",
            every, window, window * every, num_steps, told,
        )  # fmt: skip

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Read a training log, add its metrics to it, and act."""
        if self.action == "off" or logs is None or "loss" not in logs:
            return
        self._keep(logs)
        size = self.vocab or (None if model is None else vocab_size(causal_lm(model)))
        ln_vocab = math.nan if size is None else math.log(size)
        # over a log's steps the entropy is that of no hotter softmax
        temperature = Schedule.parse(getattr(args, "temperature", 1.0))
        scene = Scene(ln_vocab, temperature.bounds[1], temperature.moves)
        found = list(self._findings(logs, scene))
        metrics = {f"watchdog_{x.check.fault}": x.severity for x in found}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
        for finding in found:
            self._report(finding, state, control)

    def _keep(self, logs: Mapping[str, float]) -> None:
        self.num_logs += 1
        kept = AGAINST_START - LENGTHS if PREFIX_NAME in logs else AGAINST_START
        for metric in kept & logs.keys():
            entry = [logs[metric], logs.get("completions", 1)]
            first = self.first.setdefault(metric, [])
            if len(first) < self.window:
                first.append(entry)
            self.last[metric] = [*self.last.get(metric, []), entry][-self.window :]

    def _findings(self, logs: Mapping[str, float], scene: Scene) -> Iterator[Finding]:
        for check in CHECKS:
            given, value, at = getattr(self.limits, check.fault), logs.get(check.metric), scene
            apart = scene.anneals and check.metric in ENTROPIES and check.limit != "uniform"
            if given is None or value is None or apart or not self._applies(check, logs, at):
                continue
            if check.metric == "soft":  # some losses may be negative: the size is what signals
                value = abs(value)
            if check.limit not in WITHOUT_START:
                value, at = self._against_start(check.metric, scene)
            bound = BOUNDS[check.limit](given, at)
            if check.metric == "student_entropy" and self._follows_teacher(check, value, logs, at):
                continue
            if value > bound if check.above else value < bound:
                yield Finding(check, value, bound, at.start)

    def _against_start(self, metric: str, scene: Scene) -> tuple[float, Scene]:
        """Return the metric's present value, and the scene with its start once that is complete."""
        first, last = self.first[metric], self.last[metric]
        if len(first) < self.window:
            return math.nan, scene
        if metric != "completion_ended":
            start, value = (statistics.median(x for x, _ in logs) for logs in (first, last))
            return value, replace(scene, start=start)
        (start, before), (value, now) = _pooled(first), _pooled(last)
        share = (start * before + value * now) / (before + now)
        error = math.sqrt(share * (1 - share) * (1 / before + 1 / now))
        return value, replace(scene, start=start, noise=4 * error)

    def _follows_teacher(
        self, check: Check, value: float, logs: Mapping[str, float], scene: Scene
    ) -> bool:
        """Return whether the student's entropy goes where the teacher's was at first: it learns.

        A teacher that is nearly uniform is no such aim. On completions of its own a student that
        grows as certain as its teacher may write the same few tokens, which is a collapse.
        """
        first = self.first.get("teacher_entropy")
        if not first:
            return False
        teacher = statistics.median(x for x, _ in first)
        if check.above:
            return value <= teacher < 0.8 * scene.ln_vocab
        return "completion_length" not in logs and value >= teacher / 2

    def _begins_alike(self, logs: Mapping[str, float], scene: Scene) -> bool:
        """Return whether the student began about as uniform as its teacher: both are new models.

        A teacher that was not loaded is much more uniform than a student that was, and one whose
        weights are zero is exactly uniform, whatever the student.
        """
        if "student_entropy" not in logs:
            return False
        start = statistics.median(x for x, _ in self.first["student_entropy"])
        student = logs["student_entropy"] if scene.anneals else start
        teacher_gap = scene.ln_vocab - logs["teacher_entropy"]
        exact = EXACTLY_UNIFORM * scene.ln_vocab / scene.temperature**2
        return teacher_gap > max(exact, (scene.ln_vocab - student) / 2)

    def _applies(self, check: Check, logs: Mapping[str, float], scene: Scene) -> bool:
        if PREFIX_NAME in logs and check.metric in LENGTHS:
            return False
        if check.fault == "zero_gradient":
            return abs(logs.get("soft", 0.0)) > (self.limits.dead_signal or 0.0)
        if check.fault == "teacher_uniform":
            return not self._begins_alike(logs, scene)
        if check.fault == "teacher_unsure":  # rows from data may differ without any fault
            return "completion_length" in logs
        return check.fault not in SETTLED or self.num_logs > self.window

    def _report(self, finding: Finding, state: Any, control: Any) -> None:
        before = self.reported.get(finding.check.fault)
        if before is not None and finding.severity < CLEARLY_WORSE * before:
            return
        self.reported[finding.check.fault] = finding.severity
        text = f"watchdog, step {state.global_step}: {finding}"
        if self.action == "raise":
            raise WatchdogError(text)
        if self.action == "stop":
            control.should_training_stop = True
            text += "; training stops here"
        if state.is_world_process_zero:
            logger.warning("%s", text)


@dataclass
class WatchdogConfig(Limits):
    """Says what is watched during training, and what happens at a fault; `Limits` has limits.

    Raises:
        ValueError: a value is out of range.
    """

    action: str = field(
        default="warn",
        metadata={
            "help": "Says what happens at a fault: warn logs a warning, stop also ends the "
            "training, raise raises an error, and off turns the watchdog off."
        },
    )
    window: int = field(
        default=3,
        metadata={
            "help": "The number of logs whose median is the start, or the present value, of a "
            "metric, at least 1."
        },
    )

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        super().__post_init__()
        self.make()

    def make(self) -> Watchdog:
        """Make the callback."""
        return Watchdog(self.action, self.window, self)


OF_TEXT = ("entropy_collapse", "entropy_explosion")  # limits for a vocabulary, not for classes


def without_text_limits(config: WatchdogConfig) -> WatchdogConfig:
    """Return the watchdog's settings; limits for texts that were left at defaults are off.

    A classifier that learns becomes sure of its classes, which is no collapse.
    """
    plain = WatchdogConfig()
    same = [name for name in OF_TEXT if getattr(config, name) == getattr(plain, name)]
    return dataclasses.replace(config, **cast(Any, dict.fromkeys(same)))


def make_watchdog(run: Run, vocab: int | None) -> tuple[Watchdog | None, Probe | None]:
    """Make the watchdog of a run, unless it is off, and its teacher's probe, if it needs one.

    Args:
        run: with its settings and teacher.
        vocab: entries of the vocabulary that are read, or None for all.
    """
    config = cast(WatchdogConfig, run.args.watchdog)
    if config.action == "off":
        return None, None
    watchdog = (without_text_limits(config) if run.kind.has_classes else config).make()
    watchdog.vocab = vocab
    if run.kind != Kind.CAUSAL:
        return watchdog, None
    return watchdog, make_probe(run.teacher, run.accelerator, run.sharded)
