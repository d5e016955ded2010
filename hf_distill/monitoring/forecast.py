"""A forecast of self-distillation, from what is measured before it: will it help, what to change.

What the student gains was found to be linear in the gap between it and the student that sees the
hint, measured before training, over kinds of context and families of models (T. He et al., "A
Predictive Law for On-Policy Self-Distillation From World Feedback", arXiv 2605.30070). Beside that
gap stand the harms that others report: signal that lies on the form of the text (arXiv 2606.11709),
and answers that become shorter than the student needs (arXiv 2607.05184).
"""

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hf_distill.data.token_classes import CLASSES, NUMBER, WORD

RESAMPLES = 1000
STYLE_LIMIT = 0.5  # of the signal on style tokens, above which the sentence names it
CONTENT_LIMIT = 0.5  # of the signal that only the right hint gives, below which it does
SHORTER_LIMIT = 0.75  # of the unaided length


class Estimate(NamedTuple):
    """Holds a mean over rows, and the ends of its 95 % interval (percentile bootstrap)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> "Estimate | None":
        """Return the estimate of rows' values, or None where there are none."""
        if not values:
            return None
        drawn = random.Random(seed)
        means = sorted(
            statistics.fmean(drawn.choices(values, k=len(values))) for _ in range(RESAMPLES)
        )
        cut = RESAMPLES // 40
        return cls(statistics.fmean(values), means[cut], means[-cut - 1])


@dataclass(frozen=True)
class ForecastRow:
    """Holds what was measured of a row; numbers in nats, token lists of the student's own rollout.

    Attributes:
        has_hint: whether the teacher was told something.
        scores: of the completions without and with the hint, or None where nothing judges them.
        reference: mean log-probability of a token of the data's completion, without and with the
            hint, or None.
        lengths: tokens of the completions without and with the hint.
        ids: the student's tokens.
        signal: of each token the soft loss.
        ratio: of each token log p(hinted) - log p(student).
        wrong_ratio: the same with another row's hint, or None.
    """

    has_hint: bool
    scores: tuple[float, float] | None
    reference: tuple[float, float] | None
    lengths: tuple[int, int]
    ids: Sequence[int]
    signal: Sequence[float]
    ratio: Sequence[float]
    wrong_ratio: Sequence[float] | None


@dataclass(frozen=True)
class Forecast:
    """Says what to expect of self-distillation.

    Attributes:
        rows: that were measured.
        hinted_rows: those of them whose teacher is told something.
        unaided: mean score of the student's completions, or None where nothing judges them.
        hinted: the same with the hint in its context.
        gap: hinted - unaided, over rows with a hint. What predicts the gain.
        reference_gap: the same of the mean log-probability of a token of the data's completion, in
            nats; measured where nothing judges completions.
        signal: mean soft loss of a token of the student's rollouts, in nats.
        by_class: shares of the signal by `data.token_classes.CLASSES`.
        style_share: share of the signal on style tokens: special tokens, punctuation, space, and
            words that at least half of the rollouts have.
        content_share: of how the hint moves the log-probabilities of the student's tokens, the
            share of the sum of squares that another row's hint does not explain. None where all
            rows have one hint.
        lengths: mean tokens of a completion without and with the hint.
        seconds: of a row, to sample it, and to read student and teacher.
        step_seconds: estimate for an optimizer step of this process, with a backward of twice the
            student's forward.
        rollouts: what was measured of each row.
    """

    rows: int
    hinted_rows: int
    unaided: float | None
    hinted: float | None
    gap: Estimate | None
    reference_gap: Estimate | None
    signal: Estimate | None
    by_class: Mapping[str, float]
    style_share: float | None
    content_share: float | None
    lengths: tuple[float, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    rollouts: Sequence[ForecastRow] = ()

    @property
    def sentence(self) -> str:
        """Say what to expect, and which setting to change first."""
        return _sentence(self)

    def metrics(self) -> dict[str, float]:
        """Return what trackers plot; what is not known is left out."""
        values = {
            "unaided": self.unaided,
            "hinted": self.hinted,
            "gap": None if self.gap is None else self.gap.mean,
            "reference_gap": None if self.reference_gap is None else self.reference_gap.mean,
            "signal": None if self.signal is None else self.signal.mean,
            "style_share": self.style_share,
            "content_share": self.content_share,
            "length": self.lengths[0],
            "hinted_length": self.lengths[1],
        }
        return {f"forecast_{k}": float(v) for k, v in values.items() if v is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it, with the sentence."""
        return {**asdict(self), "sentence": self.sentence}

    def table(self) -> list[str]:
        """Return lines for a screen, as a Markdown table, and the sentence."""
        rows = {
            "rows, with a hint": f"{self.rows}, {self.hinted_rows}",
            "score without the hint": _number(self.unaided),
            "score with the hint": _number(self.hinted),
            "gap": _estimate(self.gap),
            "reference's log-probability, gap (nats a token)": _estimate(self.reference_gap),
            "signal on the student's rollouts (nats a token)": _estimate(self.signal),
            "of it on style tokens": _share(self.style_share),
            "of the hint's effect, its content": _share(self.content_share),
            "tokens of a completion, without and with": "{:.1f}, {:.1f}".format(*self.lengths),
            "seconds of a step (estimate)": _number(self.step_seconds),
        }
        lines = ["| measured before training | |", "|---|---:|"]
        lines += [f"| {name} | {value} |" for name, value in rows.items() if value]
        lines += [f"| of the signal on {k} | {v:.0%} |" for k, v in self.by_class.items() if v]
        return [*lines, "", self.sentence]


def make_forecast(
    rows: Sequence[ForecastRow],
    classes: Sequence[int],
    seconds: Mapping[str, float],
    step_rows: int,
) -> Forecast:
    """Make a forecast of what was measured.

    Args:
        rows: measured, at least one.
        classes: of every token id, see `data.token_classes`.
        seconds: of all rows: "sample", "student", "teacher".
        step_rows: rows of an optimizer step of this process.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("a forecast needs at least one row, got 0")
    told = [row for row in rows if row.has_hint]
    judged = [row.scores for row in told if row.scores is not None]
    known = [row.reference for row in told if row.reference is not None]
    scored = [statistics.fmean(row.signal) for row in rows if row.signal]
    by_class, style = _shares(rows, classes)
    of_row = {name: value / len(rows) for name, value in seconds.items()}
    step = of_row.get("sample", 0) + of_row.get("teacher", 0) + 3 * of_row.get("student", 0)
    return Forecast(
        rows=len(rows),
        hinted_rows=len(told),
        unaided=statistics.fmean(x for x, _ in judged) if judged else None,
        hinted=statistics.fmean(x for _, x in judged) if judged else None,
        gap=Estimate.of([y - x for x, y in judged]),
        reference_gap=Estimate.of([y - x for x, y in known]),
        signal=Estimate.of(scored),
        by_class=by_class,
        style_share=style,
        content_share=_content(rows),
        lengths=(
            statistics.fmean(row.lengths[0] for row in rows),
            statistics.fmean(row.lengths[1] for row in rows),
        ),
        seconds=of_row,
        step_seconds=step * step_rows if seconds else None,
        rollouts=tuple(rows),
    )


def common_words(rows: Sequence[ForecastRow], classes: Sequence[int]) -> set[int]:
    """Return the words that at least half of the rollouts have, where there are four or more."""
    if len(rows) < 4:
        return set()
    counts = Counter(token for row in rows for token in set(row.ids))
    return {t for t, n in counts.items() if 2 * n >= len(rows) and classes[t] == WORD}


def _shares(
    rows: Sequence[ForecastRow], classes: Sequence[int]
) -> tuple[dict[str, float], float | None]:
    """Return the shares of the signal by class, and that on style tokens."""
    sums, style, common = [0.0] * len(CLASSES), 0.0, common_words(rows, classes)
    for row in rows:
        for token, value in zip(row.ids, row.signal, strict=True):
            kind = classes[token]
            sums[kind] += value
            if kind not in (NUMBER, WORD) or token in common:
                style += value
    total = sum(sums)
    if total <= 0:
        return {}, None
    return {name: x / total for name, x in zip(CLASSES, sums, strict=True)}, style / total


def _content(rows: Sequence[ForecastRow]) -> float | None:
    """Return the share of the right hint's effect that is not a multiple of the wrong one's."""
    pairs = [
        (right, wrong)
        for row in rows
        if row.wrong_ratio is not None
        for right, wrong in zip(row.ratio, row.wrong_ratio, strict=True)
    ]
    of_right = sum(x * x for x, _ in pairs)
    of_wrong = sum(y * y for _, y in pairs)
    if of_right == 0:
        return None
    both = sum(x * y for x, y in pairs)
    return 1.0 if of_wrong == 0 else max(0.0, 1 - both * both / (of_right * of_wrong))


def _sentence(found: Forecast) -> str:
    gap = found.gap if found.gap is not None else found.reference_gap
    of = "score" if found.gap is not None else "the log-probability of the data's completions"
    if not found.hinted_rows:
        return "Expect nothing: no row's teacher is told anything; change the hint first."
    if gap is None:
        return (
            "Nothing says what to expect: give a function that scores completions, or rows with "
            "completions."
        )
    shown = f"with the hint {of} is {gap.mean:+.3g} ({gap.low:+.3g} to {gap.high:+.3g})"
    if gap.high < 0:
        return f"Expect harm: {shown}; change the hint first."
    if gap.low <= 0:
        return (
            f"Expect little: {shown}, which may be nothing; change the hint first, or measure more "
            "rows."
        )
    before, after = found.lengths
    if before > 0 and after < SHORTER_LIMIT * before:
        return (
            f"Do not count on a gain: {shown}, but completions with it have {after / before:.0%} "
            "of the length, and the student may need what they leave out; change the hint first, "
            "so that it does not shorten them, or set base_kl_weight."
        )
    return f"Expect a gain: {shown}{_advice(found)}"


def _advice(found: Forecast) -> str:
    """Return the end of a sentence that expects a gain: the first thing that endangers it."""
    if found.content_share is not None and found.content_share < CONTENT_LIMIT:
        return (
            f". But {1 - found.content_share:.0%} of its effect is that of any hint, a wrong one "
            "too; change the hint first, so that its content decides."
        )
    if found.style_share is not None and found.style_share > STYLE_LIMIT:
        return (
            f". But {found.style_share:.0%} of the signal lies on style tokens; change "
            "token_weights first."
        )
    return "; no setting must be changed first."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _estimate(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:.4g} ({value.low:.4g} to {value.high:.4g})"
