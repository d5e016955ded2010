"""`python -m metal_ops`: what this machine has, if the ops are right on it, how fast."""

import argparse
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from metal_ops import _dispatch, bench
from metal_ops.selftest import machine, runner
from metal_ops.selftest.cases import Where
from metal_ops.spec import KINDS

SIMULATOR = "metal-sim"
DTYPES = ("float32", "float16", "bfloat16", "float64")
SHAPES = ["256x32000", "128x151936"]


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"a shape is TOKENSxVOCAB, as 512x151936; got {text!r}")
    return int(parts[0]), int(parts[1])


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises without such a device
        line = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {line}") from None
    return device


def _json_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {str(path.parent)!r}")
    return path


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m metal_ops",
        description="Without a command: what this machine has, and which backend runs each op.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{selftest,bench}")
    backends = ("auto", *_dispatch.BACKENDS)

    test = commands.add_parser(
        "selftest",
        help="compare every op with float64 on this machine's devices",
        description=(
            "Compare value and gradient of every op, kind and dtype with float64, on this "
            "machine's accelerator and CPU. Prints the largest c needed, which the rule limits, "
            "and one line of JSON to paste into a report. Exit status 0 if all is well, else 1."
        ),
    )
    test.add_argument(
        "--backend",
        choices=(*backends, SIMULATOR),
        default="auto",
        help="default auto, the one that the ops take; metal-sim runs the text of the Metal "
        "kernels on the CPU, in a checkout of the source",
    )
    test.add_argument("--device", type=_device, help="default: all that the backend takes")
    test.add_argument("--quick", action="store_true", help="a twelfth of the cases")
    test.add_argument("--json", type=_json_file, metavar="FILE", help="write the line there too")

    times = commands.add_parser(
        "bench",
        help="time a loss from logits against eager PyTorch and torch.compile",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    times.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="NxV", default=[_shape(x) for x in SHAPES],
        help=f"tokens x vocabulary; default {' '.join(SHAPES)}",
    )  # fmt: skip
    times.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    times.add_argument("--kinds", nargs="+", choices=KINDS, default=["jsd", "forward_kl"])
    times.add_argument("--backend", choices=backends, default="auto")
    times.add_argument("--device", type=_device, help="default: the accelerator, if there is one")
    times.add_argument("--repeats", type=int, default=7, help="of which the median is taken")
    return parser


@contextmanager
def _simulator(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Run the Metal kernels on the CPU inside the block."""
    try:
        compile_shader = importlib.import_module("tests.metal_ops.mslsim").compile_shader
    except ModuleNotFoundError as error:
        if error.name not in ("tests", "tests.metal_ops", "tests.metal_ops.mslsim"):
            raise
        parser.error(
            f"--backend {SIMULATOR} needs the simulator in tests/metal_ops/mslsim of a source "
            "checkout: git clone hf-distill and run this command in its folder"
        )
    with importlib.import_module("metal_ops.backends.metal").simulated(compile_shader):
        yield


def _wheres(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Where]:
    """Find the devices to test the backend on."""
    simulated = options.backend == SIMULATOR
    name = "metal" if simulated else options.backend
    devices = machine.devices() if options.device is None else [options.device]
    if simulated:
        if options.device not in (None, torch.device("cpu")):
            parser.error(f"--backend {SIMULATOR} runs on the CPU, got --device {options.device}")
        devices = [torch.device("cpu")]
    found, reasons = [], []
    for device in devices:
        reason = _dispatch.available_backends(device)[name] if name != "auto" else None
        if reason is None:
            found.append(Where(device, name, simulated))
        reasons.append(f"{device}: {reason}")
    if not found:
        parser.error(f"the {name} backend takes nothing here; {'; '.join(reasons)}")
    return found


def _selftest(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    simulated = options.backend == SIMULATOR
    with _simulator(parser) if simulated else nullcontext():
        return runner.main(_wheres(options, parser), options.quick, options.json)


def _bench(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    device = options.device or machine.devices()[0]
    if options.backend != "auto":
        reason = _dispatch.available_backends(device)[options.backend]
        if reason is not None:
            parser.error(f"the {options.backend} backend does not run on {device}: {reason}")
    dtypes = [getattr(torch, x) for x in options.dtypes]
    how = bench.Options(device, options.backend, options.repeats)
    return bench.main(options.shapes, dtypes, options.kinds, how)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == "selftest":
        return _selftest(options, parser)
    if options.command == "bench":
        return _bench(options, parser)
    machine.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
