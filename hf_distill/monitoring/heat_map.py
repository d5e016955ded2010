"""A page of rollouts whose tokens are coloured by loss, weight, entropy or contrast."""

import argparse
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_distill.monitoring.completion_table import COMPLETIONS_FILE

_STYLE = """
body { font-family: sans-serif; margin: 1.5rem; max-width: 72rem; }
.row { margin: 0.8rem 0; line-height: 1.7; }
.row b { color: #555; font-weight: normal; font-size: small; display: block; }
.row span { font-family: monospace; white-space: pre-wrap; border-radius: 2px; }
.map { display: none; }
"""


class TokenRow(NamedTuple):
    """Holds the scored tokens of a rollout: texts, and by name one value each or None."""

    step: int
    tokens: Sequence[str]
    values: Mapping[str, Sequence[float | None]]


def read_token_rows(lines: Iterable[str]) -> list[TokenRow]:
    """Read the rows of a `completions.jsonl` that have values of tokens; others are passed over.

    Raises:
        ValueError: a line is no JSON, or has not as many values as tokens.
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if "tokens" not in row or "values" not in row:
            continue
        for name, values in row["values"].items():
            if len(values) != len(row["tokens"]):
                raise ValueError(
                    f"line {number} must have a value of {name!r} for each of "
                    f"{len(row['tokens'])} tokens, got {len(values)}"
                )
        found.append(TokenRow(row["step"], row["tokens"], row["values"]))
    return found


def render_heat_map(rows: Sequence[TokenRow]) -> str:
    """Return a page without scripts and outer files: a colouring for each name, one shown.

    White is the least value of a name on the page and red the greatest; a token's values are shown
    where the pointer rests on it.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError(
            "a heat map needs values of tokens, got no row that has them: train with "
            "OPSDConfig(log_completions=1, log_token_values=4)"
        )
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    choices, rules, maps = [], [], []
    for i, name in enumerate(names):
        checked, text = " checked" if i == 0 else "", html.escape(name)
        choices.append(f'<input type="radio" name="by" id="by{i}"{checked}>')
        choices.append(f'<label for="by{i}">{text}</label>')
        rules.append(f"#by{i}:checked ~ #map{i} {{ display: block; }}")
        maps.append(f'<div class="map" id="map{i}">{_map(rows, name)}</div>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Rollouts</title>'
        f"<style>{_STYLE}{chr(10).join(rules)}</style></head>\n<body><h1>Rollouts</h1>\n"
        + "\n".join([*choices, *maps])
        + "\n</body></html>\n"
    )


def _map(rows: Sequence[TokenRow], name: str) -> str:
    known = [x for row in rows for x in row.values.get(name, ()) if x is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    made = [f"<p>{html.escape(name)}: white {low:.4g}, red {high:.4g}</p>"]
    for row in rows:
        values = row.values.get(name, [None] * len(row.tokens))
        spans = [
            f'<span style="background:{_colour(value, low, high)}" title="{_title(row, i)}">'
            f"{_shown(row.tokens[i])}</span>"
            for i, value in enumerate(values)
        ]
        made.append(f'<div class="row"><b>step {row.step}</b>{" ".join(spans)}</div>')
    return "\n".join(made)


def _shown(token: str) -> str:
    """Return a token's text with a mark for each line's end, which has no area to colour."""
    return html.escape(token).replace("\n", "↵\n")


def _colour(value: float | None, low: float, high: float) -> str:
    """Return white to red; a pale blue for no value."""
    if value is None:
        return "#dde"
    share = (value - low) / (high - low) if high > low else 0.0
    return f"rgb(255,{round(255 - 175 * share)},{round(255 - 175 * share)})"


def _title(row: TokenRow, i: int) -> str:
    told = (
        f"{name} {'-' if values[i] is None else format(values[i], '.4g')}"
        for name, values in row.values.items()
    )
    return html.escape("\n".join(told))


def write_heat_map(source: str | os.PathLike[str], path: str | os.PathLike[str], most: int) -> int:
    """Write the page of the last rollouts of a file; return how many they are.

    Args:
        source: a `completions.jsonl`, or the folder that holds it.
        path: of the page.
        most: rollouts on the page, >= 1.

    Raises:
        ValueError: `most` is below 1, or the file has no values of tokens.
    """
    if most < 1:
        raise ValueError(f"a heat map shows at least 1 rollout, got {most}")
    file = Path(source)
    file = file / COMPLETIONS_FILE if file.is_dir() else file
    with file.open(encoding="utf-8") as lines:
        rows = read_token_rows(lines)[-most:]
    Path(path).write_text(render_heat_map(rows), encoding="utf-8")
    return len(rows)


def add_heat_map(commands: Any) -> None:
    """Add the command `heatmap` to a command line."""
    parser = commands.add_parser("heatmap", help="a page of rollouts with coloured tokens")
    parser.set_defaults(run=_run)
    parser.add_argument("source", help="a completions.jsonl, or the folder that holds it")
    parser.add_argument("--out", default="heat_map.html", help="the page")
    parser.add_argument("--rows", type=int, default=32, help="the last rollouts, at least 1")


def _run(options: argparse.Namespace) -> int:
    count = write_heat_map(options.source, options.out, options.rows)
    print(f"{options.out}: {count} rollouts")
    return 0
