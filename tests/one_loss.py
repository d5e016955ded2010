"""Counts what one loss runs through of this project's code: python -m tests.one_loss.

For one call of `compute_loss`, of a trainer that has called it once before:

- files: of hf_distill and metal_ops, in which a function was entered.
- calls: of their functions; a generator that is resumed counts as called.
- moves: calls whose caller stands in another of these files, and the first, from outside. The
  caller is the nearest function of the project that has not returned: functions of other packages
  between the two (a module's `__call__`, an autograd function's `apply`) are passed over. Returns
  are not counted again.

`opsd-step` also has what comes before: the rollout, and the batch that is made of it.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import hf_distill
import metal_ops
from tests import tiny_runs

PACKAGES = tuple(Path(str(package.__file__)).parent for package in (hf_distill, metal_ops))
OPSD = {"opsd": True, "teacher": "base", "data": "hints"}
TAID = {"t_start": 0.2, "step_size": 0.05, "momentum": 0.5}
# Arguments of `tests.tiny_runs.make`
RUNS: dict[str, dict[str, Any]] = {
    "kd": {},
    "opsd": OPSD,
    "opsd-step": OPSD,
    "hidden+taid": {"teacher": "other-wide", "hidden_layers": "uniform", "taid": TAID},
}


class Count:
    """Counts calls and moves between `start` and `stop`.

    Attributes:
        calls: of each file, by its path from the repository's root.
        moves: see this file's docstring.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.moves = 0
        self._open: list[str] = []  # the files of functions that have not returned
        self._names: dict[str, str | None] = {}

    def start(self) -> None:
        """From here on."""
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Up to here; a second time it does nothing."""
        sys.setprofile(None)

    def _name(self, path: str) -> str | None:
        if path not in self._names:
            found = (x for x in PACKAGES if Path(path).is_relative_to(x))
            package = next(found, None)
            name = None if package is None else str(Path(path).relative_to(package.parent))
            self._names[path] = name
        return self._names[path]

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        """Called by the interpreter."""
        if event not in ("call", "return"):
            return
        name = self._name(frame.f_code.co_filename)
        if name is None:
            return
        if event == "return":
            if self._open:  # else it was entered before the start
                self._open.pop()
            return
        self.calls[name] += 1
        self.moves += not self._open or self._open[-1] != name
        self._open.append(name)


def count(name: str) -> Count:
    """Train two steps of one of the runs; what was counted in the second."""
    counted, step = Count(), 0
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = tiny_runs.make(Path(folder), **RUNS[name], max_steps=2)
        compute_loss, get_batch_samples = trainer.compute_loss, trainer.get_batch_samples

        def noted_batch(*args: Any, **kwargs: Any) -> Any:
            nonlocal step
            step += 1
            if step == 2 and name.endswith("-step"):
                counted.start()
            return get_batch_samples(*args, **kwargs)

        def noted_loss(*args: Any, **kwargs: Any) -> Any:
            if step == 2:
                counted.start()
            try:
                return compute_loss(*args, **kwargs)
            finally:
                counted.stop()

        trainer.compute_loss, trainer.get_batch_samples = noted_loss, noted_batch
        tiny_runs.train(trainer)
    return counted


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RUNS, default=list(RUNS))
    parser.add_argument("--files", action="store_true", help="also print each file and its calls")
    options = parser.parse_args()
    tiny_runs.prepare()
    print(f"{'name':12s} {'files':>5s} {'moves':>5s} {'calls':>5s}")
    for name in options.only:
        found = count(name)
        calls = sum(found.calls.values())
        print(f"{name:12s} {len(found.calls):5d} {found.moves:5d} {calls:5d}", flush=True)
        if options.files:
            for file, number in sorted(found.calls.items()):
                print(f"    {file:44s} {number:4d}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
