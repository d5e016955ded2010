"""A live teacher collapses, a base teacher does not, and the watchdog says so.

Both distil the demo's model from the same start; the live teacher is the student itself with the
solution in its context. It takes the demo's arguments; no network, one CPU core, some ten minutes:

    python recipes/live_teacher.py --output_dir out/live_teacher

The output folder gets results.json, live_teacher.png and both models.
"""

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib
from gsm8k_opsd import RecipeArguments, Run, make_parser
from matplotlib import pyplot as plt

from hf_distill import OPSDConfig

TEACHERS = ("live", "base")
DEFAULTS: dict[str, Any] = {
    "output_dir": "out/live_teacher",
    "max_steps": 60,
    "logging_steps": 1,  # the collapse takes ten steps, and the watchdog reads logs
    "num_eval": 256,
    "accuracy_steps": 2,
}
REPORT = "watchdog_"


def parse(arguments: list[str], teacher: str) -> tuple[RecipeArguments, OPSDConfig, Any]:
    """Return the demo's arguments for one teacher, with a folder of its own."""
    parser = make_parser(demo=True)
    parser.set_defaults_with_config(**DEFAULTS)
    _, config, _ = parser.parse_args_and_config(["--demo", *arguments])
    folder = Path(str(config.output_dir)) / teacher
    own = ["--demo", *arguments, "--teacher", teacher, "--output_dir", str(folder)]
    return cast(Any, parser.parse_args_and_config(own))


def first_report(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return step and name of the first fault in a trainer's logs, or None."""
    for entry in history:
        faults = sorted(name for name in entry if name.startswith(REPORT))
        if faults:
            return {"step": entry["step"], "fault": faults[0].removeprefix(REPORT)}
    return None


def distil(run: Run) -> dict[str, Any]:
    """Return one teacher's accuracies over the steps, shares of ended completions, and report."""
    before = run.evaluate(run.model, "unaided accuracy").share
    trainer, track = run.distil()
    after = run.evaluate(run.model, "unaided accuracy").share
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "unaided": [(0, before), *track.points, (trainer.state.global_step, after)],
        "ended": [(entry["step"], entry["completion_ended"]) for entry in history],
        "first_report": first_report(history),
        "log_history": history,
    }


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Draw a PNG with both teachers' accuracies and ended completions, and the first reports."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True, sharex=True)
    panels = (("unaided", "unaided accuracy, held-out"), ("ended", "completions that end"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for (name, result), colour in zip(results.items(), ("C3", "C0"), strict=True):
            axis.plot(*zip(*result[key], strict=True), color=colour, label=f"{name} teacher")
            report = result["first_report"]
            if report is not None:
                text = f"watchdog: {report['fault']}, step {report['step']}"
                axis.axvline(report["step"], color=colour, linestyle=":", label=text)
        axis.set(title=title, xlabel="optimizer step", ylim=(-0.02, 1.02))
    axes[0].legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def describe(name: str, result: dict[str, Any]) -> str:
    """Write one line: accuracy at the start, last before the report, and at the end."""
    (_, before), (last, after) = result["unaided"][0], result["unaided"][-1]
    text = f"{name} teacher: unaided {before:.1%} at the start, {after:.1%} at step {last}; "
    report = result["first_report"]
    if report is None:
        return text + "no report"
    step, share = max(point for point in result["unaided"] if point[0] <= report["step"])
    return text + (
        f"first report {report['fault']} at step {report['step']}, unaided {share:.1%} at {step}"
    )


def main() -> None:
    """Distil with both teachers from one start, save, draw and print."""
    logging.basicConfig(level=logging.INFO)
    arguments = sys.argv[1:]
    if any(word.split("=")[0] == "--teacher" for word in arguments):
        raise ValueError(f"teacher is both of {TEACHERS} here; leave --teacher out")
    runs = {name: parse(arguments, name) for name in TEACHERS}
    start = Run(*runs[TEACHERS[0]])
    folder = Path(str(start.config.output_dir)).parent
    results = {}
    for name, (_, config, _) in runs.items():
        run = copy.copy(start)
        run.config, run.model = config, copy.deepcopy(start.model)
        results[name] = distil(run)
        print(describe(name, results[name]), flush=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    draw(folder / "live_teacher.png", results)


if __name__ == "__main__":
    main()
