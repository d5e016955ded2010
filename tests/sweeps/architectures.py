"""Tries every causal-LM type of the installed Transformers: python -m tests.sweeps.architectures.

For each type a tiny random model in float32 on the CPU, and five trials:

- step: loss and gradients of a DistillTrainer's first step (rows padded on the right, alpha 0.6,
  temperature 2, forward KL) are those of rows alone from `model(**inputs).logits`.
- left: the same with rows padded on the left.
- opsd: the first loss of an OPSDTrainer on completions of the data is the mean JSD of rows alone.
- generate: a greedy rollout of left-padded prompts takes the most probable token of rows alone.
- layers: `hidden_layers="uniform"` runs, and its states are those of `output_hidden_states`.

A cell is right, or a clear error (a ValueError of the project that names what it is about), or
wrong. Nothing may be wrong: then the command ends with status 1.
"""

import argparse
from functools import partial
from pathlib import Path

from tests.sweeps import page, sweep, tiny_configs
from tests.sweeps.architecture_trials import COLUMNS, trial
from tests.sweeps.difficult import WINDOWS


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", help="types to try, by default all")
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--windows", action="store_true", help="windows smaller than the rows")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are written")
    parser.add_argument("--earlier", type=Path, metavar="FILE", help="results of names not given")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page of docs with the table")
    options = parser.parse_args()
    names = options.names or (list(WINDOWS) if options.windows else tiny_configs.types())
    tried = partial(trial, windows=options.windows, columns=tuple(options.only))
    results = sweep.run(tried, names, options.jobs, options.json)
    results = sweep.joined(results, options.earlier)
    print(sweep.summary(results))
    sweep.save(results, options.json)
    if options.write is not None:
        page.write(options.write, "windows" if options.windows else "architectures", results)
    return int(sweep.any_wrong(results))


if __name__ == "__main__":
    raise SystemExit(main())
