"""Trains each set-up on each engine: python -m tests.hf_distill.engines.table [--engines ...].

A cell is "exact" (the weights of one process of as many rows, to rounding, and its logs), or
"refused" (a ValueError or NotImplementedError that says what it is about), else wrong: a crash, or
other numbers. "untried" needs devices. "trainer" is a resumed run that is not the straight one in a
plain `Trainer` either. Wrong cells end the command with status 1.
"""

import argparse
import json
import logging
import os
import subprocess
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tests.hf_distill.engines import runs
from tests.hf_distill.engines.launching import started
from tests.hf_distill.engines.setups import ENGINES, SETUPS, Place, largest, same_logs, train

# what hangs on how many processes there are: uneven pieces, rows and rounds, sums, checkpoints
FEW = ("separate", "tied both", "lora", "a process without tokens", "hidden layers", "evaluation")
FEW += ("base, full", "ema, full", "on-policy, ema", "environment", "resumed, ema, lora")
FEW += ("projections, few on one process", "resumed, projections", "saved, projections")
FEW += ("best model", "saved, lora merged", "no logits")
ROUNDING = 2e-7  # of weights of about 1 after three steps; SGD moves them by 1e-3 and more


def result_file(out: Path, engine: str, name: str) -> Path:
    """Where the result of a set-up on an engine is."""
    return out / engine / name.replace(" ", "-").replace(",", "") / "found.pt"


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run(name: str, place: Place) -> dict[str, Any]:
    lines, logger = Lines(), logging.getLogger("hf_distill")
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        found = train(name, place)
    except Exception as error:
        found = {"error": [type(error).__name__, str(error)], "trace": traceback.format_exc()}
    finally:
        logger.removeHandler(lines)
    return found | {"lines": lines.lines}


def found_by_all(name: str, place: Place) -> dict[str, Any]:
    """What a set-up gives here, with the errors of all processes."""
    found = _run(name, place)
    said: list[Any] = [(found.get("error"), found.get("wrong", []))]
    if torch.distributed.is_initialized():
        own, said = said[0], said * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, own)
    return found | {"errors": [x for x, _ in said], "wrong": [x for _, xs in said for x in xs]}


def process(engine: str, out: Path, names: list[str]) -> None:
    """Be one process of an engine: train, and save what the first has found."""
    torch.set_num_threads(1)
    world, rank = (int(os.environ.get(x, d)) for x, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if engine != "one":
        from tests.hf_distill.engines import cpu  # noqa: PLC0415

        cpu.take_processes_for_devices()
        if engine.startswith("zero"):
            cpu.without_compiled_ops()
    for name in names:
        file = result_file(out, engine, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        found = found_by_all(name, Place(file.parent, engine, world))
        if rank == 0:
            torch.save(found, file)
            print(engine, name, found.get("error", "done"), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_once(words: list[str], logs: Path, count: int, timeout: float) -> None:
    """Run processes of a module until all have ended; those that hang are killed.

    Args:
        words: the module and its arguments.
        logs: how the names of their logs begin.
        count: of processes.
        timeout: in seconds.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(logs.with_name(f"{logs.name}-{rank}.log").open("a"))
            for rank in range(count)
        ]
        running = started(words, files)
    try:
        for one in running:
            one.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    for one in running:
        one.kill()
        one.wait()


def launch(engine: str, out: Path, names: list[str], processes: int, timeout: float) -> None:
    """Run an engine's processes; a set-up that hangs or kills them is left without a result."""
    todo = list(names)
    while todo:
        count = 1 if engine == "one" else processes
        own = ["tests.hf_distill.engines.table", "--process", engine, "--out", str(out)]
        run_once([*own, "--setups", *todo], out / engine, count, timeout)
        left = [x for x in todo if _result(out, engine, x) is None]
        todo = left[1:]  # the first of them has ended its processes


def _result(out: Path, engine: str, name: str) -> dict[str, Any] | None:
    return loaded(result_file(out, engine, name))


def loaded(path: Path) -> dict[str, Any] | None:
    """What a process has saved, if it has."""
    return torch.load(path, weights_only=False) if path.exists() else None


REFUSALS = ("ValueError", "NotImplementedError")


# A resumed run that is not the straight one without this library either
TRAINERS_OWN = {"fsdp1": "so is a plain Trainer's with sharded checkpoints"}

# What cannot be tried without devices
ENDS, STREAMS = (
    "with a CPU as its device FSDP 1 ends the process",
    "FSDP 1 needs a device's streams",
)
NEEDS_DEVICES = {"fsdp1": dict.fromkeys(runs.SAVED, ENDS) | {"offload": STREAMS}}


def cell(
    engine: str, name: str, one: dict[str, Any] | None, many: dict[str, Any] | None
) -> tuple[str, str]:
    """Say what a set-up came to, and why."""
    why = NEEDS_DEVICES.get(engine, {}).get(name)
    if why is not None:
        return "untried", why
    if many is None:
        return "DIED", "no result: the processes hung or ended"
    errors = many["errors"]
    if any(errors):
        first = next(x for x in errors if x)
        kinds = {x[0] if x else "none" for x in errors}
        text = f"{first[0]}: {first[1][:150]}"
        return ("refused" if kinds <= set(REFUSALS) else "CRASH"), text
    if one is None or "weights" not in one:
        return "WRONG", "one process has failed"
    if many.get("wrong"):
        return "WRONG", "; ".join(many["wrong"])
    return compared(engine, one, many)


def compared(engine: str, one: dict[str, Any], many: dict[str, Any]) -> tuple[str, str]:
    """Say whether weights and logs are those of one process."""
    if "straight" in many:  # of the same processes, without a stop
        difference = largest(many["straight"], many["weights"])
        why = f"resumed {difference:.0e} from straight"
        if difference and engine in TRAINERS_OWN:
            return "trainer", f"{why}: {TRAINERS_OWN[engine]}"
        return ("WRONG" if difference else "exact"), why
    if "by logits" in many:
        is_near, why = runs.near(one["weights"], many)
        return ("exact" if is_near else "WRONG"), why
    difference = largest(one["weights"], many["weights"])
    path = [x for x in many["lines"] if "read by its" in x and x.startswith("student")]
    how = "".join(x.split("read by its ")[1].split(",")[0][:14] for x in path[-1:])
    odd = same_logs(one["logs"], many["logs"])
    if difference > ROUNDING:
        return "WRONG", f"weights {difference:.1e} apart [{how}]"
    if odd:
        return "LOGS", f"{difference:.0e} [{how}] {'; '.join(odd)[:150]}"
    return "exact", f"{difference:.0e} [{how}]"


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    engines = [x for x in ENGINES if x != "one"]
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--few", action="store_true", help="those set-ups that hang on --processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of one engine")
    parser.add_argument("--out", type=Path, help="where results are kept; a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the table is written")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        process(options.process, options.out, options.setups)
        return 0
    options.setups = list(FEW) if options.few else options.setups
    out = Path(tempfile.mkdtemp()) if options.out is None else options.out
    out.mkdir(parents=True, exist_ok=True)
    missing = [x for x in options.setups if _result(out, "one", x) is None]
    launch("one", out, missing, 1, options.timeout)
    table: dict[str, dict[str, tuple[str, str]]] = {}
    for engine in options.engines:
        tried = [x for x in options.setups if x not in NEEDS_DEVICES.get(engine, {})]
        launch(engine, out, tried, options.processes, options.timeout)
        found = {
            x: cell(engine, x, _result(out, "one", x), _result(out, engine, x))
            for x in options.setups
        }
        table[engine] = found
        for name, (what, why) in found.items():
            print(f"{engine:9s} {name:26s} {what:8s} {why}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1))
    cells = [what for found in table.values() for what, _ in found.values()]
    print(", ".join(f"{x} {cells.count(x)}" for x in sorted(set(cells))))
    return int(any(x not in ("exact", "refused", "trainer", "untried") for x in cells))


if __name__ == "__main__":
    raise SystemExit(main())
