"""Runs the cases on a device and reports: a table, the failures, one line of JSON."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from metal_ops import _dispatch
from metal_ops.selftest import cases
from metal_ops.selftest.cases import Job, Where
from metal_ops.selftest.machine import versions
from metal_ops.selftest.numerics import C

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHOWN = 20  # failures


class Tally(NamedTuple):
    """Counts comparisons of one op and dtype."""

    comparisons: int
    failures: int
    largest_c: float

    def plus(self, c: float, failed: bool) -> "Tally":
        """Count one comparison more."""
        return Tally(self.comparisons + 1, self.failures + failed, max(self.largest_c, c))


class Report(NamedTuple):
    """Holds tallies by (op, dtype), and each failure in words."""

    where: Where
    tallies: dict[tuple[str, str], Tally]
    failures: list[str]
    seconds: float


@contextmanager
def _strict() -> Iterator[None]:
    """Run without the fallback, which would test another backend than is there."""
    before = os.environ.get("METAL_OPS_STRICT")
    os.environ["METAL_OPS_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["METAL_OPS_STRICT"]
        else:
            os.environ["METAL_OPS_STRICT"] = before


def dtypes_of(where: Where) -> tuple[torch.dtype, ...]:
    """List those that the backend takes on the device."""
    found = []
    for dtype in DTYPES:
        try:
            probe = torch.empty(0, 1, dtype=dtype, device=where.device)
            _dispatch.select(where.backend, probe, probe)
        except (TypeError, NotImplementedError):  # MPS has no float64
            continue
        found.append(dtype)
    return tuple(found)


def _results(job: Job, where: Where) -> Iterator[tuple[float, str]]:
    """Yield (c needed, what failed) of each comparison; one that fails altogether is the last."""
    try:
        for context, comparison in cases.run(job, where):
            c, wrong = comparison.judge()
            yield c, f"{context}: {wrong}" if wrong else ""
    except Exception as error:  # whatever a driver or compiler has to say belongs in the report
        yield math.inf, f"{job.kind} {job.family}: {type(error).__name__}: {error}"


def run(
    where: Where, quick: bool, choose: Callable[[list[Job]], list[Job]] = lambda jobs: jobs
) -> Report:
    """Run every job of one device and backend, with a progress bar on a terminal."""
    start, tallies, failures = time.perf_counter(), {}, []
    jobs = choose(cases.jobs(dtypes_of(where), quick))
    with _strict():
        for job in tqdm(jobs, desc=str(where.device), disable=not sys.stderr.isatty()):
            dtype = str(job.dtype).removeprefix("torch.")
            key = job.op, dtype
            for c, wrong in _results(job, where):
                tallies[key] = tallies.get(key, Tally(0, 0, 0.0)).plus(c, bool(wrong))
                if wrong:
                    failures.append(f"{job.op} {dtype} {wrong}")
    return Report(where, tallies, failures, time.perf_counter() - start)


def passed(report: Report) -> bool:
    """Say whether something was compared and nothing failed."""
    return bool(report.tallies) and not report.failures


def show(report: Report) -> None:
    """Print the table, and the first failures."""
    where = report.where
    print(f"\n{where.device}, backend {where.name}, {report.seconds:.0f} s")
    print(f"{'op':12}{'dtype':10}{'compared':>10}{'failed':>8}{'largest c':>11}   (of {C:g})")
    for (op, dtype), tally in report.tallies.items():
        numbers = f"{tally.comparisons:10}{tally.failures:8}{tally.largest_c:11.3g}"
        print(f"{op:12}{dtype:10}{numbers}")
    for failure in report.failures[:SHOWN]:
        print(f"FAILED {failure}")
    if len(report.failures) > SHOWN:
        print(f"and {len(report.failures) - SHOWN} more failures")


def as_json(reports: list[Report], quick: bool) -> str:
    """Write one line: versions, largest c by device, op and dtype (null for infinite)."""
    devices = []
    for report in reports:
        largest: dict[str, dict[str, float | None]] = {}
        for (op, dtype), tally in report.tallies.items():
            c = round(tally.largest_c, 3) if math.isfinite(tally.largest_c) else None
            largest.setdefault(op, {})[dtype] = c
        tallies = report.tallies.values()
        devices.append(
            {
                "device": str(report.where.device),
                "backend": report.where.name,
                "largest_c": largest,
                "compared": sum(t.comparisons for t in tallies),
                "failed": sum(t.failures for t in tallies),
                "failures": report.failures[:SHOWN],
                "seconds": round(report.seconds, 1),
            }
        )
    whole: dict[str, Any] = {
        **versions(),
        "quick": quick,
        "c": C,
        "devices": devices,
        "pass": bool(reports) and all(passed(r) for r in reports),
    }
    return json.dumps(whole)


def main(wheres: list[Where], quick: bool, file: Path | None) -> int:
    """Run, print, write the JSON to `file` too; return 0 if all passed, else 1."""
    reports = []
    for where in wheres:
        reports.append(run(where, quick))
        show(reports[-1])
    line = as_json(reports, quick)
    print(f"\n{line}")
    if file is not None:
        file.write_text(line + "\n")
    good = all(passed(r) for r in reports)
    print("passed" if good else "FAILED: please report the line above")
    return 0 if good else 1
