"""Interleaved timings in one process, and peak memory in processes of their own."""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import profile

# One forward and backward over the first so many rows (None: all): loss, and gradient if it has one
Variant = Callable[[int | None], tuple[float, Tensor | None]]

# glibc's defaults give each large temporary back to the kernel; these keep it
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def resident_peak_mb() -> float:
    """Peak resident memory of this process since the last reset (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def allocations(prof: profile) -> list[int]:
    """The bytes of each tensor made, and less those of each freed, in order of time."""
    events: list[Any] = cast(Any, prof.profiler).kineto_results.events()
    found = [x for x in events if x.name() == "[memory]"]
    return [x.nbytes() for x in sorted(found, key=lambda x: x.start_ns())]


def arguments(description: str | None, shapes: list[str], **more: list[str]) -> argparse.Namespace:
    """The command line of a benchmark; restarts it with the allocator that was asked for.

    `more` are further lists of choices by option name, all of them tried by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", nargs="+", default=shapes)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=["jsd", "forward_kl", "reverse_kl"])
    for name, choices in more.items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--allocator", choices=["default", "keep"], default="default")
    parser.add_argument("--no-memory", action="store_true", help="times and errors only")
    parser.add_argument("--memory-of", help="measure one variant's peak memory, then exit")
    parsed = parser.parse_args()
    restart(parsed.allocator)
    return parsed


def restart(allocator: str) -> None:
    """Start the benchmark again with the allocator that was asked for, unless it has it."""
    if allocator == "keep" and "MALLOC_MMAP_MAX_" not in os.environ:
        main = sys.modules["__main__"].__spec__
        assert main is not None
        command = [sys.executable, "-m", main.name, *sys.argv[1:]]
        raise SystemExit(subprocess.call(command, env=os.environ | KEEP))


def peak_mb(variant: Variant) -> float:
    """What one step adds to the peak, after another has warmed up."""
    variant(None)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident_peak_mb()
    variant(None)
    return resident_peak_mb() - before


def memory_in_a_process(module: str, variant: str, **case: str) -> float:
    """`peak_mb` of a variant, measured by a fresh process with the default allocator."""
    command = [sys.executable, "-m", module, "--memory-of", variant]
    for name, value in case.items():
        command += [f"--{name}", value]
    env = {name: value for name, value in os.environ.items() if name not in KEEP}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def drop_if_broken(variants: dict[str, Variant], name: str) -> None:
    """Say why a variant does not run here, and go on without it."""
    if name not in variants:
        return
    try:
        variants[name](None)
    except Exception as error:  # the compiler's, whatever they are
        print(f"no row of {name}: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
        del variants[name]


def compare(variants: dict[str, Variant], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Per variant: median and least seconds of interleaved repeats, and the loss."""
    losses = {}
    for name, variant in variants.items():
        variant(None)
        losses[name] = variant(None)[0]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            gc.collect()
            start = time.perf_counter()
            variant(None)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: (statistics.median(times), min(times), losses[name])
        for name, times in seconds.items()
    }


def errors(variants: dict[str, Variant], exact: Variant, rows: int) -> dict[str, list[float]]:
    """Per variant with a gradient: errors of loss and gradient over the first rows.

    Each is the largest absolute error over the largest absolute value of `exact`, which computes
    in float64.
    """
    loss, gradient = exact(rows)
    assert gradient is not None
    wants, result = (torch.tensor(loss, dtype=torch.float64), gradient), {}
    for name, variant in variants.items():
        got_loss, got = variant(rows)
        if got is not None:
            gots = torch.tensor(got_loss, dtype=torch.float64), got.double()
            result[name] = [
                float((got - want).abs().max() / want.abs().max())
                for got, want in zip(gots, wants, strict=True)
            ]
    return result


def report(
    title: str,
    variants: dict[str, Variant],
    exact: Variant,
    rows: int,
    options: argparse.Namespace,
    memory: Callable[[str], float],
) -> None:
    """Print one table; `ours` is the first variant. The errors are those of the first rows."""
    result = compare(variants, options.repeats)
    error = errors(variants, exact, rows)
    ours, ours_least, _ = next(iter(result.values()))
    print(f"\n{title}, {torch.get_num_threads()} threads, allocator {options.allocator}")
    head = f"{'':26}{'median ms':>10}{'ratio':>7}{'least ms':>10}{'ratio':>7}{'extra MB':>10}"
    print(f"{head}{'loss error':>12}{'grad error':>12}  loss")
    for name, (seconds, least, loss) in result.items():
        cells = "".join(f"{x:12.1e}" for x in error[name]) if name in error else f"{'-':>12}" * 2
        times = f"{1e3 * seconds:10.1f}{seconds / ours:7.2f}"
        times += f"{1e3 * least:10.1f}{least / ours_least:7.2f}"
        extra = "-" if options.no_memory else f"{memory(name):.0f}"
        line = f"{name:26}{times}{extra:>10}{cells}"
        print(f"{line}  {loss:.7f}" if name in error else line, flush=True)
