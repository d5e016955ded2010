"""On a GPU: `python -m tests.benchmarks.gpu`.

Losses from logits and from hidden states, forward and backward of a mean over tokens, against the
eager formula, torch.compile, TRL and Liger. Milliseconds are medians of interleaved repeats by the
device's own clock, GB/s those of the least traffic there is (both sides' logits read once, one
gradient written), "of copy" that over what a copy of a gigabyte reached in the same run. Extra MB
is what a step adds to the peak. Errors are against float64, over the first rows.
`--device cpu` shows that it runs; its times say nothing about a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from tests.benchmarks import divergence, linear, timing

try:  # needs Triton, as this benchmark does
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
    from liger_kernel.ops.jsd import LigerJSDFunction
except ImportError:
    LigerJSDFunction = LigerFusedLinearJSDFunction = None

LOGITS = ["4096x32000", "4096x151936", "64x151936", "8192x128256"]
HIDDEN = ["4096x1024x151936", "4096x4096x128256"]
COPY_BYTES = 2**30


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--logits", nargs="*", default=LOGITS, help="tokens x vocabulary")
    parser.add_argument("--hidden", nargs="*", default=HIDDEN, help="tokens x hidden x vocabulary")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="+", default=["jsd", "forward_kl", "reverse_kl"])
    parser.add_argument("--heads", nargs="+", choices=["trained", "frozen"], default=["trained"])
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


class Clock:
    """Time and memory of a device."""

    def __init__(self, device: str) -> None:
        self.type = torch.device(device).type
        self.module = None if self.type == "cpu" else getattr(torch, self.type)

    def milliseconds(self, variant: timing.Variant) -> float:
        """One step: between events on the device's stream."""
        if self.module is None:
            start = time.perf_counter()
            variant(None)
            return 1e3 * (time.perf_counter() - start)
        first, last = (self.module.Event(enable_timing=True) for _ in range(2))
        self.module.synchronize()
        first.record()
        variant(None)
        last.record()
        self.module.synchronize()
        return first.elapsed_time(last)

    def extra_mb(self, variant: timing.Variant) -> float:
        """What a step adds to the peak of allocated memory."""
        if self.module is None:
            return float("nan")
        self.module.synchronize()
        self.module.reset_peak_memory_stats()
        before = self.module.memory_allocated()
        variant(None)
        self.module.synchronize()
        return (self.module.max_memory_allocated() - before) / 2**20

    def interleaved(self, variants: dict[str, timing.Variant], repeats: int) -> dict[str, float]:
        """Median milliseconds; every variant has warmed up twice."""
        for variant in variants.values():
            for _ in range(2):
                variant(None)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, variant in variants.items():
                times[name].append(self.milliseconds(variant))
        return {name: statistics.median(x) for name, x in times.items()}


def copy_gb_per_s(device: str, repeats: int, size: int = COPY_BYTES) -> float:
    """Bytes read and written by a copy, a second."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(_: int | None) -> tuple[float, None]:
        target.copy_(source)
        return 0.0, None

    ms = Clock(device).interleaved({"copy": copy}, repeats)["copy"]
    return 2 * size / ms / 1e6


def least_bytes(student: Tensor, teacher: Tensor) -> int:
    """Both sides read once and a gradient written."""
    return 2 * student.nbytes + teacher.nbytes


def report(
    title: str,
    variants: dict[str, timing.Variant],
    exact: timing.Variant,
    options: argparse.Namespace,
    floor: tuple[int, float] | None,
) -> None:
    """Print a table, ours first; floor is (least bytes, GB/s of a copy)."""
    clock = Clock(options.device)
    for name in list(variants):
        timing.drop_if_broken(variants, name)
    medians = clock.interleaved(variants, options.repeats)
    errors = timing.errors(variants, exact, divergence.ERROR_ROWS)
    ours = next(iter(medians.values()))
    print(f"\n{title}")
    head = f"{'':26}{'median ms':>10}{'ratio':>7}{'GB/s':>8}{'of copy':>8}{'extra MB':>10}"
    print(f"{head}{'loss error':>12}{'grad error':>12}")
    for name, ms in medians.items():
        speed = f"{'-':>8}{'-':>8}"
        if floor is not None:
            gb = floor[0] / ms / 1e6
            speed = f"{gb:8.0f}{gb / floor[1]:8.2f}"
        cells = "".join(f"{x:12.1e}" for x in errors[name]) if name in errors else f"{'-':>12}" * 2
        extra = clock.extra_mb(variants[name])
        print(f"{name:26}{ms:10.3f}{ms / ours:7.2f}{speed}{extra:10.0f}{cells}", flush=True)


def liger_logits(teacher: Tensor, beta: float, student: Tensor, rows: int | None) -> Tensor:
    """Its kernel starts from log-probabilities."""
    assert LigerJSDFunction is not None
    log_q, log_p = student.log_softmax(-1), teacher[:rows].log_softmax(-1)
    return LigerJSDFunction.apply(log_q, log_p, None, beta, -100)


def liger_variant(inputs: linear.Inputs, kind: str, trained: bool) -> timing.Variant:
    """Its fused linear and JSD kernel."""
    assert LigerFusedLinearJSDFunction is not None
    hidden, weight, teacher_hidden, teacher_weight = inputs
    apply, beta = LigerFusedLinearJSDFunction.apply, divergence.BETAS[kind]

    def loss(h: Tensor, n: int | None) -> Tensor:
        w = weight.detach().requires_grad_(trained)
        return apply(h, w, teacher_hidden[:n], teacher_weight, None, beta, -100, 1.0)

    return partial(step, loss, hidden)


def step(
    function: Callable[[Tensor, int | None], Tensor], leaf: Tensor, rows: int | None
) -> tuple[float, Tensor | None]:
    """Forward and backward of the first rows."""
    leaf = leaf[:rows].detach().requires_grad_()
    loss = function(leaf, rows)
    loss.backward()
    return loss.item(), leaf.grad


def from_logits(options: argparse.Namespace, copy: float) -> None:
    """Tables of losses from logits."""
    for shape, dtype, kind in product(options.logits, options.dtypes, options.kinds):
        torch.compiler.reset()
        torch.manual_seed(0)
        rows, vocab = map(int, shape.split("x"))
        student, teacher = (
            torch.randn(rows, vocab, device=options.device).mul_(3).to(getattr(torch, dtype))
            for _ in range(2)
        )
        variants, exact = divergence.make_variants(student, teacher, kind)
        if LigerJSDFunction is not None:
            function = partial(liger_logits, teacher, divergence.BETAS[kind])
            variants["Liger kernel"] = partial(step, function, student)
        floor = (least_bytes(student, teacher), copy)
        report(f"logits, {kind} {shape} {dtype}", variants, exact, options, floor)


def from_hidden(options: argparse.Namespace) -> None:
    """Tables of losses from hidden states and heads."""
    cases = product(options.hidden, options.dtypes, options.kinds, options.heads)
    for shape, dtype, kind, head in cases:
        torch.compiler.reset()
        torch.manual_seed(0)
        tokens, size, vocab = map(int, shape.split("x"))
        inputs = tuple(
            x.to(options.device)
            for _ in range(2)
            for x in linear.make_side(tokens, size, vocab, dtype)
        )
        trained = head == "trained"
        variants, exact = linear.make_variants(inputs, kind, trained)
        if LigerFusedLinearJSDFunction is not None:
            variants["Liger kernel"] = liger_variant(inputs, kind, trained)
        report(f"hidden, {kind} {shape} {dtype}, {head} head", variants, exact, options, None)


def main() -> None:
    """Every table asked for."""
    options = arguments()
    name = options.device
    if Clock(options.device).module is not None:
        name = Clock(options.device).module.get_device_name()
    copy = copy_gb_per_s(options.device, options.repeats)
    print(f"{name}, torch {torch.__version__}; a copy reaches {copy:.0f} GB/s")
    if LigerJSDFunction is None:
        print(f"no rows of Liger's kernels; {divergence.NO_LIGER}")
    from_logits(options, copy)
    from_hidden(options)


if __name__ == "__main__":
    main()
