"""A picture of a forecast: rollouts whose tokens are coloured by the signal."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

WIDTH = 88  # characters of a line
NUM_SHOWN = 2  # rollouts


def _lines(texts: Sequence[str]) -> list[list[int]]:
    """Return the numbers of the tokens of each line."""
    lines: list[list[int]] = [[]]
    room = WIDTH
    for i, text in enumerate(texts):
        if len(text) > room and lines[-1]:
            lines.append([])
            room = WIDTH
        lines[-1].append(i)
        room -= len(text)
        if "\n" in text:
            lines.append([])
            room = WIDTH
    return lines


def _shown(text: str) -> str:
    return text.replace("\n", "\\n").replace("$", r"\$")


def plot_rollouts(
    texts: Sequence[Sequence[str]], signals: Sequence[Sequence[float]], path: str | os.PathLike[str]
) -> None:
    """Write a PNG of the first rollouts, each token on a colour from white to red.

    Args:
        texts: of each token of each rollout.
        signals: the soft loss of each token, in nats, >= 0.
        path: of the file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no rollout, or the numbers of tokens differ.
    """
    if not texts or [len(x) for x in texts] != [len(x) for x in signals]:
        raise ValueError(
            f"each token of a rollout needs a signal, got {[len(x) for x in texts]} tokens and "
            f"{[len(x) for x in signals]} signals"
        )
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
        colors: Any = importlib.import_module("matplotlib.cm")
        scales: Any = importlib.import_module("matplotlib.colors")
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    shown = [_lines(x) for x in texts[:NUM_SHOWN]]
    rows = sum(map(len, shown)) + len(shown)
    highest = max((x for values in signals[:NUM_SHOWN] for x in values), default=1.0)
    scale = scales.Normalize(0.0, highest or 1.0)
    figure = figures.Figure(figsize=(10, 0.24 * rows + 0.6), dpi=120)
    axes = figure.add_axes((0.02, 0.02, 0.86, 0.94))
    axes.set(xlim=(0, WIDTH), ylim=(rows, 0))
    axes.axis("off")
    at = 0
    for number, lines in enumerate(shown):
        for line in lines:
            column = 0
            for i in line:
                text = _shown(texts[number][i])
                color = colors.Reds(scale(signals[number][i]) * 0.8)
                axes.text(
                    *(column, at + 0.5, text),
                    family="monospace",
                    fontsize=8,
                    va="center",
                    bbox={"facecolor": color, "edgecolor": "none", "pad": 1.0},
                )
                column += max(1, len(text))
            at += 1
        at += 1
    bar = figure.add_axes((0.9, 0.1, 0.02, 0.8))
    figure.colorbar(colors.ScalarMappable(scale, "Reds"), cax=bar, label="nats")
    figure.savefig(path, format="png")
