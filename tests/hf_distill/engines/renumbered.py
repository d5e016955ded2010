"""Resumes with another number of processes: python -m tests.hf_distill.engines.renumbered.

A checkpoint of some processes is gone on from by others. A cell is "rounding" (the weights of one
process that was not stopped), or "refused" with a reason, else wrong, which gives status 1.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from tests.hf_distill.engines import cpu, setups, table
from tests.hf_distill.engines.runs import SAVING, found_of, sharded_checkpoints
from tests.hf_distill.engines.setups import EMA, WIDER, Place, distill, largest, opsd

# Adam divides by the root of v: with a larger epsilon, rounding of small gradients stays rounding
OPTIONS = SAVING | {"adam_epsilon": 1e-4}
TAID = {"t_start": 0.5, "t_end": 0.95, "step_size": 0.8, "momentum": 0.9}


def sharded(make: Callable[..., Any], place: Place, **changes: Any) -> Any:
    return make(place, lora=True, **OPTIONS, **changes, **sharded_checkpoints(place))


RUNS: Mapping[str, Callable[[Place], Any]] = {
    "separate": partial(distill, **OPTIONS),
    "taid": partial(distill, taid=TAID, **OPTIONS),
    "ema": partial(opsd, **OPTIONS, **EMA),
    "ema, lora": partial(opsd, lora=True, **OPTIONS, **EMA),
    "ema, lora, sharded": partial(sharded, opsd, **EMA),
    "projections": partial(distill, **OPTIONS, **WIDER),
    "projections, lora, sharded": partial(sharded, distill, **WIDER),
    "on-policy, ema": partial(opsd, on_policy=True, **OPTIONS, **EMA),
}
REFUSALS = {*table.REFUSALS, "ZeRORuntimeException"}  # of DeepSpeed, which names both numbers
CHANGES = ((2, 3), (3, 2), (2, 1))
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ROUNDING = 1e-6  # of weights, after steps of Adam of 1e-3 each; 2e-7 is the most that was seen


def _folder(out: Path, engine: str, processes: int, name: str) -> Path:
    made = out / f"{engine}-{processes}" / name.replace(" ", "-").replace(",", "")
    made.mkdir(parents=True, exist_ok=True)
    return made


def process(engine: str, out: Path, saved_by: int, names: list[str]) -> None:
    """Be one process: train and save, or go on from what as many as `saved_by` have saved."""
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if engine != "one":
        os.environ |= {"RANK": os.environ.get("RANK", "0")}
        os.environ |= {"LOCAL_RANK": os.environ["RANK"]}
        cpu.take_processes_for_devices()
        # also where there is only one
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        if engine.startswith("zero"):
            cpu.without_compiled_ops()
    for name in names:
        place = Place(_folder(out, engine, world, name), engine, world)
        before = _folder(out, engine, saved_by, name) if saved_by else None
        setups.SETUPS[name] = partial(_run, RUNS[name], before)
        setups.SPECIAL[name] = setups.SETUPS[name]
        found = table.found_by_all(name, place)
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(found, _result(out, engine, saved_by, world, name))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _run(make: Callable[[Place], Any], before: Path | None, place: Place) -> dict[str, Any]:
    trainer = make(place)
    if before is not None:
        trainer.args.output_dir = str(place.folder / "resumed")
    trainer.train(resume_from_checkpoint=None if before is None else str(before / "checkpoint-2"))
    return found_of(trainer)


def _result(out: Path, engine: str, saved_by: int, world: int, name: str) -> Path:
    return _folder(out, engine, world, name) / f"found-{saved_by}.pt"


def cell(one: Any, many: Any) -> tuple[str, str]:
    """Say what a resumed run came to."""
    if many is None:
        return "DIED", "no result: the processes hung or ended"
    errors = [x for x in many["errors"] if x]
    if errors:
        kinds = {x[0] for x in errors}
        is_refused = kinds <= REFUSALS and len(errors) == len(many["errors"])
        return ("refused" if is_refused else "CRASH"), f"{errors[0][0]}: {errors[0][1][:200]}"
    apart = largest(one["weights"], many["weights"])
    return ("rounding" if apart <= ROUNDING else "WRONG"), f"{apart:.0e} from one process"


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--setups", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one launch")
    parser.add_argument("--out", type=Path, help="where results are kept; a temporary folder")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--saved-by", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        process(options.process, options.out, options.saved_by, options.setups)
        return 0
    out = Path(tempfile.mkdtemp()) if options.out is None else options.out
    out.mkdir(parents=True, exist_ok=True)

    def launched(engine: str, processes: int, saved_by: int = 0) -> None:
        own = ["tests.hf_distill.engines.renumbered", "--process", engine, "--out", str(out)]
        words = [*own, "--saved-by", str(saved_by), "--setups", *options.setups]
        table.run_once(words, out / f"{engine}-{saved_by}-{processes}", processes, options.timeout)

    launched("one", 1)
    cells = []
    for engine in options.engines:
        for processes in sorted({before for before, _ in CHANGES}):
            launched(engine, processes)
        for before, after in CHANGES:
            launched(engine, after, before)
            for name in options.setups:
                one = table.loaded(_result(out, "one", 0, 1, name))
                what, why = cell(one, table.loaded(_result(out, engine, before, after, name)))
                cells.append(what)
                print(f"{engine:6s} {before} to {after} {name:16s} {what:8s} {why}", flush=True)
    return int(any(x not in ("rounding", "refused") for x in cells))


if __name__ == "__main__":
    raise SystemExit(main())
