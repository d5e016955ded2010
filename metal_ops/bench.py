"""Times a loss from logits on this machine, beside PyTorch's own ways to write it.

It times forward and backward of a weighted sum over tokens. GB/s is the traffic that no
implementation avoids over the time: both sides' logits read once and the gradient written once,
3 N V itemsize bytes; "copy" is that of copying the student's logits, 2 N V itemsize, in the same
run.
"""

import gc
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from metal_ops import reference
from metal_ops.backends.machine import describe
from metal_ops.functional import divergence, weighted_divergence
from metal_ops.spec import DivergenceSpec

WARM_UPS = 2
Step = Callable[[], object]


class Case(NamedTuple):
    """Says what is timed."""

    tokens: int
    vocab: int
    dtype: torch.dtype
    kind: str


class Options(NamedTuple):
    """Says on what, and how often."""

    device: torch.device
    backend: str
    repeats: int


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def losses(
    case: Case, backend: str, weights: Tensor
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Write the sum of weights [N] times the divergence in several ways, by name."""
    spec = DivergenceSpec(case.kind)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return (reference.divergence(x, y, spec) * weights).sum()

    def weighted(x: Tensor, y: Tensor) -> Tensor:
        return weighted_divergence(x, y, spec, weights=weights, backend=backend).loss

    return {
        "weighted_divergence": weighted,
        "divergence": lambda x, y: (divergence(x, y, spec, backend=backend) * weights).sum(),
        "eager": eager,
        "torch.compile(eager)": torch.compile(eager, dynamic=False),
    }


def _step(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Step:
    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return step


def _first_calls(steps: dict[str, Step]) -> None:
    """Compile and warm up; what does not run here goes, with its reason."""
    for name, step in list(steps.items()):
        try:
            for _ in range(WARM_UPS):
                step()
        except Exception as error:  # the compiler's, whatever they are
            if name != "torch.compile(eager)":
                raise
            line = str(error).strip().partition("\n")[0]
            print(f"no row of {name}: {type(error).__name__}: {line}")
            del steps[name]


def medians(steps: dict[str, Step], device: torch.device, repeats: int) -> dict[str, float]:
    """Measure the seconds of each step, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            gc.collect()
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(case: Case, options: Options) -> dict[str, float]:
    """Measure median seconds by name, with "copy" the last."""
    torch.compiler.reset()  # after 8 cases torch.compile would give up and run the eager code
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(case.tokens, case.vocab, generator=generator)
        .mul_(3)
        .to(options.device, case.dtype)
        for _ in range(2)
    )
    student.requires_grad_()
    weights = torch.full((case.tokens,), 1 / case.tokens, device=options.device)
    ways = losses(case, options.backend, weights)
    steps = {name: _step(loss, student, teacher) for name, loss in ways.items()}
    target = torch.empty_like(teacher)
    steps["copy"] = lambda: target.copy_(teacher)
    _first_calls(steps)
    return medians(steps, options.device, options.repeats)


def show(case: Case, seconds: dict[str, float]) -> None:
    """Print a table of one case."""
    ours = seconds["weighted_divergence"]
    dtype = str(case.dtype).removeprefix("torch.")
    element = case.tokens * case.vocab * case.dtype.itemsize / 1e9
    print(f"\n{case.kind} {case.tokens}x{case.vocab} {dtype}")
    print(f"{'':24}{'median ms':>11}{'GB/s':>9}{'time / ours':>13}")
    for name, time_ in seconds.items():
        traffic = (2 if name == "copy" else 3) * element / time_
        print(f"{name:24}{1e3 * time_:11.2f}{traffic:9.1f}{time_ / ours:13.2f}", flush=True)


def main(
    shapes: list[tuple[int, int]],
    dtypes: list[torch.dtype],
    kinds: list[str],
    options: Options,
) -> int:
    """Time every shape, dtype and kind."""
    print(describe(options.device))
    print(f"{torch.get_num_threads()} threads, backend {options.backend}")
    print("GB/s: both logits read once and the gradient written once, over the time")
    for shape, dtype, kind in product(shapes, dtypes, kinds):
        case = Case(*shape, dtype, kind)
        show(case, measure(case, options))
    return 0
