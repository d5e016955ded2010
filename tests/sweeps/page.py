"""Tables of sweeps for the docs: equal rows together, and the reasons below them."""

import datetime
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from tests.sweeps import sweep
from tests.sweeps.cells import CLEAR, NONE, RIGHT, WRONG

Result = dict[str, Any]
VERDICTS = (RIGHT, CLEAR, WRONG, NONE)
PACKAGES = ("hf-distill", "transformers", "peft", "torch")
NUMBER = re.compile(r"(?<![\w.])-?\d[\d.]*(e[+-]?\d+)?")
LONGEST = 300  # characters of a reason


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([_row(head), "|---" * len(head) + "|", *map(_row, rows)]) + "\n"


def _text(text: str) -> str:
    """A reason as text of a page: no mark-up, one line."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return re.sub(r"([|<>\[\]*`_])", r"\\\1", " ".join(short.split()))


def _counts(results: Sequence[Result]) -> str:
    rows = [
        (column, *(str(found[verdict]) for verdict in VERDICTS))
        for column, found in sweep.counts(results).items()
    ]
    return _table(("trial", *VERDICTS[:3], "nothing to try"), rows)


def _largest(texts: Sequence[str]) -> str:
    """The largest numbers of texts such as "2e-07 / 1e-06"; of other texts, that of all."""
    if len(set(texts)) == 1:
        return texts[0]
    split = [[x for x in re.split(r" / |^evaluated ", text) if x] for text in texts]
    if len({len(x) for x in split}) != 1 or not all(NUMBER.fullmatch(y) for x in split for y in x):
        return ""
    return " / ".join(f"{max(map(float, column)):.0e}" for column in zip(*split, strict=True))


def _cell(results: Sequence[Result], column: str) -> str:
    found = [x["cells"][column] for x in results]
    verdict = found[0][0]
    text = _largest([text for _, text in found]) if verdict in (RIGHT, WRONG) else ""
    shown = f"**{verdict}**" if verdict == WRONG else verdict
    return f"{shown}, {text}" if text and verdict != NONE else shown


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    """Results with the same verdicts, the largest group first."""
    found: dict[Any, list[Result]] = {}
    for result in results:
        verdicts = tuple(verdict for verdict, _ in result["cells"].values())
        found.setdefault((result["path"], result["note"], verdicts), []).append(result)
    return sorted(found.values(), key=len, reverse=True)


def _rows(results: Sequence[Result]) -> str:
    columns = list(results[0]["cells"])
    rows = [
        (
            str(len(group)),
            _names(x["kind"] for x in group),
            group[0]["path"],
            *(_cell(group, column) for column in columns),
            group[0]["note"],
        )
        for group in _groups(results)
    ]
    return _table(("", "which", "read by", *columns, "note"), rows)


def _names(kinds: Iterable[str]) -> str:
    """Names; of adapters those without a base that stand for every base."""
    bases: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kinds):
        name, _, base = kind.rpartition(" on ")
        bases.setdefault(name, []).append(base)
    plain = bases.pop("", [])
    short = (
        [name] if set(found) == set(sweep.BASES) else [f"{name} on {base}" for base in found]
        for name, found in bases.items()
    )
    return ", ".join([*plain, *chain.from_iterable(short)])


def _alike(text: str, result: Result) -> str:
    """A text without what differs from one model or adapter to the next."""
    name = result["kind"].rpartition(" on ")[0] or result["kind"]
    words = "|".join(map(re.escape, (result["class"], name, name.upper())))
    return NUMBER.sub("0", re.sub(rf"\b({words})\b", "X", text))


def _reasons(results: Sequence[Result], verdict: str) -> str:
    """The texts of cells with a verdict, each once, with its columns and names."""
    found: dict[str, tuple[str, list[str], list[str]]] = {}
    for result in results:
        for column, (said, text) in result["cells"].items():
            if said == verdict and text:
                entry = found.setdefault(_alike(text, result), (text, [], []))
                entry[1].append(column)
                entry[2].append(result["kind"])
    lines = [
        f"- {', '.join(dict.fromkeys(columns))} ({_names(names)}): {_text(text)}"
        for text, columns, names in found.values()
    ]
    return "\n".join(lines) + "\n"


def _failures(results: Sequence[Result]) -> str:
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(result["failed"], []).append(result["kind"])
    lines = [f"- {_names(names)}: {_text(text)}" for text, names in found.items()]
    return "\n".join(lines) + "\n"


def section(results: Sequence[Result]) -> str:
    """The text of a sweep: when and with what, counts, table, reasons."""
    tried = [x for x in results if "cells" in x]
    left = [x for x in results if "cells" not in x]
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [
        f"{len(tried)} tried on {datetime.date.today()} with {packages}, "
        f"Python {platform.python_version()}.\n",
        _counts(tried),
        _rows(tried),
    ]
    titles = {WRONG: "Wrong", CLEAR: "Errors that say why", NONE: "Nothing to try"}
    for verdict, title in titles.items():
        if any(said == verdict and text for x in tried for said, text in x["cells"].values()):
            parts += [f"{title}:\n", _reasons(tried, verdict)]
    if left:
        parts += ["Not built, or not run alone on token ids:\n", _failures(left)]
    return "\n".join(parts)


def write(path: Path, name: str, results: Sequence[Result]) -> None:
    """Put a sweep's section between `<!-- sweep: name -->` and `<!-- end -->` of a page.

    Raises:
        ValueError: the page has no such place.
    """
    text = path.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- sweep: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{path} needs a line '<!-- sweep: {name} -->' and a line '<!-- end -->'")
    made = section(results)
    path.write_text(place.sub(lambda found: f"{found[1]}\n{made}\n", text), encoding="utf-8")
    print(f"written: {path}")
