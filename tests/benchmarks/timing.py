"""Interleaved timings in one process, and peak memory in processes of their own."""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

# glibc's defaults give each large temporary back to the kernel; these keep it
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def resident_peak_mb() -> float:
    """Peak resident memory of this process since the last reset (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def arguments(description: str, shapes: list[str]) -> argparse.Namespace:
    """The command line of a benchmark; restarts it with the allocator that was asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", nargs="+", default=shapes)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=["jsd", "forward_kl", "reverse_kl"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--allocator", choices=["default", "keep"], default="default")
    parser.add_argument("--memory-of", help="measure one variant's peak memory, then exit")
    parsed = parser.parse_args()
    if parsed.allocator == "keep" and "MALLOC_MMAP_MAX_" not in os.environ:
        main = sys.modules["__main__"].__spec__
        assert main is not None
        command = [sys.executable, "-m", main.name, *sys.argv[1:]]
        raise SystemExit(subprocess.call(command, env=os.environ | KEEP))
    return parsed


def peak_mb(step: Callable[[], float]) -> float:
    """What one step adds to the peak, after another has warmed up."""
    step()
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident_peak_mb()
    step()
    return resident_peak_mb() - before


def memory_in_a_process(module: str, variant: str, shape: str, dtype: str, kind: str) -> float:
    """`peak_mb` of a variant, measured by a fresh process with the default allocator."""
    command = [sys.executable, "-m", module, "--memory-of", variant]
    command += ["--shapes", shape, "--dtypes", dtype, "--kinds", kind]
    env = {name: value for name, value in os.environ.items() if name not in KEEP}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def compare(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[float, float]]:
    """Per variant: median seconds of interleaved repeats, and the loss."""
    losses = {}
    for name, step in steps.items():
        step()
        losses[name] = step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            gc.collect()
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), losses[name]) for name in steps}


def report(
    title: str,
    steps: dict[str, Callable[[], float]],
    options: argparse.Namespace,
    memory: Callable[[str], float],
) -> None:
    """Print one table; `ours` is the first variant."""
    result = compare(steps, options.repeats)
    ours = next(iter(result.values()))[0]
    print(f"\n{title}, {torch.get_num_threads()} threads, allocator {options.allocator}")
    print(f"{'':28}{'ms':>9}{'ratio':>8}{'extra MB':>10}  loss")
    for name, (seconds, loss) in result.items():
        extra = memory(name)
        line = f"{name:28}{1e3 * seconds:9.1f}{seconds / ours:8.2f}{extra:10.0f}  {loss:.7f}"
        print(line, flush=True)
