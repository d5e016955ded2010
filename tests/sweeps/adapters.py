"""Tries every adapter of the installed PEFT: python -m tests.sweeps.adapters.

For each tuner, and for LoRA's variants, on a tiny Llama and a tiny GPT-2, six trials:

- base: what the teacher "base" says before the first step and after three is what the untouched
  model says.
- student: how far the new student is from the untouched model (a number, neither right nor wrong).
- ema, live: an average with decay 0, and the teacher "live", say what the student says.
- scale: "lora_scale" with scale 0 says what the untouched model says.
- step: loss and gradients of a DistillTrainer's first step, with another model as the teacher, are
  those of rows alone from `model(**inputs).logits`.

A cell is right, or a clear error (a ValueError of the project that names what it is about), or
wrong. Nothing may be wrong: then the command ends with status 1.
"""

import argparse
from functools import partial
from pathlib import Path

from tests.sweeps import page, sweep
from tests.sweeps.adapter_setups import setups
from tests.sweeps.adapter_trials import COLUMNS, trial
from tests.sweeps.sweep import BASES


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", help="adapters to try, by default all")
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are written")
    parser.add_argument("--earlier", type=Path, metavar="FILE", help="results of names not given")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page of docs with the table")
    options = parser.parse_args()
    names = [f"{x} on {base}" for x in options.names or setups() for base in options.base]
    results = sweep.run(
        partial(trial, columns=tuple(options.only)), names, options.jobs, options.json
    )
    results = sweep.joined(results, options.earlier)
    print(sweep.summary(results))
    sweep.save(results, options.json)
    if options.write is not None:
        page.write(options.write, "adapters", results)
    return int(sweep.any_wrong(results))


if __name__ == "__main__":
    raise SystemExit(main())
