"""Results of arms on several tasks: paired differences with intervals, tables and a plot."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot as plt

from helpers import arms

# quantiles of 97.5 % of Student's t with 1, 2, ... degrees of freedom; more take the last, too wide
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Results = dict[str, dict[str, dict[int, dict[str, Any]]]]  # of tasks, of arms, of seeds


class Difference(NamedTuple):
    """Holds a mean of paired differences, and half of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: list[float]) -> "Difference":
        """Return that of the values of several seeds; of one, the interval is infinite."""
        mean, n = statistics.fmean(values), len(values)
        if n == 1:
            return cls(mean, math.inf)
        return cls(mean, T_95[min(n - 2, len(T_95) - 1)] * statistics.stdev(values) / math.sqrt(n))

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {100 * self.half:.1f}"


def shares(of_seeds: dict[int, dict[str, Any]], view: str = "unaided") -> dict[int, float]:
    """Return the accuracy of each seed."""
    return {seed: result[view]["share"] for seed, result in of_seeds.items()}


def paired(
    of_arm: dict[int, dict[str, Any]], of_other: dict[int, dict[str, Any]]
) -> Difference | None:
    """Return the difference of two arms' accuracies over the seeds that both have."""
    one, other = shares(of_arm), shares(of_other)
    values = [one[seed] - other[seed] for seed in one if seed in other]
    return Difference.of(values) if values else None


def ratio(
    of_arm: dict[int, dict[str, Any]], of_other: dict[int, dict[str, Any]], name: str
) -> float | None:
    """Return the median over seeds of a cost, as a ratio to another arm's."""
    pairs = [
        (result.get(name), of_other[seed].get(name))
        for seed, result in of_arm.items()
        if seed in of_other
    ]
    found = [x / y for x, y in pairs if x is not None and y]
    return statistics.median(found) if found else None


def _cell(value: object, form: str = "") -> str:
    return "" if value is None else format(value, form)


def show(results: Results, start: str, plain: str) -> str:
    """Return a Markdown table for each task.

    Args:
        results: of all arms.
        start: the arm without training.
        plain: the arm that others are compared with.
    """
    header = (
        *("arm", "unaided %", "hinted %", "length", "points on start", "points on plain"),
        "seconds of a step, ratio",
    )
    made = []
    for task, of_arms in results.items():
        before, base = of_arms.get(start, {}), of_arms.get(plain, {})
        rows = []
        for name, of_seeds in of_arms.items():
            lengths = [x["unaided"]["mean_length"] for x in of_seeds.values()]
            rows.append(
                (
                    name,
                    f"{100 * statistics.fmean(shares(of_seeds).values()):.1f}",
                    f"{100 * statistics.fmean(shares(of_seeds, 'hinted').values()):.1f}",
                    f"{statistics.fmean(lengths):.1f}",
                    _cell(None if name == start else paired(of_seeds, before)),
                    _cell(None if name == plain else paired(of_seeds, base)),
                    _cell(ratio(of_seeds, base, "step_seconds"), ".2f"),
                )
            )
        seeds = sorted({seed for of_seeds in of_arms.values() for seed in of_seeds})
        made.append(f"{task}, seeds {seeds}:\n\n" + arms.table(header, rows))
    return "\n\n".join(made)


def draw(path: Path, results: Results, start: str) -> None:
    """Draw a PNG: the gain of each arm over the start, with its interval, and each seed's."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(
        1, len(results), figsize=(1 + 4 * len(results), 4.2), layout="constrained", squeeze=False
    )
    for axis, (task, of_arms) in zip(axes[0], results.items(), strict=True):
        before = of_arms.get(start, {})
        names = [x for x in of_arms if x != start and paired(of_arms[x], before) is not None]
        for y, name in enumerate(names):
            found = paired(of_arms[name], before)
            assert found is not None
            half = 0.0 if math.isinf(found.half) else found.half
            axis.errorbar(100 * found.mean, y, xerr=100 * half, fmt="o", color="C0", capsize=3)
            own, first = shares(of_arms[name]), shares(before)
            each = [100 * (own[seed] - first[seed]) for seed in own if seed in first]
            axis.plot(each, [y] * len(each), "x", color="C7", markersize=4)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(title=task, xlabel="unaided accuracy, points on the start")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)
