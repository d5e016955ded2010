"""A pytest plugin: Transformers' own trainer tests, with its `Trainer` exchanged for ours.

`pytest -p exchange`, with this folder in PYTHONPATH, reads two variables of the environment:

- EXCHANGE: "none" changes nothing, "alone" gives every test a DistillTrainer without a teacher, and
  "teacher" one with alpha=0 and a copy of the model as the teacher, where that is a causal LM.
- OUTCOMES: a file that gets the outcome of each test, as JSON.

`python tests/sweeps/exchange.py none.json other.json` prints the tests that fail in the second file
only, and ends with status 1 if there are any but those that `ALLOWED` names.
"""

import copy
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.trainers.config_schedules import Value

# A loss that is not finite stops our run, and says why; see docs/pages/differences.md
ALLOWED = ("FloatingPointError",)


@dataclass
class ExchangedArguments(DistillConfig):
    """TrainingArguments of a run that only its labels teach."""

    alpha: Value = 0.0


class ExchangedTrainer(DistillTrainer):
    """A DistillTrainer that is made as a Trainer is."""

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = ExchangedArguments("tmp_trainer") if args is None else args
        language = hasattr(model, "generate") and "ForCausalLM" in type(model).__name__
        if os.environ["EXCHANGE"] == "teacher" and (language or "LMHead" in type(model).__name__):
            kwargs["teacher"] = copy.deepcopy(model)
        data = data_collator, train_dataset, eval_dataset, processing_class
        super().__init__(model, args, *data, **kwargs)


outcomes: dict[str, list[str]] = {}


def pytest_configure() -> None:
    """Before the tests are imported."""
    if os.environ["EXCHANGE"] != "none":
        library: Any = sys.modules["transformers"]  # which is not what the first import returns
        library.Trainer, library.TrainingArguments = ExchangedTrainer, ExchangedArguments


def pytest_runtest_logreport(report: Any) -> None:
    """The worst outcome of a test's three phases, and what was raised."""
    name = report.nodeid
    if report.failed or (report.skipped and name not in outcomes):
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext if crash is None else crash.message
        outcomes[name] = [report.outcome, " ".join(text.split())[:400]]
    elif report.when == "call":
        outcomes.setdefault(name, [report.outcome, ""])


def pytest_sessionfinish() -> None:
    """Write them."""
    Path(os.environ["OUTCOMES"]).write_text(json.dumps(outcomes, indent=1), encoding="utf-8")


def main() -> int:
    """Compare two files of outcomes; returns the exit status."""
    plain, other = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:3])
    for path, found in zip(sys.argv[1:3], (plain, other), strict=True):
        counted = Counter(outcome for outcome, _ in found.values())
        print(path, ", ".join(f"{number} {outcome}" for outcome, number in counted.items()))
    worse = [
        (name, text)
        for name, (outcome, text) in other.items()
        if outcome == "failed" and plain.get(name, ["passed"])[0] != "failed"
    ]
    for name, text in worse:
        print(f"{name}\n    {text}")
    return int(any(not any(word in text for word in ALLOWED) for _, text in worse))


if __name__ == "__main__":
    raise SystemExit(main())
