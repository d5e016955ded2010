"""Runs the trials of many names in processes, with a limit of time for each."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.sweeps import running
from tests.sweeps.cells import CLEAR, NONE, RIGHT, WRONG

BASES = ("llama", "gpt2")  # that adapters are tried on
LIMIT = 180  # seconds of one name
Result = dict[str, Any]
Trial = Callable[[str], Result]


class TooSlowError(Exception):
    """A name has taken longer than its limit."""


def _stop(*_: Any) -> None:
    raise TooSlowError(f"more than {LIMIT} s")


def _limited(trial: Trial, name: str) -> Result:
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LIMIT)
    start = time.monotonic()
    try:
        return trial(name) | {"seconds": round(time.monotonic() - start, 1)}
    except TooSlowError as error:
        return {"kind": name, "failed": str(error)}
    finally:
        signal.alarm(0)


def run(
    trial: Trial, names: Sequence[str], jobs: int = 1, path: Path | None = None
) -> list[Result]:
    """The results in the order of the names; a line is printed as each is there.

    Args:
        trial: a function of a module, or a `partial` of one.
        names: what is tried.
        jobs: processes; 1 is this one.
        path: is written after each result, or None.
    """
    found: dict[str, Result] = {}
    for result in _results(trial, names, jobs):
        found[result["kind"]] = result
        print(line(result), flush=True)
        save(list(found.values()), path)
    return [found[name] for name in names]


def _results(trial: Trial, names: Sequence[str], jobs: int) -> Iterator[Result]:
    if jobs == 1:
        running.prepare()
        yield from (_limited(trial, name) for name in names)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), running.prepare) as pool:
        waiting = [pool.submit(partial(_limited, trial), name) for name in names]
        yield from (future.result() for future in as_completed(waiting))


def line(result: Result) -> str:
    """A result as a line of a terminal."""
    if "failed" in result:
        return f"{result['kind']:26s} not tried: {result['failed'][:150]}"
    shown = {CLEAR: "clear", RIGHT: "right", WRONG: "WRONG", NONE: "-"}
    cells = [f"{name} {shown[verdict]}" for name, (verdict, _) in result["cells"].items()]
    wrong = [
        f"\n    {name}: {text}"
        for name, (verdict, text) in result["cells"].items()
        if verdict == WRONG
    ]
    head = f"{result['kind']:26s} {result['path']:6s} {'; '.join(cells)}"
    return f"{head}  {result.get('note', '')}".rstrip() + "".join(wrong)


def counts(results: Sequence[Result]) -> dict[str, Counter[str]]:
    """For each column how often each verdict was found."""
    made: dict[str, Counter[str]] = {}
    for result in results:
        for column, (verdict, _) in result.get("cells", {}).items():
            made.setdefault(column, Counter())[verdict] += 1
    return made


def summary(results: Sequence[Result]) -> str:
    """The counts as lines."""
    tried = [x for x in results if "cells" in x]
    lines = [f"{len(tried)} of {len(results)} tried"]
    for column, found in counts(results).items():
        words = (f"{kind} {found[kind]}" for kind in (RIGHT, CLEAR, WRONG, NONE))
        lines.append(f"  {column:20s} {', '.join(words)}")
    return "\n".join(lines)


def save(results: Sequence[Result], path: Path | None) -> None:
    """Write the results as JSON."""
    if path is not None:
        path.write_text(json.dumps(list(results), indent=1) + "\n", encoding="utf-8")


def joined(results: Sequence[Result], earlier: Path | None) -> list[Result]:
    """Results, and those of an earlier run for the names that were not tried again."""
    kept = [] if earlier is None else json.loads(earlier.read_text(encoding="utf-8"))
    found = {x["kind"]: x for x in kept} | {x["kind"]: x for x in results}
    return list(found.values())


def any_wrong(results: Sequence[Result]) -> bool:
    """Whether a cell is wrong."""
    return any(found[WRONG] for found in counts(results).values())
