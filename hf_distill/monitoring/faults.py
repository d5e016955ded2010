"""The faults of distillation that show in a training log, each with its limit."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_SEVERE = 10.0  # a value that should not be 0 may be 0


NOT_WATCHED = " With None, the fault is not watched."


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": f"{text}{NOT_WATCHED}"})


@dataclass
class Limits:
    """Holds one limit per fault, under the fault's name; None leaves the fault out.

    Raises:
        ValueError: a limit is negative.
    """

    teacher_uniform: float | None = _limit(
        0.1,
        "ln V - teacher_entropy must be at least this share of ln V / temperature², unless the "
        "student began about as uniform as its teacher.",
    )
    teacher_unsure: float | None = _limit(
        1.4,
        "teacher_entropy on sampled completions must be at most this many times its start. A rise "
        "of up to 0.02 nats is never a fault.",
    )
    teacher_moves: float | None = _limit(
        0.1,
        "The JSD of a live teacher from its start must be at most this share of the JSD between "
        "teacher and student at the start.",
    )
    dead_signal: float | None = _limit(
        1e-6, "The soft loss must be at least this many nats per token after the first logs."
    )
    zero_gradient: float | None = _limit(
        1e-8, "grad_norm must be at least this while the soft loss is not 0."
    )
    ema_still: float | None = _limit(
        1e-5, "A moving average must move by at least this share of the student's movement."
    )
    ema_same: float | None = _limit(
        1e-5,
        "A moving average must stay at least this far from the student, as a share of the "
        "student's movement.",
    )
    teacher_follows: float | None = _limit(
        1e-4, "The JSD of a frozen teacher from its start must be at most this many nats."
    )
    too_long: float | None = _limit(
        2.0, "completion_length must be at most this many times its start."
    )
    too_short: float | None = _limit(
        0.5, "completion_length must be at least this many times its start."
    )
    endless: float | None = _limit(
        0.2, "completion_ended must not fall by more than this below its start."
    )
    hint_copied: float | None = _limit(
        0.5, "hint_overlap must not rise by more than this above its start."
    )
    entropy_collapse: float | None = _limit(
        0.1,
        "student_entropy must be at least this many times its start; on the data's completions, or "
        "half of teacher_entropy at its start.",
    )
    entropy_explosion: float | None = _limit(
        0.3,
        "student_entropy must not go further than this share of the way from its start to ln V, or "
        "than teacher_entropy at its start. A start above 0.8 ln V is not watched.",
    )
    clipped: float | None = _limit(0.5, "At most this share of the tokens may be clipped.")

    def __post_init__(self) -> None:
        """Check the values where they are given."""
        for name in (x.name for x in dataclasses.fields(Limits)):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"watchdog {name} must be None or >= 0, got {value!r}")


@dataclass(frozen=True)
class Check:
    """Describes one fault: a metric that must stay on one side of a limit.

    Args:
        fault: its name, and that of its field in `Limits`.
        metric: the log's entry that is compared.
        above: whether the fault is a value above the limit, or one below it.
        limit: what the field of `Limits` means, a key of `BOUNDS`.
        text: what it means and what to do.
    """

    fault: str
    metric: str
    above: bool
    limit: str
    text: str


@dataclass(frozen=True)
class Scene:
    """Holds what a limit is made of besides its field; NaN where it is not known.

    Args:
        ln_vocab: ln V.
        temperature: of the loss, its largest if it is scheduled.
        anneals: whether it is scheduled: entropies then move by themselves, and are not compared
            with their start.
        start: median of the metric's first logs.
        noise: what chance alone makes of a share, four standard errors of the difference.
    """

    ln_vocab: float
    temperature: float
    anneals: bool = False
    start: float = math.nan
    noise: float = 0.0


Bound = Callable[[float, Scene], float]
"""The limit in the metric's unit, from its field of `Limits`; no value is beyond NaN."""

# Logits that spread by s have an entropy of about ln V - s² / 2 temperature². Measured on
# SmolLM2-135M at temperatures 1, 2, 4 and 8, (1 - entropy / ln V) temperature² is 0.71, 0.75, 0.48
# and 0.44 on text, 0.29 to 0.24 on random tokens; 0.01 with weights as they are initialised, and
# 0.07 is expected of those of a model with 4096 hidden units.
BOUNDS: dict[str, Bound] = {
    "plain": lambda given, at: given,
    "uniform": lambda given, at: at.ln_vocab * (1 - given / at.temperature**2),
    "multiple": lambda given, at: given * at.start,
    # where a teacher is nearly certain, a few odd tokens of a small log would pass the factor
    "entropy": lambda given, at: max(given * at.start, at.start + 0.02),
    "rise": lambda given, at: at.start + given,
    "fall": lambda given, at: at.start - max(given, at.noise),
    "way": lambda given, at: (
        at.start + given * (at.ln_vocab - at.start) if at.start < 0.8 * at.ln_vocab else math.nan
    ),
}
WITHOUT_START = ("plain", "uniform")


CHECKS = (
    Check(
        "teacher_uniform", "teacher_entropy", True, "uniform",
        "the teacher is close to uniform over the vocabulary and teaches nothing: look whether its "
        "weights and its head were loaded",
    ),
    Check(
        "teacher_unsure", "teacher_entropy", True, "entropy",
        "the teacher grows less certain of what the student writes: a self-teacher that follows "
        "the student forgets how to use its hint before both collapse; use teacher 'base', a lower "
        "learning rate or an earlier checkpoint",
    ),
    Check(
        "teacher_moves", "teacher_moved", True, "plain",
        "the live teacher says something else about its first rows than it did, so it follows the "
        "student, and tends to forget how to use its hint before both collapse; use teacher 'base' "
        "or 'ema', or a lower learning rate",
    ),
    Check(
        "dead_signal", "soft", False, "plain",
        "teacher and student say the same: look whether the hint reaches the teacher's context, or "
        "whether the teacher is the student's own weights",
    ),
    Check(
        "zero_gradient", "grad_norm", False, "plain",
        "no gradient reaches the trainable parameters though teacher and student differ: look at "
        "requires_grad, at detached losses and at gradient checkpointing with frozen inputs",
    ),
    Check(
        "ema_still", "ema_moved", False, "plain",
        "the teacher's average stays where it was though the student moves: look whether it is "
        "updated after each step, at its dtype, and lower ema_decay",
    ),
    Check(
        "ema_same", "ema_distance", False, "plain",
        "the teacher's average is the student itself, a live teacher, which tends to collapse: "
        "raise ema_decay",
    ),
    Check(
        "teacher_follows", "teacher_drift", True, "plain",
        "a teacher that should be frozen has changed on the same tokens: look whether adapters are "
        "off in its forward, and whether it shares weights with the student",
    ),
    Check(
        "too_long", "completion_length", True, "multiple",
        "completions grow: a student that drifts to endless completions loses its accuracy next; "
        "use teacher 'base', a lower learning rate or an earlier checkpoint",
    ),
    Check(
        "too_short", "completion_length", False, "multiple",
        "completions shrink: the student stops before the answer; look whether hints give away "
        "short answers, lower the learning rate or use an earlier checkpoint",
    ),
    Check(
        "endless", "completion_ended", False, "fall",
        "completions no longer end: the first sign of a collapse; use teacher 'base', a lower "
        "learning rate or an earlier checkpoint, and look whether end tokens are scored",
    ),
    Check(
        "hint_copied", "hint_overlap", True, "rise",
        "the student writes down hints that it does not see: it learns them by heart; use more "
        "rows, fewer steps, or a hint that says how instead of what",
    ),
    Check(
        "entropy_collapse", "student_entropy", False, "multiple",
        "the student becomes certain of every token, and its samples alike: use a lower learning "
        "rate, forward_kl or a higher rollout temperature",
    ),
    Check(
        "entropy_explosion", "student_entropy", True, "way",
        "the student's distribution flattens towards a uniform one: lower the learning rate, and "
        "look at the teacher's entropy",
    ),
    Check(
        "clipped", "clipped", True, "plain",
        "the clip cuts at most tokens, so the loss is mostly a constant there: raise its bound or "
        "use level 'token_rescale'",
    ),
)  # fmt: skip

AGAINST_START = {check.metric for check in CHECKS if check.limit not in WITHOUT_START}
LENGTHS = {"completion_length", "completion_ended"}  # say nothing where completions are cut
PREFIX_NAME = "prefix_tokens"  # logged where they are
ENTROPIES = {"student_entropy", "teacher_entropy"}
SETTLED = {"dead_signal", "ema_still", "ema_same"}  # may hold in the first logs


@dataclass(frozen=True)
class Finding:
    """Reports a fault that holds at this log, and how far: 1 is at its limit."""

    check: Check
    value: float
    bound: float
    start: float

    @property
    def severity(self) -> float:
        """Return how many times beyond its limit the value is, from 1 to MOST_SEVERE."""
        high, low = (self.value, self.bound) if self.check.above else (self.bound, self.value)
        return min(high / low, MOST_SEVERE) if low > 0 else MOST_SEVERE

    def __str__(self) -> str:
        start = "" if math.isnan(self.start) else f", at the start {self.start:.4g}"
        side = "above" if self.check.above else "below"
        return (
            f"{self.check.fault}: {self.check.metric} {self.value:.4g} is {side} its limit "
            f"{self.bound:.4g}{start}: {self.check.text}"
        )
